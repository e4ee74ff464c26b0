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
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.console import UserError

AVERAGES = ("samples", "micro", "macro")
SWEEPS = 50  # a bound on something that ends by itself
SAMPLED = 1 << 20  # scores looked at to guess how low a search must go
CHUNK = 1 << 18  # elements handled at a time, so that what is computed of them stays in the cache
EPSILON = 1e-12  # gains below are rounding


@dataclass(frozen=True)
class Metric:
    """F-beta over samples, micro (pooled) or macro (classes); `name` is written f1_samples, f2_micro, f0.5_macro.

    `zero_division`, 0 or 1, is what a unit counts that has neither true nor predicted labels.
    """

    beta: float = 1.0
    average: str = "samples"
    zero_division: float = 0.0

    @property
    def name(self) -> str:
        return f"f{self.beta:g}_{self.average}"

    @property
    def described(self) -> dict[str, Any]:
        """Its part of a `thresholds.json`; `of_rule` reads it."""
        return {"metric": self.name} | ({"zero_division": 1} if self.zero_division else {})

    @classmethod
    def of_rule(cls, rule: Mapping[str, Any]) -> "Metric":
        """What the content of a `thresholds.json` was tuned for; F1 over samples where it says nothing."""
        return cls.of(rule.get("metric") or cls().name, rule.get("zero_division", 0))

    @classmethod
    def of(cls, name: str, zero_division: float = 0.0) -> "Metric":
        """Raises UserError for a name that is none."""
        found = re.fullmatch(rf"f(\d+(?:\.\d+)?)_({'|'.join(AVERAGES)})", name)
        if not found or not float(found[1]):
            raise UserError(f"{name!r} is no metric; write f1_samples, f2_samples, f1_micro, f0.5_macro or the like")
        return cls(float(found[1]), found[2], zero_division)

    def unit(self, row: NDArray, column: NDArray) -> NDArray[np.intp]:
        """The unit of each entry of a matrix, given its place."""
        if self.average == "micro":
            return np.zeros_like(row)
        return row if self.average == "samples" else column


def best_thresholds(
    scores: NDArray,
    target: NDArray,
    metric: Metric,
    blocks: Sequence[slice | Sequence[int]] = (slice(None),),
    start: float | None = None,
) -> tuple[list[float], float]:
    """(a threshold for each block, the metric's value), by the rule `score > threshold`.

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
            row, column = places(scores, slice(None), lambda own: own > start)
            self.add(metric.unit(row, column), target[row, column], 1)

    def add(self, unit: NDArray[np.intp], hit: NDArray[np.bool_], times: float) -> None:
        """Predicts entries, -1 times to take them back. Of these types, or `np.add.at` takes thirty times as long."""
        np.add.at(self.chosen, unit, float(times))
        np.add.at(self.hits, unit[hit], float(times))

    def plus(self, hits: NDArray, chosen: NDArray) -> "Counts":
        """With more of them, [U] each."""
        more = copy(self)
        more.hits, more.chosen = self.hits + hits, self.chosen + chosen
        return more

    def value(self) -> float:
        return float(self.fbeta(self.hits, self.chosen + self.weight).mean())

    def fbeta(self, hits: NDArray, whole: NDArray) -> NDArray:
        """(1 + b^2) hits / whole, whole = predictions + b^2 true labels; `zero_division` of nothing."""
        value = (1 + self.metric.beta**2) * hits / np.maximum(whole, EPSILON)
        return value + (whole == 0) if self.metric.zero_division else value


def per_unit(mask: NDArray, metric: Metric) -> NDArray[np.float64]:
    """[U]: how many entries of a bool [N, C] each unit has."""
    if metric.average == "micro":
        return np.array([mask.sum()], np.float64)
    return mask.sum(1 if metric.average == "samples" else 0, dtype=np.float64)


class Entries:
    """Some scores in falling order: `unit` and `hit` of each, and what its unit has among those before it."""

    def __init__(self, scores: NDArray, unit: NDArray[np.intp], hit: NDArray[np.bool_]):
        order = np.argsort(scores)[::-1]
        self.scores, self.unit, self.hit = scores[order], unit[order], hit[order]
        # (unit, place) packed into one number sorts several times as fast as a stable argsort of the units
        by_unit = np.sort(self.unit << 32 | np.arange(unit.size)) & 0xFFFFFFFF
        units, hits = self.unit[by_unit], self.hit[by_unit]
        first = np.flatnonzero(np.append(True, units[1:] != units[:-1])[: units.size])
        length = np.diff(np.append(first, units.size))
        self.before = np.empty(units.size, np.int32)
        self.before[by_unit] = np.arange(units.size) - np.repeat(first, length)
        found = np.cumsum(hits) - hits
        self.found = np.empty(units.size, np.int32)
        self.found[by_unit] = found - np.repeat(found[first], length)

    def extend(self, lower: "Entries") -> None:
        """With others, whose scores are all below these."""
        units = 1 + max(self.unit.max(initial=0), lower.unit.max(initial=0))
        lower.before += np.bincount(self.unit, minlength=units)[lower.unit].astype(np.int32)
        lower.found += np.bincount(self.unit[self.hit], minlength=units)[lower.unit].astype(np.int32)
        for name, values in vars(lower).items():
            setattr(self, name, np.concatenate([getattr(self, name), values]))

    def gains(self, counts: Counts) -> NDArray[np.float64]:
        """[K + 1]: what the first k of them add to the mean, where `counts` has none of them; read at `ends`."""
        gains = np.zeros(len(self.unit) + 1)
        for first in range(0, len(self.unit), CHUNK):
            part = slice(first, first + CHUNK)
            unit = self.unit[part]
            hits = counts.hits[unit] + self.found[part]
            whole = counts.chosen[unit] + counts.weight[unit] + self.before[part]
            gains[1:][part] = counts.fbeta(hits + self.hit[part], whole + 1) - counts.fbeta(hits, whole)
        np.cumsum(gains, out=gains)
        gains /= len(counts.weight)
        return gains

    def ends(self) -> NDArray[np.int64]:
        """How many may be predicted to be best: none, or down to a true label and the scores equal to its own, for
        wrong ones add nothing."""
        found = self.scores.size - np.searchsorted(self.scores[::-1], self.scores[self.hit])
        return np.append(0, found[np.diff(found, prepend=0) > 0])

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
        true = places(target, columns, lambda own: own)
        self._true_scores, self._true_units = scores[true], metric.unit(*true)
        self.entries = Entries(scores[:0, 0], np.empty(0, np.intp), np.empty(0, bool))
        self._floor = np.inf
        self._keep(int(2 * (1 + metric.beta**2) * len(true[0])) + 256)

    @property
    def end(self) -> int:
        return self.entries.above(self._start) if self._moved_to is None else self._moved_to

    @property
    def threshold(self) -> float:
        if self._moved_to is None and np.isfinite(self._start):
            return self._start
        end = self._moved_to or 0  # without a start and not moved: to predict nothing is best
        below = self._highest_left() if end == self.entries.scores.size else -np.inf
        return self.entries.between(end, below)

    def improve(self, counts: Counts) -> bool:
        """Moves to the best threshold there is while the other blocks keep theirs; whether that was any better."""
        end = self.end
        self._count(counts, end, -1)
        while True:
            gains = self.entries.gains(counts)
            best = self._best(gains)
            if self._complete or gains[-1] + self._still_possible(counts) <= gains[best] + EPSILON:
                break
            self._keep(self._kept * 3 // 2)
        moved = bool(gains[best] > gains[end] + EPSILON)
        if moved:
            self._moved_to = end = best
        self._count(counts, end, 1)
        return moved

    def best_sum(self, per_hit: float, per_entry: float) -> int:
        """The number of entries with the highest sum of per_hit for each true one and per_entry < 0 for each."""
        while True:
            sums = np.append(0.0, np.cumsum(per_hit * self.entries.hit + per_entry))
            best = self._best(sums)
            missing = self._missing[1].sum()
            if self._complete or sums[-1] + missing * (per_hit + per_entry) <= sums[best] + EPSILON:
                return best
            self._keep(self._kept * 3 // 2)

    def move(self, counts: Counts, end: int) -> None:
        self._count(counts, self.end, -1)
        self._count(counts, end, 1)
        self._moved_to = end

    def _best(self, values: NDArray) -> int:
        return int(self._ends[np.argmax(values[self._ends])])

    def _count(self, counts: Counts, end: int, times: int) -> None:
        counts.add(self.entries.unit[:end], self.entries.hit[:end], times)

    def _still_possible(self, counts: Counts) -> float:
        """What the mean gains at most below the lowest entry: every missing true label, and not one wrong."""
        unit, missing = self._missing
        self._count(counts, self.entries.unit.size, 1)
        hits, whole = counts.hits[unit], counts.chosen[unit] + counts.weight[unit]
        self._count(counts, self.entries.unit.size, -1)
        gain = counts.fbeta(hits + missing, whole + missing) - counts.fbeta(hits, whole)
        return float(gain.sum() / len(counts.weight))

    def _keep(self, count: int) -> None:
        """Sorts at least about `count` of the highest scores, and all that are above `start`."""
        self._kept, ceiling = count, self._floor
        self._floor = floor = min(_floor(self._scores, self._columns, count), self._start, ceiling)
        self._complete = floor == -np.inf
        place = places(self._scores, self._columns, lambda own: (own > floor) & (own <= ceiling))
        self.entries.extend(Entries(self._scores[place], self._metric.unit(*place), self._target[place]))
        self._ends = self.entries.ends()
        self._missing = np.unique(self._true_units[self._true_scores <= floor], return_counts=True)

    def _highest_left(self) -> float:
        parts = chunks(self._scores, self._columns)
        return max((float(own.max(where=own <= self._floor, initial=-np.inf)) for _, own in parts), default=-np.inf)


def places(
    matrix: NDArray, columns: slice | Sequence[int], chosen: Callable[[NDArray], NDArray]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(row, column) of some entries of the columns, where `chosen` of a part of them is true."""
    numbers = np.arange(matrix.shape[1])[columns]
    rows, found = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for first, own in chunks(matrix, columns):
        row, column = np.divmod(np.flatnonzero(chosen(own)), len(numbers))
        rows.append(first + row)
        found.append(numbers[column])
    return np.concatenate(rows), np.concatenate(found)


def chunks(matrix: NDArray, columns: slice | Sequence[int]) -> Iterator[tuple[int, NDArray]]:
    """(first row, the columns in some rows), from top to bottom."""
    step = max(1, CHUNK // max(1, matrix[:1, columns].size))
    for first in range(0, len(matrix), step):
        yield first, matrix[first : first + step, columns]


def _floor(scores: NDArray, columns: slice | Sequence[int], count: int) -> float:
    """A score of the columns that about `count` others are above; -inf where that is nearly all of them."""
    numbers = np.arange(scores.shape[1])[columns]
    size = len(scores) * len(numbers)
    if count >= size / 2:
        return -np.inf
    if size <= SAMPLED:
        own = scores[:, columns].reshape(-1)
    else:  # the seed is of no account: the result does not depend on where a search begins
        rng = np.random.default_rng(0)
        own = scores[rng.integers(0, len(scores), SAMPLED), rng.choice(numbers, SAMPLED)]
    place = max(own.size - 1 - count * own.size // size, 0)
    return float(np.partition(own, place)[place])


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
