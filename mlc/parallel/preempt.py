"""One flag that says stop: a signal, Ctrl-C, a file `STOP` in the run's folder, the end of a Slurm allocation, or that
of the launcher.

A signal reaches one process, and not all at the same step; so each process only offers its flag to the all-reduce that
the step does anyway, and all of them act on the sum, at the same step.
"""

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from shards.console import UserError

LOOK = 1.0  # seconds between two looks for the launcher
_WATCH = "launcher"
_SHELLS = ("bash", "csh", "dash", "fish", "ksh", "sh", "tcsh", "zsh")
BEFORE_END = 300.0  # seconds: a last step and a checkpoint, with room for a slow disk


class StopFlag:
    """Raised once, never lowered.

    A `STOP` that is there at the start is of an earlier stop and is deleted, unless MLC_KEEP_STOP says that who started
    this process has done that already: slurm/train.sbatch, whose signal may come while Python is still importing.
    """

    def __init__(self, run: Path, *, watches_file: bool):
        self._file = run / "STOP" if watches_file else None
        self._looked, self._interrupts = 0.0, 0
        self._end = allocation_end()
        self.raised = False
        if self._file and not os.environ.get("MLC_KEEP_STOP"):
            self._file.unlink(missing_ok=True)
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number, frame):
        # A launcher passes the first Ctrl-C on as SIGINT and makes a SIGTERM of the second.
        if self._interrupts and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the third does not even wait for Python
            raise KeyboardInterrupt
        self._interrupts += number == signal.SIGINT
        self.raised = True

    def check(self) -> bool:
        """Whether this process wants to stop; looks at the file and the clock at most once a second."""
        now = time.monotonic()
        if not self.raised and now - self._looked > 1:
            self._looked = now
            self.raised = time.time() >= self._end or (self._file is not None and self._file.exists())
        return self.raised

    def clear(self) -> None:
        """For a run that reached its end: no `STOP` in its folder says that there is more to do."""
        if self._file:
            self._file.unlink(missing_ok=True)


def allocation_end() -> float:
    """Unix time at which to stop: MLC_STOP_BEFORE_END seconds before SLURM_JOB_END_TIME; infinity outside of Slurm.

    Of a short allocation at least three quarters of what is left are used.
    """
    end, before = _seconds("SLURM_JOB_END_TIME", 0.0), _seconds("MLC_STOP_BEFORE_END", BEFORE_END)
    if not end:
        return math.inf
    return end - min(before, max(0.0, end - time.time()) / 4)


def _seconds(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name) or default)
    except ValueError:
        raise UserError(f"{name}={os.environ[name]} is not a number of seconds") from None


def stop_with_launcher() -> None:
    """When the launcher that started this process is killed, it gets the SIGTERM that a launcher sends otherwise: it
    saves and stops, or ends where there is nothing to save. Without that it would go on unseen, beside those that the
    next launch starts."""
    parent = os.getppid()
    if _is_launcher(parent) and _WATCH not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=_watch, args=[parent], name=_WATCH, daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK)
    with suppress(OSError):  # the terminal may have gone with it
        print(f"[rank {os.environ.get('RANK', 0)}] the launcher has gone: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(parent: int) -> bool:
    """And not a shell, which a program may outlive (`nohup`), even one of several that were started by hand."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        return _of_process(parent, "comm").strip() not in _SHELLS
    return "accelerate" in _of_process(parent, "cmdline")  # a process that it starts alone is told of no world


def _of_process(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
