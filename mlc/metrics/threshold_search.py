"""The best thresholds out of all there are. A grid makes the tuned number depend on its spacing, and a scan over every
pair of rows and classes takes hours; falling scores, each of which changes its row's F-beta by a known amount, take
seconds: summed from the highest score down they give the metric at every threshold.

A metric is a mean of F-beta over *units*: an image's row, a class's column, or everything as one. A *block* is the set
of columns that share a threshold: all, a group's, one. The search for one block's threshold while the others stand
still is exact whatever the units are. So is the search for all of them where a unit meets one block only (one global
threshold; the macro mean), and by Dinkelbach's method for the micro mean. Only the mean over samples with several
blocks has no exact method that is fast: there the blocks take turns (coordinate ascent) from the best global threshold
on, and end where no single threshold can be improved.
"""

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.console import UserError

AVERAGES = ("samples", "micro", "macro")
SWEEPS = 50  # a bound on something that ends by itself
SAMPLED = 1 << 20  # scores looked at to guess how low a search must go
EPSILON = 1e-12  # gains below are rounding


@dataclass(frozen=True)
class Metric:
    """F-beta over samples, micro (pooled) or macro (classes); `name` is written f1_samples, f2_micro, f0.5_macro."""

    beta: float = 1.0
    average: str = "samples"

    @property
    def name(self) -> str:
        return f"f{self.beta:g}_{self.average}"

    @classmethod
    def of(cls, name: str) -> "Metric":
        """Raises UserError for a name that is none."""
        found = re.fullmatch(rf"f(\d+(?:\.\d+)?)_({'|'.join(AVERAGES)})", name)
        if not found or not float(found[1]):
            raise UserError(f"{name!r} is no metric; write f1_samples, f2_samples, f1_micro, f0.5_macro or the like")
        return cls(float(found[1]), found[2])


def best_thresholds(
    scores: NDArray,
    target: NDArray,
    metric: Metric,
    blocks: Sequence[slice | Sequence[int]] = (slice(None),),
    start: float | None = None,
) -> tuple[list[float], float]:
    """(a threshold for each block, the metric's value), by the rule `score > threshold`; F-beta of nothing is 0.

    scores floating [N, C], target bool [N, C]; blocks are disjoint columns of any number. Columns in no block, and
    blocks to begin with, are predicted above `start` (none of them: nothing is); a block leaves `start` only for
    something better. A threshold lies midway between its two neighbouring scores (for the lowest score: between it and
    0). See above for what is exact.
    """
    assert scores.shape == target.shape, f"scores {scores.shape} and target {target.shape} differ in shape"
    counts = Counts(scores, target, metric, start)
    searched = [Block(scores, target, metric, columns, start) for columns in blocks]
    if metric.average == "micro" and len(searched) > 1:
        _dinkelbach(searched, counts)
    else:
        for _ in range(SWEEPS):
            moved = [block.improve(counts) for block in searched]  # a list: each of them must have its turn
            if not any(moved) or len(searched) == 1 or metric.average == "macro":
                break
    return [block.threshold for block in searched], counts.value()


class Counts:
    """What is predicted now: per unit, the true positives `hits` and all of the predictions `chosen`, float64 [U]."""

    def __init__(self, scores: NDArray, target: NDArray, metric: Metric, start: float | None):
        self.metric = metric
        self.weight = metric.beta**2 * per_unit(target, metric)  # [U], b^2 times the true labels
        self.hits, self.chosen = np.zeros((2, len(self.weight)))
        if start is not None:
            above = scores > start
            self.hits, self.chosen = per_unit(above & target, metric), per_unit(above, metric)

    def plus(self, hits: NDArray, chosen: NDArray) -> "Counts":
        """With more of them, [U] each."""
        more = copy(self)
        more.hits, more.chosen = self.hits + hits, self.chosen + chosen
        return more

    def value(self) -> float:
        return float(self.fbeta(self.hits, self.chosen + self.weight).mean())

    def fbeta(self, hits: NDArray, whole: NDArray) -> NDArray:
        """(1 + b^2) hits / whole, whole = predictions + b^2 true labels; 0 of nothing."""
        return (1 + self.metric.beta**2) * hits / np.maximum(whole, EPSILON)


def per_unit(mask: NDArray, metric: Metric) -> NDArray[np.float64]:
    """[U]: how many entries of a bool [N, C] each unit has."""
    if metric.average == "micro":
        return np.array([mask.sum()], np.float64)
    return mask.sum(1 if metric.average == "samples" else 0, dtype=np.float64)


class Entries:
    """Some scores in falling order: `unit` and `hit` of each, and what its unit has among those before it."""

    def __init__(self, scores: NDArray, unit: NDArray, hit: NDArray):
        order = np.argsort(scores)[::-1]
        self.scores, self.unit, self.hit = scores[order], unit[order], hit[order].astype(np.int32)
        by_unit = np.argsort(self.unit, kind="stable")
        units = self.unit[by_unit]
        first = np.flatnonzero(np.append(True, units[1:] != units[:-1])[: units.size])
        length = np.diff(np.append(first, units.size))
        self.before = np.empty(units.size, np.int32)
        self.before[by_unit] = np.arange(units.size) - np.repeat(first, length)
        found = np.cumsum(self.hit[by_unit]) - self.hit[by_unit]
        self.found = np.empty(units.size, np.int32)
        self.found[by_unit] = found - np.repeat(found[first], length)
        self.last_of_ties = np.flatnonzero(np.append(self.scores[1:] != self.scores[:-1], True)[: units.size])

    def gains(self, counts: Counts) -> NDArray[np.float64]:
        """[K + 1]: what the first k of them add to the mean, where `counts` has none of them; read at `ends`."""
        hits = counts.hits[self.unit] + self.found
        whole = counts.chosen[self.unit] + counts.weight[self.unit] + self.before
        change = counts.fbeta(hits + self.hit, whole + 1) - counts.fbeta(hits, whole)
        return np.append(0.0, np.cumsum(change) / len(counts.weight))

    @property
    def ends(self) -> NDArray:
        """How many may be predicted: none, or down to the last of equal scores."""
        return np.append(0, self.last_of_ties + 1)

    def above(self, threshold: float) -> int:
        """How many scores are above it."""
        return int(np.count_nonzero(self.scores > threshold))

    def between(self, end: int, below: float = -np.inf) -> float:
        """The threshold that predicts the first `end`; `below` is the highest score that is not among the entries."""
        if not self.scores.size:
            return 1.0
        if not end:
            top = self.scores[0]
            return float(top + max(1 - top, 0) / 2)
        lowest = self.scores[end - 1]
        if end < self.scores.size:
            below = self.scores[end]
        return between(min(lowest, lowest.dtype.type(0)) if below == -np.inf else lowest.dtype.type(below), lowest)


class Block:
    """Columns that share a threshold. Nearly all scores of a thousand classes are far below any useful threshold, so
    only the highest are sorted, and more of them when a bound says that the best might lie further down."""

    def __init__(self, scores, target, metric: Metric, columns: slice | Sequence[int], start: float | None):
        self._scores, self._target, self._columns, self._metric = scores, target, columns, metric
        self._start = np.inf if start is None else start
        self._moved_to: int | None = None  # entries predicted; None while that is for `start` to say
        self._positives = int(np.count_nonzero(self._own(target)))
        self._keep(int(4 * (1 + metric.beta**2) * self._positives) + 64)

    @property
    def end(self) -> int:
        return self.entries.above(self._start) if self._moved_to is None else self._moved_to

    @property
    def threshold(self) -> float:
        return self._start if self._moved_to is None else self.entries.between(self._moved_to, self._below)

    def improve(self, counts: Counts) -> bool:
        """Moves to the best threshold there is while the other blocks keep theirs; whether that was any better."""
        end = self.end
        self._count(counts, end, -1)
        while True:
            gains = self.entries.gains(counts)
            ends = self.entries.ends
            best = int(ends[np.argmax(gains[ends])])
            if self._complete or gains[-1] + self._still_possible(counts) <= gains[best] + EPSILON:
                break
            self._keep(4 * self._kept)
        moved = bool(gains[best] > gains[end] + EPSILON)
        if moved:
            self._moved_to = end = best
        self._count(counts, end, 1)
        return moved

    def best_sum(self, per_hit: float, per_entry: float) -> int:
        """The number of entries with the highest sum of per_hit for each true one and per_entry for each."""
        while True:
            sums = np.append(0.0, np.cumsum(per_hit * self.entries.hit + per_entry))
            ends = self.entries.ends
            best = int(ends[np.argmax(sums[ends])])
            missing = self._positives - int(self.entries.hit.sum())
            if self._complete or sums[-1] + missing * (per_hit + per_entry) <= sums[best] + EPSILON:
                return best
            self._keep(4 * self._kept)

    def move(self, counts: Counts, end: int) -> None:
        self._count(counts, self.end, -1)
        self._count(counts, end, 1)
        self._moved_to = end

    def _count(self, counts: Counts, end: int, sign: int) -> None:
        np.add.at(counts.hits, self.entries.unit[:end], sign * self.entries.hit[:end])
        np.add.at(counts.chosen, self.entries.unit[:end], sign)

    def _still_possible(self, counts: Counts) -> float:
        """What the mean gains at most below the lowest entry: every missing true label, and not one wrong."""
        unit, missing, kept, found = self._missing
        hits = counts.hits[unit] + found
        whole = counts.chosen[unit] + counts.weight[unit] + kept
        gain = counts.fbeta(hits + missing, whole + missing) - counts.fbeta(hits, whole)
        return float(gain.sum() / len(counts.weight))

    def _keep(self, count: int) -> None:
        """Sorts at least about `count` of the highest scores, and all that are above `start`."""
        scores, target = self._own(self._scores), self._own(self._target)
        self._kept = count
        mask = scores > min(_floor(scores, count), self._start)
        self._below = float(np.max(scores, where=~mask, initial=-np.inf))
        self._complete = self._below == -np.inf
        row, column = np.nonzero(mask)
        self.entries = Entries(scores[mask], self._units(row, column), target[mask])
        missing = target & ~mask
        if self._metric.average == "micro":
            self._missing = (np.zeros(1, int), *(np.array([m.sum()]) for m in (missing, mask, mask & target)))
            return
        axis = 1 if self._metric.average == "samples" else 0
        some = np.flatnonzero(missing.any(axis))
        chosen = [m[some] if axis else m[:, some] for m in (missing, mask, mask & target)]
        unit = some if axis else self._units(np.zeros_like(some), some)
        self._missing = (unit, *(m.sum(axis) for m in chosen))

    def _own(self, matrix: NDArray) -> NDArray:
        """The block's columns, copied each time: a thousand blocks must not hold a second matrix."""
        return np.ascontiguousarray(matrix[:, self._columns])

    def _units(self, row: NDArray, column: NDArray) -> NDArray:
        if self._metric.average == "samples":
            return row.astype(np.int32)
        if self._metric.average == "micro":
            return np.zeros(len(row), np.int32)
        return np.arange(self._scores.shape[1], dtype=np.int32)[self._columns][column]


def _floor(scores: NDArray, count: int) -> float:
    """A score that about `count` others are above; -inf where that is nearly all of them."""
    flat = scores.reshape(-1)
    if count >= flat.size / 2:
        return -np.inf
    if flat.size > SAMPLED:  # the seed is of no account: the result does not depend on where a search begins
        count, flat = count * SAMPLED // flat.size, flat[np.random.default_rng(0).integers(0, flat.size, SAMPLED)]
    place = max(flat.size - 1 - count, 0)
    return float(np.partition(flat, place)[place])


def _dinkelbach(blocks: Sequence[Block], counts: Counts) -> None:
    """The highest micro F-beta: a ratio of two sums over blocks is above r just where the sum over the blocks of
    numerator - r denominator, each at its own best, is above 0. Dinkelbach 1967, "On nonlinear fractional programming".
    """
    reached = counts.value()
    while True:
        before = [block.end for block in blocks]
        for block in blocks:
            end = block.best_sum(1 + counts.metric.beta**2, -reached)
            if end != block.end:
                block.move(counts, end)
        if counts.value() <= reached + EPSILON:
            break
        reached = counts.value()
    for block, end in zip(blocks, before, strict=True):
        if end != block.end:
            block.move(counts, end)


def between(low: np.floating, high: np.floating) -> float:
    """The middle, in the scores' own precision: NumPy compares float32 with a Python float as float32, where the middle
    of two neighbours rounds to one of them. The lower one still separates them, the upper one does not.
    """
    middle = low + (high - low) / 2
    if low < middle < high:
        return float(middle)
    return float(low if low < high else np.nextafter(high, high.dtype.type(-np.inf)))
