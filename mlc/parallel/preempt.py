"""One flag that says stop: a signal, Ctrl-C, a file `STOP` in the run's folder, or the end of a Slurm allocation.

A signal reaches one process, and not all at the same step; so each process only offers its flag to the all-reduce that
the step does anyway, and all of them act on the sum, at the same step.
"""

import math
import os
import signal
import time
from pathlib import Path

from shards.console import UserError

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
