"""What every verb shares when it talks to a person: one-line errors, strict arguments, progress quiet in logs.

A mistake of the user's ends as one line on stderr and exit code 2; a traceback means a defect of ours.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class UserError(Exception):
    """Something outside the program is wrong: the text says what, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """argparse that accepts `--a_b` for `--a-b`, takes no abbreviations, and suggests a name for a typo."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([_dashed(arg) for arg in (sys.argv[1:] if args is None else args)], namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0].split('=')[0], flags)}")
        return parsed

    def error(self, message):
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def _dashed(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def finite(text: str) -> float:
    """For a flag's `type`: a number that is finite. Of NaN every comparison is false, so no range would stop it."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """`; did you mean --epochs?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def listed(problems: Sequence[str], limit: int = 20) -> str:
    """The first `limit` problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)


def few(names: Sequence[str], limit: int = 12) -> str:
    """The first `limit` names in one line, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shown(value: float | None, form: str = ".4f") -> str:
    """A number for people; - for what has no value: nothing was measured, or nothing could be."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 sample`, `2,000 samples`; with `nouns` for a noun whose plural is more than an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def run(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs a verb; a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130."""
    with suppress(AttributeError):  # somebody's own stream
        sys.stdout.reconfigure(line_buffering=True)  # what was said is in the log of a job that is killed
    try:
        return main(argv) or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")  # several processes of one run often find the same mistake
        print("" if rank == "0" else f"[rank {rank}] ", f"error: {error}", sep="", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mlc stats ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def say(*words) -> None:
    """A line for a person, on stderr, so that stdout stays clean for --json."""
    print(*words, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, *, enabled: bool = True):
    """Yields `advance(n=1)`. A bar on a terminal; nothing under Slurm, in a pipe or a log file."""
    quiet = not enabled or not sys.stderr.isatty() or "SLURM_JOB_ID" in os.environ
    if quiet:
        yield lambda n=1: None
        return
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n=1: bar.advance(task, n)
