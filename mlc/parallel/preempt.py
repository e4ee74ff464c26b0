"""One flag that says stop: a signal, Ctrl-C or a file `STOP` in the run's folder.

A signal reaches one process, and not all at the same step; so each process only offers its flag to the all-reduce that
the step does anyway, and all of them act on the sum, at the same step.
"""

import signal
import time
from pathlib import Path


class StopFlag:
    def __init__(self, run: Path, *, watches_file: bool):
        self._file = run / "STOP" if watches_file else None
        self._looked = 0.0
        self.raised = False
        if self._file:
            self._file.unlink(missing_ok=True)  # one of an earlier stop
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if number == signal.SIGINT and self.raised:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        self.raised = True

    def check(self) -> bool:
        """Whether this process wants to stop; looks for the file at most once a second."""
        if self._file and not self.raised and time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            self.raised = self._file.exists()
        return self.raised
