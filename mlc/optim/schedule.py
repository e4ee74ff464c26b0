"""The learning rate is a pure function of the samples seen, so there is no scheduler object to prepare, save, restore
or get out of step: a run resumed at another world size or batch size reads the same curve at the same place.

Durations come in the unit the user thinks in (epochs, steps, samples) and are turned into samples once, here.
"""

import math
import re
from collections.abc import Sequence

from shards.console import UserError

SCHEDULES = ("cosine", "linear", "step", "multistep", "onecycle", "constant")
_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ep|st|ex|%)?")


def parse_duration(text: str | int | float, *, epoch_samples: int, global_batch: int, total: int | None = None) -> int:
    """Samples in `1ep`, `0.5ep`, `500st` or `10000ex`; a plain number is epochs, as in timm's `*_epochs` flags.

    With `total`, the samples of the run, also `20%` of it. Epochs and shares are rounded to the nearest sample; steps
    and samples must be whole. UserError for anything else.
    """
    match = _DURATION.fullmatch(str(text).strip())
    if match is None or (match[2] == "%" and total is None):
        share = ", a share of the run as 20%" if total is not None else ""
        raise UserError(
            f"{str(text)!r} is no duration: write epochs as 1ep, 0.5ep or 1, steps as 500st, samples as 10000ex{share}"
        )
    number, unit = float(match[1]), match[2] or "ep"
    if unit in ("st", "ex") and not number.is_integer():
        raise UserError(f"{str(text)!r} is no duration: {'steps' if unit == 'st' else 'samples'} must be whole")
    return round(number * {"ep": epoch_samples, "st": global_batch, "ex": 1, "%": (total or 0) / 100}[unit])


def parse_minutes(text: str) -> float | None:
    """The number in `10min` or `0.5min`, above 0; None for a duration in any other unit."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)min", str(text).strip())
    return float(match[1]) or None if match else None


def lr_at(
    samples: int,
    *,
    base_lr: float,
    total: int,
    warmup: int = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    sched: str = "cosine",
    decay_every: int = 0,
    decay_at: Sequence[int] = (),
    decay_rate: float = 0.1,
) -> float:
    """Learning rate after `samples` samples; total, warmup, decay_every and decay_at are in samples too.

    Below `warmup` a line from warmup_lr to base_lr, whatever the schedule but onecycle. Then
    cosine: half a wave from base_lr at `warmup` to min_lr at `total` (timm's cosine with `warmup_prefix`; Loshchilov
        and Hutter 2017, "SGDR", one cycle), min_lr afterwards;
    onecycle: the same, and half a wave instead of the line before (torch's OneCycleLR with two phases; Smith and Topin
        2018, "Super-Convergence");
    linear: a line in place of that wave;
    step: base_lr * decay_rate ^ (samples // decay_every), counted from sample 0 and never below min_lr;
    multistep: base_lr * decay_rate ^ (how many of decay_at are reached), never below min_lr;
    constant: base_lr.
    UserError for an unknown schedule, or for step and multistep without moments to cut at.
    """
    if sched not in SCHEDULES:
        raise UserError(f"unknown schedule {sched!r}: choose one of {', '.join(SCHEDULES)}")
    if sched == "step" and decay_every <= 0:
        raise UserError("the step schedule needs to know how often the rate drops: a duration above 0")
    if sched == "multistep" and not decay_at:
        raise UserError("the multistep schedule needs to know when the rate drops: --decay-at 7ep --decay-at 9ep")
    if samples < warmup:
        share = samples / warmup
        return warmup_lr + (base_lr - warmup_lr) * (1 - _wave(share) if sched == "onecycle" else share)
    done = min(1.0, (samples - warmup) / max(1, total - warmup))
    if sched in ("cosine", "onecycle"):
        return min_lr + (base_lr - min_lr) * _wave(done)
    if sched == "linear":
        return min_lr + (base_lr - min_lr) * (1 - done)
    if sched == "step":
        return max(min_lr, base_lr * decay_rate ** (samples // decay_every))
    if sched == "multistep":
        return max(min_lr, base_lr * decay_rate ** sum(samples >= moment for moment in decay_at))
    return base_lr


def _wave(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * share)) / 2
