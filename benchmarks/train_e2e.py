"""How much of the bare step's speed does a whole run keep: data, step, log and checkpoint together?

`bare step` is forward, backward, AdamW and the average of the weights, on a batch that is on the device already. A run
is `mlc.train.main` with the same model, batch and autocast on demo shards packed on the spot; they take turns in one
process. Its first quarter does not count; the second and third are its rate and what is `kept`; then a checkpoint is
begun and written during the last quarter, whose longer time is what a checkpoint costs, the wait for it included.
`with checkpoint` is the clock over all three quarters, `one in 10 min` what remains where checkpoints are as rare as
in a real run. `wait` is the log's own share of time that was waited for data. On a CPU the workers and the thread that
writes compute on the cores of the step, so what they take is lost by necessity; a run without workers decodes between
the steps, and shows how much that is.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import common
import torch
from step import wait

from mlc import train
from mlc.models.build import build_model, fast_memory_format
from mlc.optim.ema import Ema
from mlc.optim.losses import bce
from mlc.optim.param_groups import param_groups
from mlc.parallel.compiler import compile_blocks
from mlc.runlog import RunLog
from shards import demo, pack

MODEL, CLASSES = "swinv2_tiny_window8_256", 18  # classes of the demo data
EVERY = 600  # seconds between two checkpoints of a real run
BARE = "bare step"


class Bare:
    def __init__(self, options):
        torch.manual_seed(0)
        shape = {"name": options.model, "img_size": options.img_size, "num_classes": CLASSES}
        self.device, self.batch, self.steps = options.device, options.batch_size, options.steps
        self.model = build_model(**shape, attention=options.attention)
        self.model.to(self.device, memory_format=fast_memory_format(self.model, self.device))
        self.ema = Ema(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 0.05), lr=1e-4, fused=True)
        size = (self.batch, 3, options.img_size, options.img_size)
        self.image = torch.randn(size, device=self.device)
        self.target = torch.rand(self.batch, CLASSES, device=self.device).round()
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16) if options.amp == "bf16" else nullcontext
        if options.compile:
            compile_blocks(self.model)

    def step(self) -> None:
        with self.autocast():
            logits = self.model(self.image)
        bce(logits, self.target).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, 0.999)

    def timed(self) -> dict[str, float]:
        """Images per second over half as many steps as a run has."""
        self.step()
        wait(self.device)
        begin = time.perf_counter()
        for _ in range(self.steps // 2):
            self.step()
        wait(self.device)
        return {"rate": self.steps // 2 * self.batch / (time.perf_counter() - begin)}


class Clocked(RunLog):
    """The run's log, which also takes the time of each line: its values have come from the device by then."""

    lines: list[dict[str, float]]

    def write(self, **values) -> None:
        if "train/img_per_sec" in values:
            type(self).lines.append({"clock": time.perf_counter(), **values})
        super().write(**values)


def run(options, shards: Path, workers: int) -> dict[str, float]:
    """One whole run, from `main` on; what `kept` makes of its log."""
    Clocked.lines = []
    quarter = options.steps // 4
    with tempfile.TemporaryDirectory(dir=options.dir) as output:
        argv = ["--data", shards, "--val-split", "", "--output", output, "--model", options.model]
        argv += ["--img-size", options.img_size, "--attention", options.attention, "-b", options.batch_size]
        argv += ["--amp-dtype", options.amp, "--max-steps", options.steps, "--log-interval", quarter, "-j", workers]
        argv += ["--checkpoint-every", f"{3 * quarter}st", *(["--compile"] if options.compile else [])]
        with mock.patch.object(train, "RunLog", Clocked):
            code = train.main([str(word) for word in argv])
    if code:
        raise SystemExit(code)
    gc.collect()  # the story's functions hold the model in a cycle
    torch.cuda.empty_cache()
    return kept(Clocked.lines, quarter)


def kept(lines: list[dict[str, float]], quarter: int) -> dict[str, float]:
    """What a run of four quarters did after the first, each a line of the log: images per second without (`rate`) and
    `with` a checkpoint, the share of time `waiting` for data; seconds the checkpoint `costs`, how many of them it
    `blocked`, and how many its `writing` took, 0 if it was not done at the end."""
    first, second, third, last = (next(line for line in lines if line["step"] == k * quarter) for k in range(1, 5))
    samples = last["samples_seen"] - third["samples_seen"]
    undisturbed = (third["clock"] - first["clock"]) / 2
    return {
        "rate": samples / undisturbed,
        "with": 3 * samples / (last["clock"] - first["clock"]),
        "waiting": (second["data/wait_frac"] + third["data/wait_frac"]) / 2,
        "costs": last["clock"] - third["clock"] - undisturbed,
        "blocked": last.get("ckpt/blocked_s", 0.0),
        "writing": last.get("ckpt/write_s", 0.0),
    }


def packed(folder: Path, samples: int, size: int) -> Path:
    """Demo images of about `size` pixels, packed."""
    raw, shards = folder / "raw", folder / "shards"
    demo.main([str(raw), "--samples", str(samples), "--size", str(size)])
    files = {"--csv": raw / "train.csv", "--images": raw / "images", "--test-csv": raw / "test.csv", "--out": shards}
    pack.main([str(word) for pair in files.items() for word in pair])
    return shards


def rows(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    bare, lines = median(one["rate"] for one in found[BARE]), []
    for name, values in found.items():
        middle = {key: median(one[key] for one in values) for key in values[0]}
        line = [name, f"{middle['rate']:.2f}", f"{common.spread([one['rate'] for one in values]):.0%}"]
        if name != BARE:
            often = middle["rate"] / bare * EVERY / (EVERY + max(0.0, middle["costs"]))
            shares = middle["rate"] / bare, middle["with"] / bare, often, middle["waiting"]
            line += [f"{share:.1%}" for share in shares]
            line += [f"{middle[key]:.2f}" for key in ("costs", "blocked")]
        lines.append(line + [""] * (9 - len(line)))
    return lines


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=MODEL, help="timm's name (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("-b", "--batch-size", type=int, help="images (default: 64 on a GPU, 8 on a CPU)")
    parser.add_argument("--steps", type=int, help="of a run, a multiple of 4 (default: 400 on a GPU, 24 on a CPU)")
    parser.add_argument("--samples", type=int, help="demo images (default: 3000 on a GPU, 300 on a CPU)")
    parser.add_argument("--workers", type=int, nargs="+", help="of a run each (default: 8 on a GPU, 1 and 0 on a CPU)")
    parser.add_argument("--attention", choices=("fast", "timm"), default="fast", help="default: %(default)s")
    parser.add_argument("--amp", choices=("bf16", "none"), help="autocast (default: bf16 on a GPU, none on a CPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, of the bare step too")
    parser.add_argument("--dir", type=Path, help="disk to write to (default: the temporary folder)")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if options.quick:
        options.rounds, options.steps, options.samples = 1, options.steps or 8, options.samples or 60
        options.img_size, options.batch_size = (256, 64) if on_gpu else (128, 4)
    options.batch_size = options.batch_size or (64 if on_gpu else 8)
    options.steps = options.steps or (400 if on_gpu else 24)
    options.samples = options.samples or (3000 if on_gpu else 300)
    options.workers = options.workers or ([8] if on_gpu else [1, 0])
    options.amp = options.amp or ("bf16" if on_gpu else "none")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        shards = packed(Path(folder), options.samples, options.img_size + options.img_size // 8)
        turns: dict[str, Callable[[], dict[str, float]]] = {BARE: Bare(options).timed}
        for workers in options.workers:
            turns[f"run, {workers} worker{'s' * (workers != 1)}"] = partial(run, options, shards, workers)
        found = common.interleaved(turns, options.rounds)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    versions = common.versions("torch", "timm", "accelerate")
    print(f"{common.machine()}; {where}; {versions}; {common.rounds_said(options.rounds)}")
    how = f"{options.attention} attention, autocast {options.amp}{', compiled' * options.compile}"
    print(f"{options.model} at {options.img_size} px, {how}; runs of {options.steps} steps of {options.batch_size}\n")
    header = ["", "img/s", "spread", "kept", "with checkpoint", f"one in {EVERY // 60} min", "wait"]
    header += ["checkpoint costs, s", "blocked, s"]
    print(common.table(header, rows(found)))
    common.write_json(options.json, device=where, options=vars(options), versions=versions, results=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
