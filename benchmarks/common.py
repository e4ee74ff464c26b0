"""What every benchmark script shares, so that their numbers can be believed in the same way.

Candidates take turns, round after round, because a machine's speed drifts by more than they differ; the median of the
rounds is reported with its spread, and the versions of everything that was measured stand beside it.
"""

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from shards.json_text import to_json


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options all scripts have; the first paragraph of `description` is the help."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds on less data, under a minute: does it run?")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of every candidate (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single measurement to FILE")
    return parser


def interleaved(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The measurements of each candidate, one a round; all have their turn in every round, backwards in every other."""
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in list(candidates)[:: -1 if turn % 2 else 1]:
            values[name].append(candidates[name]())
    return values


def rounds_said(rounds: int) -> str:
    return f"median of {rounds} interleaved rounds" if rounds > 1 else "one round"


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(values) - min(values)) / median(values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also readable as it is: the first column flush left, the others flush right."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if c == 0 else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def machine() -> str:
    """Processor, cores this process may use, Python."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, Python {platform.python_version()}"


def versions(*packages: str) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path | None, **content) -> None:
    """`content` may hold paths, as `vars(options)` does."""
    if path is not None:
        path.write_text(to_json({"machine": machine()} | content, indent=2, default=str) + "\n")
