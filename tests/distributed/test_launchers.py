"""A run is stopped as a scheduler or a person at a terminal does it, through what started its processes."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT, TINY, command, environment, log_of
from processes import PATIENCE, alive, freeze, pending, ranks, thaw, wait_until

from mlc.parallel import storage

pytestmark = pytest.mark.distributed

TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
ACCELERATE = command(processes=2)


@contextmanager
def begun(launcher: list[str], shards: Path, folder: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A run that would take for ever, in a session of its own as below a terminal, held after its third step."""
    argv = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    argv += ["--global-batch-size", "16", "--max-steps", "100000", "--checkpoint-every", "100000st"]
    process = subprocess.Popen(
        [*launcher, "train.py", *TINY, *argv, "--log-interval", "1"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, freeze(folder / "run", at_step=3)
    finally:
        for left in [*ranks(folder / "run"), process]:
            left.kill()


@pytest.mark.parametrize(
    "launcher, send, number",
    [(TORCHRUN, os.kill, signal.SIGTERM), (ACCELERATE, os.killpg, signal.SIGINT)],
    ids=["torchrun is terminated", "Ctrl-C under accelerate launch"],
)
def test_the_launcher_is_told_to_stop_and_the_run_saves(shards, tmp_path, launcher, send, number):
    with begun(launcher, shards, tmp_path) as (process, held):
        assert len(held) == 2
        send(process.pid, number)
        wait_until(lambda: all(pending(rank, number) for rank in held))
        thaw(held)
        printed = process.communicate(timeout=PATIENCE)[0]
        assert "--resume auto goes on" in printed, printed
        assert process.returncode == 1  # the launcher's, which does not ask how its processes ended
        assert not any(alive(rank) for rank in held)
    (kept,) = storage.complete(tmp_path / "run" / "checkpoints")
    meta = storage.read_meta(kept)
    assert meta["world_size"] == 2
    assert meta["progress"]["step"] == max(line["step"] for line in log_of(tmp_path / "run")) >= 3


def test_a_second_ctrl_c_stops_now(shards, tmp_path):
    with begun(ACCELERATE, shards, tmp_path) as (process, held):
        for passed_on in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, signal.SIGINT)
            wait_until(lambda number=passed_on: all(pending(rank, number) for rank in held))
        thaw(held)
        printed = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 1 and "checkpoint saved" not in printed, printed
        assert not any(alive(rank) for rank in held)
    assert not storage.complete(tmp_path / "run" / "checkpoints")
