"""The run's folder and its log: `log.jsonl` is the truth; the console line, `summary.csv` and W&B are views of it."""

import csv
import json
import os
import secrets
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from mlc.config import Config, write_yaml


class RunLog:
    """Writes on rank 0 only; every call is free on the other ranks."""

    def __init__(self, folder: Path, config: Config, *, enabled: bool, resumed_step: int | None):
        self.folder, self.enabled = folder, enabled
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._wandb = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "args.yaml")
        self._path = folder / "log.jsonl"
        self._keep_until(-1 if resumed_step is None else resumed_step)
        self._file = self._path.open("a", buffering=1)
        if config.log_wandb:
            self._wandb = open_wandb(folder, config)

    def _keep_until(self, step: int) -> None:
        """Drops what was logged after the step that is resumed from: it is about to happen again."""
        kept = [line for line in read_log(self._path) if line["step"] <= step]
        building = self._path.with_suffix(".tmp")
        building.write_text("".join(json.dumps(line) + "\n" for line in kept))
        building.replace(self._path)

    def write(self, **values: float) -> None:
        """One line of `log.jsonl`; `step`, `samples_seen` and `epoch` are among the values."""
        if not self.enabled:
            return
        self._file.write(json.dumps(values) + "\n")
        if self._wandb:
            self._wandb.log(values)
        if any(name.startswith("val") for name in values):
            write_summary(self.folder)

    def say(self, text: str) -> None:
        """A line for people, from rank 0."""
        if self.enabled:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
        if self._wandb:
            self._wandb.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line cut by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def write_summary(folder: Path) -> None:
    """`summary.csv`: one row per evaluation, with the last training values before it."""
    rows, latest = [], {}
    for line in read_log(folder / "log.jsonl"):
        if any(name.startswith("val") for name in line):
            rows.append({**line, **{name: value for name, value in latest.items() if name.startswith("train/")}})
        else:
            latest = line
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def open_wandb(folder: Path, config: Config):
    """The run at Weights & Biases: one run for one folder, also after a resume (its id lies in the folder)."""
    import wandb

    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    run = wandb.init(project=config.wandb_project, name=folder.name, id=file.read_text().strip(), resume="allow",
                     dir=str(folder), config=vars(config))
    run.define_metric("*", step_metric="step")
    return run


class Meter:
    """Rates of the training steps since the last line of the log; evaluations and checkpoints do not count."""

    def __init__(self):
        self._begin, self._samples = time.perf_counter(), 0

    def add(self, samples: int) -> None:
        self._samples += samples

    @contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def take(self) -> tuple[float, float]:
        """(samples per second, seconds) since the last call."""
        now = time.perf_counter()
        seconds, samples = max(now - self._begin, 1e-9), self._samples
        self._begin, self._samples = now, 0
        return samples / seconds, seconds


def duration(seconds: float) -> str:
    """`1h04m`, `3m20s`, `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def memory_gb(device) -> float:
    """Peak memory of this process: on the GPU, or resident on a CPU; GiB."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30 / (1024 if os.uname().sysname == "Darwin" else 1)
