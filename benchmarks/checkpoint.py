"""How long does a checkpoint of a SwinV2-L hold the training up, and how long until it is on the disk?

The state is that of a run: weights, AdamW's two moments and the average, 4 x 196.7 M numbers. Ours (copied to host
memory and written by a thread, or at once with --no-checkpoint-async) stands beside `accelerator.save_state` and a
plain `torch.save`, on the same disk. Ours waits until the disk has it (fsync) and takes a sha256 of every file; the
others do neither. `loop` is what a checkpoint costs in all: the same steps with one and without, on one core, so that a
thread that takes the interpreter or the memory bus away from the training is seen. The first checkpoint of a run, which
has to find its host memory first, is measured apart.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import common
import timm
import torch
from accelerate import Accelerator

from mlc.parallel.checkpoint import Saver

EVERY = 600  # seconds between two checkpoints of a real run
NAMES = ("mlc, background", "mlc, at once", "accelerator.save_state", "torch.save")


class Run:
    """What a training run holds, and a step of it that takes a few milliseconds."""

    def __init__(self, name: str, device: str):
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.model = timm.create_model(name, num_classes=1000).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema = deepcopy(self.model)
        self.work = torch.randn(1024, 1024, device=device)
        self.accelerator.prepare(self.model, self.optimizer)
        self.accelerator.register_for_checkpointing(self.ema)

    def state(self) -> dict:
        return {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}

    def gigabytes(self) -> float:
        return 4 * sum(p.nbytes for p in self.model.parameters()) / 1e9

    def steps(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self.work @ self.work
            wait(self.work)
        return time.perf_counter() - begin


def wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


# ---- candidates ------------------------------------------------------------------------------------------------------


def save_state(run: Run, folder: Path) -> None:
    run.accelerator.save_state(str(folder))


def torch_save(run: Run, folder: Path) -> None:
    folder.mkdir()
    torch.save({name: part.state_dict() for name, part in run.state().items()}, folder / "state.pt")


def at_once(run: Run, save: Callable[[Run, Path], None], folder: Path) -> dict[str, float]:
    """Seconds of a checkpoint that the loop waits for from beginning to end."""
    begin = time.perf_counter()
    save(run, folder)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder, ignore_errors=True)
    return dict.fromkeys(("blocked", "loop", "written"), seconds)


class Ours:
    def __init__(self, run: Run, folder: Path, *, background: bool):
        self.run, self.step = run, 0
        self.saver = Saver(folder, keep=1, background=background, say=print)

    def save(self, *_) -> None:
        self.step += 1
        self.saver.save(self.step, {}, **self.run.state())

    def behind(self, steps: int) -> dict[str, float]:
        """Seconds of a checkpoint that is written while `steps` go on; the same steps alone come first."""
        without, begin = self.run.steps(steps), time.perf_counter()
        self.save()
        blocked = time.perf_counter() - begin
        loop = blocked + self.run.steps(steps) - without
        self.saver.finish()
        return {"blocked": blocked, "loop": loop, "written": blocked + self.saver.take_seconds()["ckpt/write_s"]}


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--device", default="cpu", help="where the state is: cpu or cuda (default: cpu)")
    parser.add_argument("--dir", type=Path, help="disk to write to (default: the temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "swinv2_tiny_window8_256" if args.quick else "swinv2_large_window12to16_192to256"
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        run = Run(name, args.device)
        back, once = (Ours(run, root / kind, background=kind == "back") for kind in ("back", "once"))
        begin = time.perf_counter()
        back.save()
        first = time.perf_counter() - begin
        back.saver.finish()
        steps = int(2 * (time.perf_counter() - begin) / (run.steps(50) / 50)) + 1  # the write ends among them
        turns: dict[str, Callable[[], dict[str, float]]] = {
            NAMES[0]: partial(back.behind, steps),
            NAMES[1]: partial(at_once, run, once.save, root / "none"),
            NAMES[2]: partial(at_once, run, save_state, root / "save_state"),
            NAMES[3]: partial(at_once, run, torch_save, root / "torch_save"),
        }
        found = common.interleaved(turns, rounds)
    versions = common.versions("torch", "accelerate", "timm")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{common.machine()}; {device}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"{run.gigabytes():.2f} GB of one process; {common.rounds_said(rounds)}; seconds (spread)\n")
    seconds = {one: {kind: [v[kind] for v in values] for kind in values[0]} for one, values in found.items()}
    rows = []
    for one, kinds in seconds.items():
        cells = [f"{median(values):.2f} ({common.spread(values):.0%})" for values in kinds.values()]
        rows.append([one, *cells, *(f"{median(kinds[kind]) / EVERY:.2%}" for kind in ("blocked", "loop"))])
    share = f"of {EVERY // 60} min"
    print(common.table(["", "blocked", "loop", "until written", f"blocked, {share}", f"loop, {share}"], rows))
    part = median(seconds[NAMES[0]]["blocked"]) / median(seconds[NAMES[1]]["blocked"])
    print(
        f"\nthe background blocks for {part:.1%} of the time that writing at once takes; the first time {first:.2f} s"
    )
    common.write_json(args.json, versions=versions, seconds=seconds, first=first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
