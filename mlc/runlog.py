"""The run's folder and its log: `log.jsonl` is the truth; the console line, `summary.csv` and W&B are views of it."""

import atexit
import csv
import os
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlc.clock import Clock
from mlc.config import Config
from mlc.data.dataset import Batch
from mlc.data.mixing import Mix
from mlc.environment import write_environment
from mlc.flags import write_yaml
from mlc.logfile import read_log
from mlc.mirrors import Mirror, open_mirrors
from shards.console import shown
from shards.dataset import Index
from shards.files import disk_errors, whole
from shards.json_text import to_json

try:
    import resource
except ImportError:  # on Windows
    resource = None

BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


class RunLog:
    """Writes on rank 0 only; every call is free on the other ranks."""

    def __init__(self, folder: Path, config: Config, *, enabled: bool, resumed_step: int | None, steps: int = 0):
        """`steps`: of the whole run, for the progress bar on a terminal."""
        self.folder, self.enabled = folder, enabled
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._mirrors: list[Mirror] = []
        self._bar = self._task = None
        if not enabled:
            return
        if steps and self._console.is_terminal and "SLURM_JOB_ID" not in os.environ:
            self._bar = Progress(*BAR, console=self._console, transient=True)
            self._task = self._bar.add_task(folder.name, total=steps, completed=resumed_step or 0)
            atexit.register(self._bar.stop)  # or an error leaves a terminal without a cursor
        self._path = folder / "log.jsonl"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_yaml(config, folder / "args.yaml")
            write_environment(folder)
            self._file = _open_until(self._path, -1 if resumed_step is None else resumed_step)
        self._mirrors = open_mirrors(folder, config, self.say, resumed_step)

    def write(self, *, samples: list[dict[str, Any]] | None = None, **values: float) -> None:
        """One line of `log.jsonl`; `step`, `samples_seen` and `epoch` are among the values. `samples` are for views
        that can show images (see report/samples.py)."""
        if not self.enabled:
            return
        with disk_errors(self._path):
            self._file.write(to_json(values) + "\n")
        for mirror in self._mirrors:
            mirror.write(values | ({"samples": samples} if samples else {}))
        if any(name.startswith("val") for name in values):
            write_summary(self.folder)

    def say(self, text: str) -> None:
        """A line for people, from rank 0."""
        if self.enabled:
            self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, completed=step)

    def close(self, **final: float) -> None:
        """`final`: what the run came to, for the summaries elsewhere."""
        if self._bar:
            self._bar.stop()
        if self.enabled:
            self._file.close()
        for mirror in self._mirrors:
            mirror.close(final)


def _open_until(path: Path, step: int) -> TextIO:
    """For appending, without what was logged after the step that is resumed from: it is about to happen again."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    with whole(path) as building:
        building.write_text("".join(to_json(line) + "\n" for line in kept))
    return path.open("a", buffering=1)


def write_summary(folder: Path) -> None:
    """`summary.csv`: one row per evaluation, with the last training values before it."""
    rows, latest = [], {}
    for line in read_log(folder / "log.jsonl"):
        if any(name.startswith("val") for name in line):
            rows.append({**line, **{name: value for name, value in latest.items() if name.startswith("train/")}})
        else:
            latest = line
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole(folder / "summary.csv") as building, building.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the GPU, or resident on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30  # now; it keeps no peak
    if resource is None:
        import psutil  # which comes with accelerate

        used = psutil.Process().memory_info()
        return getattr(used, "peak_wset", used.rss) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class SampleLog:
    """`--log-samples`: which images, seen how, made each step; one JSON line per step on rank 0."""

    def __init__(self, path: Path, indexes: Sequence[Index], accelerator: Accelerator, *, resumed_step: int):
        """`indexes`: one for each data set, as `source` of a batch counts them."""
        self._indexes, self._accelerator, self._rows = indexes, accelerator, []
        self._file = None
        if accelerator.is_main_process:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _open_until(path, resumed_step)

    def add(self, batch: Batch, mix: Mix | None) -> None:
        """Takes one micro-batch: position, data set, row, crc32 of the augmented uint8 image, how it is mixed, of which
        positions, and its own share of that."""
        position = batch["position"].tolist()
        crcs = [zlib.crc32(np.ascontiguousarray(sample)) for sample in _seen(batch)]
        mixed = [(None, [], 1.0)] * len(position) if mix is None else mix.described()
        mixed = [(how, [position[place] for place in places], share) for how, places, share in mixed]
        columns = (batch[name].tolist() for name in ("source", "row"))
        self._rows += zip(position, *columns, crcs, mixed, strict=True)

    def write(self, step: int) -> None:
        rows = sorted(gather_object(self._rows))
        self._rows = []
        if self._file:
            keys = {position: self._indexes[source].key(row) for position, source, row, _, _ in rows}
            names = [[keys[position] for position in positions] for *_, (_, positions, _) in rows]
            sources = {"data": [row[1] for row in rows]} if len(self._indexes) > 1 else {}
            line = {
                "step": step,
                "first_position": rows[0][0],
                **sources,
                "keys": list(keys.values()),
                "crc32": [row[-2] for row in rows],
                "mix": [row[-1][0] for row in rows],
                "partner": [None if not found else found[0] if len(found) == 1 else found for found in names],
                "lambda": [round(row[-1][2], 7) for row in rows],
            }
            with disk_errors(Path(self._file.name)):
                self._file.write(to_json(line) + "\n")


def _seen(batch: Batch) -> Iterable[np.ndarray]:
    """Each sample's augmented pixels, its features, or its tokens without padding where no image is looked at."""
    for name in ("image", "features"):
        if name in batch:
            return batch[name].cpu().numpy()
    rows = zip(batch["tokens"].cpu().numpy(), batch["token_mask"].cpu().numpy(), strict=True)
    return [tokens[mask] for tokens, mask in rows]


# ---- lines for people ------------------------------------------------------------------------------------------------


def training_line(line: dict[str, float], clock: Clock) -> str:
    seen = line["samples_seen"]
    left = (clock.total - seen) / line["train/img_per_sec"]
    parts = (
        f"step {line['step']}/{line['step'] + clock.steps_left(seen)} ({seen / clock.total:4.0%})",
        f"epoch {line['epoch']:.2f}",
        f"loss {line['train/loss']:.4f}",
        f"lr {line['train/lr']:.2e}",
        f"grad {line['train/grad_norm']:.2f}",
        f"{line['train/img_per_sec']:.0f} img/s",
        f"wait {line['data/wait_frac']:.0%}",
        f"mem {line['sys/mem_gb']:.1f} GB",
        f"left {duration(left)}",
    )
    return "  ".join(parts)


def evaluation_line(step: int, name: str, result: dict[str, float]) -> str:
    """`name` is `val` or `val_ema`."""
    number = {metric: shown(value) for metric, value in result.items()}
    tuned = f"tuned {number['f1_samples@tuned']} at {shown(result['threshold'], '.2f')}"
    parts = (
        f"step {step}  {name}: loss {number['loss']}",
        f"mAP {number['map']}",
        f"F1 samples {number['f1_samples']} ({tuned})",
        f"micro {number['f1_micro']}",
        f"macro {number['f1_macro']}",
    )
    return "  ".join(parts)
