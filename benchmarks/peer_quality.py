"""Is our default recipe better than the loop most people would write, on the same data, backbone and budget?

The other is benchmarks/peer_loop.py, the training recipe of ASL and ML-Decoder, with both of their losses. There are
two settings: `scratch`, the small SwinV2 of the recipe `demo`, and `finetune`, EfficientNet-Lite0 from real ImageNet
weights (benchmarks/weights.py) with the recipe `demo-finetune`. Backbone, image size, batch size, number of steps and
seeds are the same; ours takes all else from its recipe, the other its published settings, with its learning rate tuned:
each of `--peer-lr` on the first seed, the best on all. Both are scored at the end of the run on val.csv of the demo
data, which shares neither a scan nor a piece of photograph with train.csv, by the same code: the better of raw and
averaged weights. The two take turns, seed by seed.
"""

import csv
import gc
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import common
import numpy as np
import peer_loop
import torch
import weights

from mlc import train
from mlc.config import Config
from mlc.flags import read_config
from mlc.metrics import multilabel
from mlc.models.build import build_model, fast_memory_format
from shards import demo, pack
from shards.console import run, say
from shards.dataset import load_dataset

RECIPES = {"scratch": "demo", "finetune": "demo-finetune"}
F1, MAP = "f1_samples@tuned", "map"
OURS = "ours"
EMA_DECAYS = (0.9, 0.98, 0.99, 0.995, 0.9997)
Scores = dict[str, float | str]  # F1, MAP and which weights have them


class Contest:
    """One setting: the same data, backbone and budget for both; `found` {candidate: {seed: scores}} so far."""

    def __init__(self, setting: str, options, folder: Path):
        self.raw, self.found = folder / "raw", {}
        argv = ["-c", RECIPES[setting], "--data", folder / "shards", "--output", folder / setting]
        if setting == "finetune":
            argv += ["--pretrained-path", weights.convert(folder / "weights.safetensors")]
        if options.epochs is not None:
            argv += ["--epochs", options.epochs]
        if options.steps is not None:
            argv += ["--max-steps", options.steps]
        # One evaluation, at the end: neither chooses its weights among many.
        argv += ["--eval-every", "1000000ep", "--eval-metric", F1, "--checkpoint-every", "1000000ep", "--resume", ""]
        self.argv = [str(word) for word in argv]
        self.config = read_config(self.argv)
        self.batch = self.config.global_batch_size or self.config.batch_size
        data = load_dataset(folder / "shards")
        per_epoch = data.split("train").num_samples / self.batch
        self.classes, self.steps = data.classes, self.config.max_steps or math.ceil(self.config.epochs * per_epoch)

    def ours(self, seed: int) -> None:
        train.main([*self.argv, "--seed", str(seed), "--experiment", f"seed{seed}"])
        gc.collect()  # the story's functions hold the model in a cycle
        self._keep(OURS, seed, evaluations(Path(self.config.output, f"seed{seed}", "log.jsonl")))

    def peer(self, seed: int, loss: str, lr: float) -> None:
        found = peer_loop.train(
            backbone(self.config, len(self.classes), seed),
            self.raw,
            self.classes,
            size=self.config.img_size,
            batch_size=self.batch,
            steps=self.steps,
            lr=lr,
            loss=loss,
            seed=seed,
            ema_decays=EMA_DECAYS,
        )
        target = labels(self.raw / "val.csv", self.classes)
        scored = {name: dict(multilabel.evaluate(scores, target)) for name, scores in found.items()}
        self._keep(candidate(loss, lr), seed, scored)

    def _keep(self, name: str, seed: int, scored: dict[str, dict[str, float]]) -> None:
        """Of raw and averaged weights the better."""
        best = max(scored, key=lambda weights: scored[weights][F1])
        kept = {F1: scored[best][F1], MAP: scored[best][MAP], "weights": best}
        self.found.setdefault(name, {})[seed] = kept
        say(f"{name}, seed {seed}: F1 {kept[F1]:.4f}, mAP {kept[MAP]:.4f} ({best})")


def backbone(config: Config, classes: int, seed: int) -> torch.nn.Module:
    """timm's own modules with the weights our run starts from."""
    torch.manual_seed(seed)
    model = build_model(
        name=config.model,
        num_classes=classes,
        img_size=config.img_size,
        pretrained_path=config.pretrained_path or None,
        model_kwargs=config.model_kwargs,
        attention="timm",
    )
    return model.to(memory_format=fast_memory_format(model))


def labels(table: Path, classes: tuple[str, ...]) -> np.ndarray:
    """bool [N, C], in the order of the CSV."""
    with table.open() as file:
        return np.array([[name in row["Labels"].split() for name in classes] for row in csv.DictReader(file)])


def evaluations(log: Path) -> dict[str, dict[str, float]]:
    """{weights: metrics} of a run's last evaluation."""
    line = next(line for line in map(json.loads, reversed(log.read_text().splitlines())) if "val/map" in line)
    names = {"raw": "val", "average": "val_ema"}
    return {name: {key: line[f"{prefix}/{key}"] for key in (F1, MAP)} for name, prefix in names.items()}


def turns(found: dict[str, dict[int, Scores]], seeds: int, rates: list[float]) -> Iterator[tuple[int, str, float]]:
    """(seed, `ours` or the peer's loss, its learning rate) of each run in turn, the one that begins changing with the
    seed. Between two of them `found` grows: the peer's rates are all tried with seed 1, then each loss has its best.
    """
    for seed in range(1, seeds + 1):
        if seed % 2 == 0:
            yield seed, OURS, 0.0
        for loss in peer_loop.LOSSES:
            tuned = max(rates, key=lambda lr: found[candidate(loss, lr)][1][F1]) if seed > 1 else None
            yield from ((seed, loss, lr) for lr in ([tuned] if tuned else rates))
        if seed % 2:
            yield seed, OURS, 0.0


def candidate(loss: str, lr: float) -> str:
    return f"{loss}, lr {lr:g}"


def rows(found: dict[str, dict[int, Scores]]) -> list[list[str]]:
    """A line for each candidate: mean and range of both metrics, and by how much ours is better, seed for seed."""
    lines = []
    for name, runs in found.items():
        line = [name, str(len(runs))]
        for metric in (F1, MAP):
            values = [scores[metric] for scores in runs.values()]
            line += [f"{mean(values):.4f}", f"{min(values):.4f}..{max(values):.4f}"]
        if name != OURS:
            ahead = {m: [found[OURS][seed][m] - scores[m] for seed, scores in runs.items()] for m in (F1, MAP)}
            line += [f"{mean(ahead[m]):+.4f}" for m in (F1, MAP)]
            line.append(f"{sum(value > 0 for value in ahead[F1])} of {len(runs)}")
        lines.append(line + [""] * (9 - len(line)))
    return lines


def prepare(folder: Path, samples: int) -> None:
    """Demo data, raw for the peer and packed for us, with the disjoint val.csv as validation split."""
    raw = folder / "raw"
    demo.main([str(raw), "--samples", str(samples)])
    files = {"--csv": "train.csv", "--val-csv": "val.csv", "--images": "images"}
    argv = [str(word) for key, name in files.items() for word in (key, raw / name)]
    pack.main([*argv, "--out", str(folder / "shards")])


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--settings", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: both")
    parser.add_argument("--peer-lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="its learning rates")
    parser.add_argument("--epochs", type=float, help="of each run (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="of each run, instead")
    parser.add_argument("--samples", type=int, default=6000, help="of mlc demo-data (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="disk to write to (default: the temporary folder)")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.samples, options.peer_lr = 1, 60, options.peer_lr[:1]
        options.steps = options.steps or 2
    results = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        prepare(Path(name), options.samples)
        for setting in options.settings:
            contest = Contest(setting, options, Path(name))
            for seed, who, lr in turns(contest.found, options.rounds, options.peer_lr):
                contest.ours(seed) if who == OURS else contest.peer(seed, who, lr)
            results[setting] = {"steps": contest.steps, "batch": contest.batch, "found": contest.found}
    print(f"{common.machine()}; {torch.get_num_threads()} threads; {common.versions('torch', 'timm', 'torchvision')}")
    header = ["", "seeds", "F1 tuned", "range", "mAP", "range", "ours - it: F1", "mAP", "won"]
    for setting, result in results.items():
        print(f"\n{setting}: {result['steps']} steps of {result['batch']}, {RECIPES[setting]}\n")
        print(common.table(header, rows(result["found"])))
    common.write_json(options.json, options=vars(options), results=results)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
