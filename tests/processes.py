"""The processes of a run that a test watches, holds and stops from outside, on a machine of any speed."""

import re
import time
from pathlib import Path

import psutil
from conftest import log_of

PATIENCE = 900.0  # seconds: says only when to give up, on a machine of any speed


def ranks(run: Path) -> list[psutil.Process]:
    """The training processes of a run that has begun, and neither their launchers nor srun."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        words = process.info["cmdline"] or [""]
        if "python" in words[0] and {str(run.parent), run.name} <= set(words):
            found.append(process)
    launchers = {process.info["ppid"] for process in found}
    return [process for process in found if process.pid not in launchers]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for_step(run: Path, step: int, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    log = run / "log.jsonl"
    while not log.exists() or max((line["step"] for line in log_of(run)), default=0) < step:
        printed = "".join(file.read_text() for file in run.parent.glob("*.out"))
        assert time.monotonic() < deadline, f"{run} has not reached step {step}\n{printed}"
        time.sleep(0.02)


def wait_until(true, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def freeze(run: Path, *, at_step: int) -> list[psutil.Process]:
    """Holds a run shortly after a step, so that what happens next happens there on a machine of any speed."""
    wait_for_step(run, at_step)
    processes = ranks(run)
    assert processes
    hold(processes)
    return processes


def hold(processes: list[psutil.Process]) -> None:
    """Returns when they stand still: a signal that comes before that is handled first."""
    for process in processes:
        process.suspend()
    wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in processes))


def thaw(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.resume()


def pending(process: psutil.Process, number: int) -> bool:
    """Whether a signal has reached a process that is held, and will be the first thing it sees."""
    mask = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask[1], 16) >> (number - 1) & 1)
