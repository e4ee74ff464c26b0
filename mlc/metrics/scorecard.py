"""Every number of a results table, as functions of how often each image counts. Counted once each they are the metrics;
counted as often as a bootstrap draws them they are its replicates. One formula for both, so an interval belongs to
exactly the number beside it.

Conventions are scikit-learn's, `zero_division` among them; a class without positives has no average precision and is
left out of `map`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csc_array, csr_array

from mlc.metrics.ranking import ranking

BINS = 15  # of the expected calibration error
BLOCK = 1 << 23  # weights handled at a time as float64
LOWER_IS_BETTER = ("loss", "ranking_loss", "coverage_error", "ece")
_ROWS = 256  # images a pass over the scores looks at together: with a thousand classes they stay in the cache


class Scorecard:
    """What the metrics of N images need, kept per image; `at` adds it up."""

    def __init__(
        self,
        scores: NDArray | None,
        predicted: NDArray,
        target: NDArray,
        groups: Mapping[str, Sequence[int]] | None = None,
        zero_division: float = 0.0,
    ):
        """scores: probabilities, floating [N, C]; None where there are only label sets, as in a submission, which have
        no loss, ranking or calibration. predicted, target bool [N, C]; groups {name: columns}; zero_division: what a
        precision, recall or F of nothing over nothing is."""
        assert predicted.shape == target.shape, f"predicted {predicted.shape} and target {target.shape} differ in shape"
        self._scores, self._target, self._empty = scores, target, zero_division
        self._groups = {"": range(target.shape[1])} | dict(groups or {})
        self._hits, self._chosen, self._true = (
            csr_array(mask, dtype=np.float64) for mask in (predicted & target, predicted, target)
        )
        counts = (self._hits, self._chosen, self._true)
        self._counts = {
            name: np.stack([matrix[:, list(columns)].sum(1) for matrix in counts])
            for name, columns in self._groups.items()
        }
        self._means: dict[str, NDArray] = {}
        if scores is not None:
            self._means["loss"] = cross_entropy(scores, target)
            self._means |= ranking(scores, target)
            self._bins = calibration_bins(scores, target)
        for name, (hits, chosen, true) in self._counts.items():
            for metric, values in _rates(hits, chosen, true, zero_division):
                if not name or metric.startswith("f"):
                    self._means[_named(f"{metric}_samples", name)] = values

    def __len__(self) -> int:
        return len(self._target)

    def at(self, weights: NDArray | None = None) -> dict[str, NDArray[np.float64]]:
        """{metric: values [B]} with image i counted weights[i, b] times; None: every image once, [1].

        Metrics: loss, map, precision, recall, f1 and f2 as _samples, _micro, _macro and _weighted, CP, CR, CF1, OP, OR,
        OF1, ranking_loss, coverage_error, lrap, ece; for a group map, f1 and f2, such as f1_micro/NAME, not weighted.
        """
        once = weights is None
        weights = np.ones((len(self), 1), np.uint8) if once else weights
        step = max(1, BLOCK // max(1, len(self)))
        blocks = [
            weights[:, start : start + step].astype(np.float64) for start in range(0, max(1, weights.shape[1]), step)
        ]
        parts = [self._decided(block) for block in blocks]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self._scores is None:
            return found
        precision = self._precision if once else average_precision(self._scores, self._target, weights)
        ranked = {
            _named("map", name): mean_of_present(precision[list(columns)]) for name, columns in self._groups.items()
        }
        return {"loss": found.pop("loss")} | ranked | found

    @cached_property
    def _precision(self) -> NDArray[np.float64]:
        """[C, 1]: average precision with every image once."""
        return average_precision(self._scores, self._target, np.ones((len(self), 1), np.uint8))

    def classes(self) -> dict[str, NDArray]:
        """{support, predicted, ap, precision, recall, f1}: [C] each; ap is nan without positives or scores."""
        hits, chosen, true = (np.asarray(matrix.sum(0)).ravel() for matrix in (self._hits, self._chosen, self._true))
        found = {"support": true.astype(np.int64), "predicted": chosen.astype(np.int64)}
        found["ap"] = np.full(len(true), np.nan)
        if self._scores is not None:
            found["ap"] = self._precision[:, 0]
        rates = dict(_rates(hits, chosen, true, self._empty))
        return found | {name: rates[name] for name in ("precision", "recall", "f1")}

    def _decided(self, weights: NDArray) -> dict[str, NDArray]:
        total = weights.sum(0)
        values = np.stack(list(self._means.values())) @ weights / total
        found = dict(zip(self._means, values, strict=True))
        for name, counts in self._counts.items():
            for metric, value in _rates(*(counts @ weights), self._empty):
                if not name or metric.startswith("f"):
                    found[_named(f"{metric}_micro", name)] = value
        by_class = [matrix.T @ weights for matrix in (self._hits, self._chosen, self._true)]
        for name, columns in self._groups.items():
            own = [matrix[list(columns)] for matrix in by_class]
            for metric, value in _rates(*own, self._empty):
                if not name or metric.startswith("f"):
                    found[_named(f"{metric}_macro", name)] = value.mean(0)
                if not name:
                    found[f"{metric}_weighted"] = _weighted(value, own[2])
        for letter, average in (("C", "macro"), ("O", "micro")):  # Wang et al. 2016, "CNN-RNN"
            precision, recall = found[f"precision_{average}"], found[f"recall_{average}"]
            found |= {f"{letter}P": precision, f"{letter}R": recall}
            found[f"{letter}F1"] = ratio(2 * precision * recall, precision + recall)
        if self._scores is not None:
            said, true, count = np.einsum("nkb,nw->kbw", self._bins, weights, optimize=True)
            found["ece"] = np.abs(said - true).sum(0) / count.sum(0)
        return found


def cross_entropy(scores: NDArray, target: NDArray) -> NDArray[np.float64]:
    """[N]: the mean over classes of the binary cross entropy in nats, a logarithm at least -100, as in torch."""
    found = np.empty(len(scores))
    with np.errstate(divide="ignore"):
        for start in range(0, len(scores), _ROWS):
            p, true = scores[start : start + _ROWS].astype(np.float64), target[start : start + _ROWS]
            found[start : start + _ROWS] = -np.maximum(np.log(np.where(true, p, 1 - p)), -100).mean(1)
    return found


def calibration_bins(scores: NDArray, target: NDArray) -> NDArray[np.float64]:
    """[N, 3, BINS]: of each image's classes whose probability is in a bin, the sum of probabilities, the true ones and
    how many. Bin k is [k / BINS, (k + 1) / BINS), the last with 1. Guo et al. 2017, "On Calibration"; each decision
    about an image and a class is one binary prediction."""
    found = np.empty((len(scores), 3, BINS))
    for start in range(0, len(scores), _ROWS):
        p = scores[start : start + _ROWS].astype(np.float64)
        rows = len(p)
        place = np.minimum((p * BINS).astype(np.int64), BINS - 1) + BINS * np.arange(rows)[:, None]
        for part, values in enumerate((p, target[start : start + _ROWS], np.ones_like(p))):
            summed = np.bincount(place.ravel(), values.ravel(), minlength=rows * BINS)
            found[start : start + rows, part] = summed.reshape(rows, BINS)
    return found


def average_precision(scores: NDArray, target: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """[C, B]: `multilabel.average_precision` with image i counted weights[i, b] times; nan without positives.

    weights are whole numbers, of a sum up to 2^24 for each b.
    """
    found = np.full((target.shape[1], weights.shape[1]), np.nan)
    columns = np.flatnonzero(target.any(0))
    step = max(1, 4 * BLOCK // max(1, len(target)))
    for start in range(0, weights.shape[1], step):
        some = weights[:, start : start + step].astype(np.float32)  # adds whole numbers without error, up to 2^24
        for column in columns:
            own = np.ascontiguousarray(scores[:, column])
            found[column, start : start + step] = _average_precision(own, target[:, column], some)
    return found


def _average_precision(scores: NDArray, positive: NDArray, weights: NDArray) -> NDArray:
    """Only the ranks at which a positive is found matter; the images between two of them are one sum of weights."""
    levels = np.unique(scores[positive])

    def sums(mask: NDArray) -> NDArray[np.float64]:
        """[levels, B]: of the weights of these images at or above each level, the highest level first."""
        level = len(levels) - np.searchsorted(levels, scores[mask], side="right")
        each = (np.ones(level.size, np.float32), level, np.append(0, np.cumsum(mask)))
        return np.cumsum(csc_array(each, shape=(len(levels), len(mask))) @ weights, axis=0, dtype=np.float64)

    hits, every = sums(positive), sums(scores >= levels[0])
    area = (np.diff(hits, axis=0, prepend=0) * hits / np.maximum(every, 1)).sum(0)
    return np.divide(area, hits[-1], out=np.full(weights.shape[1], np.nan), where=hits[-1] > 0)


def mean_of_present(values: NDArray) -> NDArray[np.float64]:
    """[B]: mean over the classes of [C, B] that have a value; nan where none has."""
    present = ~np.isnan(values)
    count = present.sum(0)
    return np.divide(np.nansum(values, axis=0), count, out=np.full(values.shape[1], np.nan), where=count > 0)


def ratio(part: ArrayLike, whole: ArrayLike, empty: float = 0.0) -> NDArray[np.float64]:
    """part / whole, `empty` where whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full_like(whole, empty), where=whole != 0)


def _weighted(values: NDArray, true: NDArray) -> NDArray[np.float64]:
    """[B]: mean over the classes of [C, B] by their true labels; where there are none, as of equals."""
    total = true.sum(0)
    return np.where(total > 0, ratio((values * true).sum(0), total), values.mean(0))


def _rates(hits: NDArray, chosen: NDArray, true: NDArray, empty: float) -> Iterator[tuple[str, NDArray]]:
    yield "precision", ratio(hits, chosen, empty)
    yield "recall", ratio(hits, true, empty)
    yield "f1", ratio(2 * hits, true + chosen, empty)
    yield "f2", ratio(5 * hits, 4 * true + chosen, empty)


def _named(metric: str, group: str) -> str:
    return f"{metric}/{group}" if group else metric
