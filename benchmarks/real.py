"""How good is what a user types first, on real pictures, next to what else there is?

The sets are those of benchmarks/real_data.py, the sides those of benchmarks/real_sides.py. Every side trains on
train.csv, may look at val.csv and is scored on test.csv by the same code: F1 over samples at 0.5 and at the one
threshold that is best on val.csv, mean average precision, and macro-F1 at that threshold. EfficientNet-Lite0 from
ImageNet weights (benchmarks/weights.py), the same image size and passes for all.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import common
import numpy as np
import real_data
import real_sides
import torch
import weights
from real_sides import Predictions, Task

from mlc.metrics import multilabel
from mlc.metrics.thresholds import best_global_threshold
from shards import pack
from shards.console import run, say

METRICS = {"f1@0.5": "F1 at 0.5", "f1@tuned": "F1 tuned", "map": "mAP", "macro_f1@tuned": "macro-F1"}
EVERY = ("constant", "sklearn", "bare", "recipe:demo-finetune", "loop45")
Scores = dict[str, float]


def scores(found: Predictions, val: np.ndarray, test: np.ndarray) -> Scores:
    """Of probabilities of both splits with their truth, bool [N, C]; `threshold` is val.csv's best."""
    threshold, _ = best_global_threshold(found["val"], val)
    tuned = found["test"] > threshold
    return {
        "f1@0.5": multilabel.f1_samples(found["test"] > 0.5, test),
        "f1@tuned": multilabel.f1_samples(tuned, test),
        "map": multilabel.mean_average_precision(found["test"], test),
        "macro_f1@tuned": multilabel.f1_macro(tuned, test),
        "map_val": multilabel.mean_average_precision(found["val"], val),
        "threshold": float(threshold),
    }


def compared(task: Task, sides: list[str], seeds: list[int]) -> Iterator[dict[str, dict[int, Scores]]]:
    """{side: {seed: scores}} as it grows; the sides take turns, seed by seed."""
    val, test = task.target("val"), task.target("test")
    found: dict[str, dict[int, Scores]] = {name: {} for name in sides}
    for seed in seeds:
        for name in sides:
            start = time.perf_counter()
            one = scores(real_sides.side(name)(task, seed), val, test)
            found[name][seed] = one | {"seconds": time.perf_counter() - start}
            say(f"{name}, seed {seed}:", ", ".join(f"{title} {one[key]:.4f}" for key, title in METRICS.items()))
            yield {name: runs for name, runs in found.items() if runs}


def rows(found: dict[str, dict[int, Scores]]) -> list[list[str]]:
    """A line for each side: mean and range of each metric over the seeds, and mean seconds."""
    lines = []
    for name, runs in found.items():
        line = [name, str(len(runs))]
        for metric in METRICS:
            values = [one[metric] for one in runs.values()]
            line += [f"{mean(values):.3f}", f"{min(values):.3f}..{max(values):.3f}"]
        lines.append([*line, f"{mean(one['seconds'] for one in runs.values()):.0f}"])
    return lines


def prepare(name: str, options, folder: Path) -> Task:
    """The set, raw for the others and packed for us."""
    data = real_data.make(name, options.data_dir, part=12 if options.quick else 1)
    files = {"--csv": "train.csv", "--val-csv": "val.csv", "--test-csv": "test.csv", "--images": "images"}
    argv = [str(word) for key, file in files.items() for word in (key, data / file)]
    pack.main([*argv, "--out", str(folder / "shards"), "-j", "1"])
    lite0 = weights.convert(folder / "weights.safetensors")
    return Task(data, folder / "shards", lite0, folder, options.size, options.epochs)


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--sets", nargs="+", choices=real_data.SETS, default=list(real_data.SETS), help="default: both")
    parser.add_argument(
        "--sides",
        nargs="+",
        default=list(EVERY),
        help="also fit and recipe:NAME, with flags: 'fit --time 10min' (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of every side (default: 1 2 3)")
    parser.add_argument("--size", type=int, default=real_data.SIZE, help="pixels (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over train.csv (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="disk to write to (default: the temporary folder)")
    real_data.add_data_dir(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 1
    for name in options.sides:
        real_sides.side(name)  # an unknown one is told before anything is fetched
    versions = common.versions("torch", "timm", "torchvision", "scikit-learn")
    print(f"{common.machine()}; {torch.get_num_threads()} threads; {versions}")
    header = ["", "seeds", *(cell for title in METRICS.values() for cell in (title, "range")), "seconds"]
    results = {}
    for name in options.sets:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            task = prepare(name, options, Path(folder))
            summary = real_data.summary(task.data)
            for found in compared(task, options.sides, options.seeds):
                results[name] = {"summary": summary, "found": found}
                common.write_json(options.json, versions=versions, options=vars(options), results=results)
        print(f"\n{summary}\n\n{common.table(header, rows(results[name]['found']))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
