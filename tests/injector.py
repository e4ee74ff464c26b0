"""Faults for a training or prediction process, at a chosen moment: the real functions are wrapped, nothing in `mlc`
knows of it.

A process that is to suffer calls `arm` before the program starts. A moment lies inside of an operation, not between two
of them: half a backward pass, a checkpoint's file half written, `meta.json` on the disk and the folder not yet renamed.
What outlives the process (a full disk, a read-only folder, a shard that is gone) is undone by `heal`.
"""

import errno
import functools
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2

from mlc import predict, train, validation
from mlc.parallel import checkpoint, storage

LATE = 1.5  # seconds after which all others certainly wait for the rank that is about to die
SLOW = 500e3  # bytes a second
HALF = 20_000  # bytes of a checkpoint's file that are written when the moment `writing` comes

# How often each moment comes in one run of tests/trials.py: a step, a checkpoint, an evaluation, a block of rows. The
# files of an evaluation and of a prediction are written by rank 0.
STEPS = ("data wait", "forward", "backward", "optimizer step")
TIMES = dict.fromkeys(STEPS, 12) | dict.fromkeys(("staging", "writing", "publishing"), 4)
TIMES |= {"evaluation": 3, "exporting": 3, "prediction": 3, "prediction file": 2}
FIRST_RANK_ONLY = ("exporting", "prediction file")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to `rank` when `moment` comes for the `at`-th time."""

    fault: str
    moment: str
    rank: int
    at: int

    @property
    def predicting(self) -> bool:
        return self.moment.startswith("prediction")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a trial happens.

    Attributes:
        disk: a file system of its own if `mounts`, with everything that the program writes.
        data: a copy of the shards.
        mark: written when the fault happens, elsewhere.
    """

    disk: Path
    data: Path
    mark: Path
    mounts: bool

    @property
    def written(self) -> list[Path]:
        return [self.disk / "run" / "checkpoints", self.disk / "predictions"]


def cells() -> list[tuple[str, str]]:
    """The (fault, moment) pairs that have a meaning."""
    return [(fault, moment) for fault in FAULTS for moment in MOMENTS if _meaningful(fault, moment)]


def _meaningful(fault: str, moment: str) -> bool:
    if fault == "NaN":
        return moment in ("forward", "backward", "prediction")
    if fault == "reader killed":
        return moment in ("data wait", "forward", "writing", "evaluation", "prediction")
    return not moment.startswith("prediction") or fault not in ("slow disk", "corrupted newest")


# ---- faults: (fault, place, what the moment has in hand) -> the same or something else -------------------------------


def kill(fault: Fault, place: Place, value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(fault: Fault, place: Place, value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return value


def pause(fault: Fault, place: Place, value: Any) -> Any:
    """Who watches the process lets it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return value


def fail(fault: Fault, place: Place, value: Any) -> Any:
    if fault.moment in ("writing", "prediction file") or (fault.moment == "publishing" and fault.rank == 0):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # what a disk answers
    raise RuntimeError("injected")


def not_a_number(fault: Fault, place: Place, value: Any) -> Any:
    return value * np.nan


def die_late(fault: Fault, place: Place, value: Any) -> Any:
    time.sleep(LATE)
    os._exit(1)


def fill_disk(fault: Fault, place: Place, value: Any) -> Any:
    if not place.mounts:
        _refuse_writing(errno.ENOSPC)
        return value
    with (place.disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            return value


def make_read_only(fault: Fault, place: Place, value: Any) -> Any:
    """Files that are open stay writable, as on a disk that is mounted anew."""
    if not place.mounts:
        _refuse_writing(errno.EROFS)
        return value
    for folder in place.written:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        remount = ["mount", "-o", "remount,bind,ro", folder]
        while subprocess.run(remount, capture_output=True).returncode:  # busy: a thread has opened a file just now
            time.sleep(0.01)
    return value


def _refuse_writing(number: int) -> None:
    """Where nothing can be mounted."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    storage.begin = predict._write = refuse


def slow_down(fault: Fault, place: Place, value: Any) -> Any:
    def write(original, self, data):
        time.sleep(memoryview(data).nbytes / SLOW)
        return original(self, data)

    _wrap(storage._Watched, "write", write)
    return value


def take_shard(fault: Fault, place: Place, value: Any) -> Any:
    """Gone for those who open it, empty for those who have it open."""
    split = {"evaluation": "val", "prediction": "test", "prediction file": "test"}.get(fault.moment, "train")
    shard = sorted(place.data.glob(f"{split}-*.tar"))[0]
    shutil.copy(shard, shard.with_suffix(".kept"))
    os.truncate(shard, 0)
    shard.unlink()
    return value


def kill_workers(fault: Fault, place: Place, value: Any) -> Any:
    """As the kernel does when memory is short."""
    for worker in multiprocessing.active_children():
        worker.kill()
    return value


FAULTS: dict[str, Callable[[Fault, Place, Any], Any]] = {
    "kill -9": kill,
    "SIGTERM": terminate,
    "SIGSTOP": pause,
    "exception": fail,
    "NaN": not_a_number,
    "dies while others wait": die_late,
    "disk full": fill_disk,
    "read-only folder": make_read_only,
    "slow disk": slow_down,
    "corrupted newest": kill,  # the rest is done before the resume, see tests/trials.py
    "shard disappears": take_shard,
    "reader killed": kill_workers,
}


def heal(place: Place) -> None:
    """Undoes what a fault did to the disk and the data."""
    for folder in place.written if place.mounts else ():
        subprocess.run(["umount", "-l", folder], capture_output=True)  # most are not mounted
    (place.disk / "ballast").unlink(missing_ok=True)
    for kept in place.data.glob("*.kept"):
        kept.rename(kept.with_suffix(".tar"))


# ---- moments: each calls `strike(value)` whenever it comes, and goes on with what that returns -----------------------


def arm(fault: Fault, place: Place, rank: int) -> None:
    """To be called in the process that `fault` names, before the program starts."""
    count = 0

    def strike(value: Any = None) -> Any:
        nonlocal count
        count += 1
        if count != fault.at:
            return value
        place.mark.write_text(str(time.time()))
        return FAULTS[fault.fault](fault, place, value)

    MOMENTS[fault.moment](strike, rank)


def _wrap(owner: Any, name: str, around: Callable) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **kwargs: around(original, *args, **kwargs)))


def data_wait(strike, rank):
    def prepare(original, self):
        if self._ahead is None:
            strike()
        original(self)

    train.Waiting = type("Waiting", (train.Waiting,), {})  # that of the evaluation is another moment
    _wrap(train.Waiting, "prepare", prepare)


def forward(strike, rank):
    def features(original, self, image):
        made = original(self, image)
        return strike(made) if self.training else made

    _wrap(SwinTransformerV2, "forward_features", features)


def backward(strike, rank):
    def features(original, self, image):
        made = original(self, image)
        if self.training:
            made.register_hook(strike)
        return made

    _wrap(SwinTransformerV2, "forward_features", features)


def optimizer_step(strike, rank):
    def step(original, self, *args, **kwargs):
        strike()
        return original(self, *args, **kwargs)

    _wrap(torch.optim.AdamW, "step", step)


def staging(strike, rank):
    def copy(original, self, state):
        return strike(original(self, state))

    _wrap(checkpoint.HostCopy, "copy", copy)


def writing(strike, rank):
    """In the middle of this process's file."""

    def write(original, self, data):
        before, size = self.bytes, original(self, data)
        if before < HALF <= self.bytes:
            strike()
        return size

    _wrap(storage._Watched, "write", write)


def publishing(strike, rank):
    """The first process: `meta.json` is written, but not published; the others: they wait for that."""
    begun = False

    def on_first(original, self, action):
        nonlocal begun
        if begun and rank:
            strike()
        begun = not begun
        original(self, action)

    def publish(original, building, folder, meta):
        sync = os.fsync
        storage.os.fsync = lambda number: (sync(number), strike())
        try:
            original(building, folder, meta)
        finally:
            storage.os.fsync = sync

    _wrap(checkpoint.Saver, "_on_first", on_first)
    _wrap(storage, "publish", publish)


def evaluation(strike, rank):
    """After the first block of rows."""

    def logits(original, *args, **kwargs):
        for number, (row, values) in enumerate(original(*args, **kwargs)):
            yield row, values if number else strike(values)

    _wrap(validation, "logits_of_rows", logits)


def exporting(strike, rank):
    """New weights lie beside the thresholds of the old ones."""

    def write(original, *args, **kwargs):
        strike()
        original(*args, **kwargs)

    _wrap(train.thresholds, "write", write)


def predicting(strike, rank):
    def logits(original, *args, **kwargs):
        for row, values in original(*args, **kwargs):
            yield row, strike(values)

    _wrap(predict, "logits_of_rows", logits)


def prediction_file(strike, rank):
    """In the middle of the table."""

    def write(original, path, header, rows):
        rows = list(rows)

        def struck():
            yield from rows[:3]
            strike()
            yield from rows[3:]

        original(path, header, struck())

    _wrap(predict, "_write", write)


MOMENTS: dict[str, Callable[[Callable[..., Any], int], None]] = {
    "data wait": data_wait,
    "forward": forward,
    "backward": backward,
    "optimizer step": optimizer_step,
    "staging": staging,
    "writing": writing,
    "publishing": publishing,
    "evaluation": evaluation,
    "exporting": exporting,
    "prediction": predicting,
    "prediction file": prediction_file,
}
