"""`best/` and `last/` of a run, each written as a whole, and `best/` in step with the checkpoints.

Better weights are published at once, the checkpoint that knows of them a moment or an hour later. A run that is killed
in between goes on from the checkpoint before, and may take another way from there; so the weights that this checkpoint
calls the best are kept aside until a newer one is complete, and come back if the run does.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.files import disk_errors

_ASIDE = ".best-of-checkpoint"


@contextmanager
def written_whole(run: Path, which: str, *, keep_step: int | None = None) -> Iterator[Path]:
    """Yields a folder to write into, which then becomes `run/which`.

    keep_step: weights of this step that were there before are kept aside for `restore_best`.
    """
    folder, building, old = run / which, run / f".{which}-building", run / f".{which}-before"
    for left in (building, old):
        shutil.rmtree(left, ignore_errors=True)
    yield building
    with disk_errors(folder):
        if folder.exists():
            if keep_step is not None and step_of(folder) == keep_step:
                old = run / _ASIDE
                shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        building.rename(folder)
    if old.name != _ASIDE:
        shutil.rmtree(old, ignore_errors=True)


def restore_best(run: Path, progress: dict[str, Any]) -> str:
    """Makes `best/` the weights that the checkpoint's progress calls the best; where these are lost, the best begins
    anew, in `progress` too. Returns a line for the log, or ''.
    """
    step, best, aside = progress["best_step"], run / "best", run / _ASIDE
    if step is None or step_of(best) == step:
        return ""
    if step_of(aside) == step:
        with disk_errors(best), written_whole(run, "best") as building:
            shutil.copytree(aside, building)
        return f"{best} is that of step {step} again; what came after it was given up"
    progress.update(best=None, best_step=None, stale=0)
    return f"{best} has not the weights of step {step}, the best so far: the best is looked for from here on"


def forget_aside(run: Path) -> None:
    """The newest checkpoint is complete and knows of `best/`."""
    shutil.rmtree(run / _ASIDE, ignore_errors=True)


def step_of(folder: Path) -> int | None:
    """The step whose weights are in `best/` or `last/`; None where there are none."""
    try:
        return json.loads((folder / "config.json").read_text())["mlc"]["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
