"""Sharded checkpoints: one format, each rank writes its part, loadable at any world size.

    checkpoints/step-00000500/
        __0_0.distcp  __1_0.distcp  .metadata     model, optimizer and EMA by torch.distributed.checkpoint
        meta.json                                 written last: a folder without it is not a checkpoint

What a run needs to go on is in there and nowhere else, in this order: 1. weights, 2. optimizer state, 3. EMA,
4. `samples_seen`, `step` and the loop's few scalars. Data order, augmentation, learning rate and dropout are functions
of those numbers.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shards.console import UserError

META = "meta.json"
# One process is a normal way to train, not something to be warned of at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def save(
    folder: Path,
    meta: dict[str, Any],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: torch.nn.Module | None,
) -> None:
    """Writes a checkpoint under a temporary name and publishes it whole. Every rank calls this at the same step."""
    building = folder.with_name(f".{folder.name}.tmp")
    if _rank() == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    _barrier()
    dcp.save(_state(model, optimizer, ema), checkpoint_id=str(building))
    if _rank() == 0:
        (building / META).write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    _barrier()


def load(
    folder: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: torch.nn.Module | None
) -> None:
    """Restores in place; every rank calls this.

    Raises:
        UserError: the files do not fit the model, naming what differs.
    """
    state = _state(model, optimizer, ema)
    try:
        dcp.load(state, checkpoint_id=str(folder))
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"checkpoint {folder} does not fit this run or is damaged: {reason}") from error
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if ema is not None:
        set_model_state_dict(ema, state["ema"])


def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / META).read_text())


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{META}"))


def find(resume: str, run: Path) -> Path | None:
    """The checkpoint that --resume names: `auto` the newest of this run or None; else that of a path.

    Raises:
        UserError: nothing to resume from at that path.
    """
    if resume in ("", "auto"):
        return (complete(run / "checkpoints") or [None])[-1] if resume else None
    path = Path(resume)
    if (path / META).is_file():
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise UserError(
            f"--resume {resume}: no complete checkpoint there; give a run, a folder step-... with a {META}, or `auto`"
        )
    return found[-1]


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and what a crash left half-written."""
    for path in [*complete(folder)[:-keep], *folder.glob(".step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _state(model, optimizer, ema) -> dict[str, Any]:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return state | ({"ema": get_model_state_dict(ema)} if ema is not None else {})


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
