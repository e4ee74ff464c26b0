"""`--profile`: where a step's time goes, from a few steps of the real run; docs/performance.md says how to read it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from shards.files import disk_errors

SKIPPED, WARMUP, RECORDED = 3, 1, 3  # steps: the first ones pay for what is made once
OPERATORS = 10


class Profiler:
    """Records steps 5, 6 and 7 of this process, counted from its start. Call `step` after each step; `close` at the
    end."""

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]):
        self._folder, self._gpu, self._say, self._written = folder / "profile", device.type == "cuda", say, False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._gpu else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def close(self) -> None:
        self._profile.stop()
        if not self._written:
            self._say(f"--profile: the run was shorter than {SKIPPED + WARMUP + RECORDED} steps; there is no profile")

    def _write(self, found: profile) -> None:
        order = "self_device_time_total" if self._gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=OPERATORS, max_name_column_width=60)
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self._folder / "trace.json.gz"))
            (self._folder / "operators.txt").write_text(table + "\n")
        self._written = True
        self._say(f"profile of {RECORDED} steps in {self._folder}: operators.txt, and trace.json.gz for a trace viewer")
