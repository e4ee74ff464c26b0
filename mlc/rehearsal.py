"""`--dry-run`: a day of waiting in a queue for an error in the first minute is the dearest way to find it.

The run is the real one, with its data, model, strategy and checkpoint's place, but two steps long and under a name of
its own; what it wrote is deleted.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mlc import stages
from mlc.config import Config
from mlc.data.dataset import Batch
from mlc.parallel import storage
from mlc.resume import checkpoint_root
from mlc.runlog import memory_gb, read_log

STEPS = 2  # the first pays for what is made once, the second is what the others will be like
NEVER = "1000000ep"  # but at the end


@contextmanager
def shortened(config: Config) -> Iterator[Config]:
    """The settings of the rehearsal; afterwards its files are deleted."""
    name = f"{config.experiment or f'{config.model}-{config.img_size}'}-dry-run"
    often = {"eval_every": NEVER, "checkpoint_every": NEVER, "log_interval": 1}
    quiet = {"log_wandb": False, "log_tensorboard": False, "log_samples": ""}
    fresh = {"resume": "", "resume_weights_only": False, "experiment": name}
    longest = min(stages.configs(config), key=lambda stage: bool(stage.freeze))  # the one that needs most
    short = replace(longest, max_steps=STEPS, stages=[], **often, **quiet, **fresh)
    folder = Path(config.output) / name
    try:
        yield short
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # what could not be written cannot always be deleted
                storage.delete(checkpoint_root(config.checkpoint_dir, folder))


def shapes(batch: Batch, **tensors: torch.Tensor | None) -> str:
    """`pixels uint8 [8, 3, 256, 256], ...`, of the inputs of a batch and of `tensors`, those that there are."""
    named = {"pixels": batch.get("image"), "tokens": batch.get("tokens"), **tensors}
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in given.items())


def report(accelerator: Accelerator, folder: Path, root: storage.Place, global_batch: int) -> list[str]:
    """Lines for people; all ranks call it."""
    device = accelerator.device
    peaks = gather_object([memory_gb(device)])
    room = f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}" if device.type == "cuda" else ""
    lines = [f"rank {rank}: peak memory {peak:.2f}{room} GiB" for rank, peak in enumerate(peaks)]
    if accelerator.is_main_process:
        step = [line for line in read_log(folder / "log.jsonl") if "train/loss" in line][-1]
        seconds, waiting = global_batch / step["train/img_per_sec"], step["data/wait_frac"]
        size = sum(sum(storage.sizes(place).values()) for place in storage.complete(root))
        lines += [
            f"step {STEPS}: {seconds:.2f} s, {waiting:.0%} of it waiting for data",
            f"checkpoint: {size / 1e6:.1f} MB at {root}",
            "dry run: all is well; nothing was kept",
        ]
    return lines
