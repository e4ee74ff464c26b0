"""At least so many labels and at most so many, group by group: an artefact has one culture or two and always some tag.
Between the two bounds a threshold decides. With both equal it is plain top-k.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlc.metrics.threshold_search import EPSILON, SWEEPS, Counts, Entries, Metric, per_unit


@dataclass(frozen=True)
class Bounds:
    """The `least` likeliest labels of a group, and those above the threshold as long as they are `most` at most."""

    threshold: float
    least: int
    most: int


def decide(scores: NDArray, bounds: Bounds) -> NDArray[np.bool_]:
    """bool [N, C] of one group's scores [N, C]. Of equal scores the first comes first; a score of 0 is never chosen."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : bounds.most]
    ranked = np.take_along_axis(scores, order, 1)
    forced = np.arange(ranked.shape[1]) < bounds.least
    predicted = np.zeros(scores.shape, bool)
    np.put_along_axis(predicted, order, (forced | (ranked > bounds.threshold)) & (ranked > 0), 1)
    return predicted


def fit(
    scores: NDArray, target: NDArray, metric: Metric, groups: Mapping[str, Sequence[int]], start: Mapping[str, float]
) -> dict[str, Bounds]:
    """The bounds of each group, by coordinate ascent from the thresholds `start` without bounds.

    In turn each group gets its best least, then its best most, each with the very best threshold for it (exact, by
    sorting), while the other groups stand still; until nothing gets better. `most` is at most (1 + beta^2) times the
    number of labels that some image has.
    """
    parts = {name: _Group(scores, target, metric, columns) for name, columns in groups.items()}
    found = {name: Bounds(start[name], 0, part.deepest) for name, part in parts.items()}
    counts = Counts(scores, target, metric, None)
    for name, part in parts.items():
        part.count(counts, found[name], 1)
    for _ in range(SWEEPS):
        before = counts.value()
        for name, part in parts.items():
            part.count(counts, found[name], -1)
            found[name] = part.best(counts, found[name])
            part.count(counts, found[name], 1)
        if len(parts) == 1 or counts.value() <= before + EPSILON:
            break
    return found


class _Group:
    """The likeliest labels of each row among some columns: scores, hits and units [N, K], by falling score."""

    def __init__(self, scores: NDArray, target: NDArray, metric: Metric, columns: Sequence[int]):
        columns = np.asarray(columns)
        self._scores, self._target, self._metric = scores[:, columns], target[:, columns], metric
        self._columns = columns
        # a bound on the search: more wrong labels than that are worth it to no image, the richest included
        deepest = math.ceil((1 + metric.beta**2) * int(self._target.sum(1).max(initial=0)))
        self.deepest = min(max(1, deepest), len(columns))
        order = np.argsort(-self._scores, axis=1, kind="stable")[:, : self.deepest]
        self._ranked = np.take_along_axis(self._scores, order, 1)
        self._hits = np.take_along_axis(self._target, order, 1)
        units = {"samples": np.arange(len(scores))[:, None] + 0 * order, "macro": columns[order], "micro": 0 * order}
        self._units = units[metric.average]

    def count(self, counts: Counts, bounds: Bounds, sign: int) -> None:
        """Adds what the bounds predict to `counts`, or takes it away."""
        predicted = decide(self._scores, bounds)
        where = self._columns if self._metric.average == "macro" else slice(None)
        counts.hits[where] += sign * per_unit(predicted & self._target, self._metric)
        counts.chosen[where] += sign * per_unit(predicted, self._metric)

    def best(self, counts: Counts, bounds: Bounds) -> Bounds:
        """The best bounds that moving one of the two, and then the other, leads to."""
        value, best = self._search(counts, bounds.least, bounds.most)
        for _ in range(SWEEPS):
            tried = [self._search(counts, least, best.most) for least in range(best.most + 1)]
            lower = max(tried, key=lambda found: found[0])
            tried = [self._search(counts, lower[1].least, most) for most in range(lower[1].least, self.deepest + 1)]
            upper = max([lower, *tried], key=lambda found: found[0])
            if upper[0] <= value + EPSILON:
                break
            value, best = upper
        return best

    def _search(self, counts: Counts, least: int, most: int) -> tuple[float, Bounds]:
        """(what the mean gains, the best threshold between these bounds)."""
        possible = self._ranked > 0
        forced = possible[:, :least]
        own = counts.plus(*(self._per_unit(m, len(counts.weight)) for m in (forced & self._hits[:, :least], forced)))
        free = possible[:, least:most]
        entries = Entries(*(matrix[:, least:most][free] for matrix in (self._ranked, self._units, self._hits)))
        gains = entries.gains(own)
        ends = entries.ends()
        end = int(ends[np.argmax(gains[ends])])
        return own.value() + float(gains[end]), Bounds(entries.between(end), least, most)

    def _per_unit(self, mask: NDArray, units: int) -> NDArray:
        return np.bincount(self._units[:, : mask.shape[1]][mask], minlength=units)
