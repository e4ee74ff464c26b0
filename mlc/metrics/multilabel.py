"""Exact multi-label metrics on the whole split at once: averaging a metric over batches or ranks gives another number,
one that changes with the batch size. Plain NumPy in, plain floats out; the same code scores a run and a CSV file.

Conventions are scikit-learn's: an F1, precision or recall of nothing over nothing is `zero_division`, 0 or 1. With 0 a
label that is predicted for a sample without true labels costs nothing in the mean over samples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlc.metrics.threshold_search import Metric
from mlc.metrics.thresholds import best_global_threshold

_AXIS = {"samples": 1, "macro": 0, "micro": None}


def evaluate(
    scores: NDArray,
    target: NDArray,
    threshold: ArrayLike = 0.5,
    groups: Mapping[str, Sequence[int]] | None = None,
    zero_division: float = 0.0,
) -> Iterator[tuple[str, float]]:
    """Yields (name, value): map, f1_samples, f1_micro, f1_macro, f1_samples@tuned and the tuned `threshold`; then, for
    each group of columns, map/NAME, f1_samples/NAME, f1_micro/NAME and f1_macro/NAME.

    scores floating [N, C], target bool or 0/1 [N, C], threshold one number or [C]; a label is predicted where
    `score > threshold`. The tuned value is that of the threshold best for these very scores.
    """
    target = np.asarray(target) > 0.5
    predicted = scores > np.asarray(threshold, scores.dtype)
    precision = average_precision(scores, target)
    yield from _at(precision, predicted, target, zero_division)
    tuned, value = best_global_threshold(scores, target, zero_division=zero_division)
    yield "f1_samples@tuned", value
    yield "threshold", tuned
    for name, columns in (groups or {}).items():
        columns = list(columns)
        own = precision[columns], predicted[:, columns], target[:, columns]
        for metric, value in _at(*own, zero_division):
            yield f"{metric}/{name}", value


def score_names(groups: Iterable[str] = ()) -> list[str]:
    """The names of `evaluate` whose values rank models: all but the tuned `threshold`."""
    nothing = np.zeros((1, 1), np.float32)
    named = evaluate(nothing, nothing, groups={name: [0] for name in groups})
    return [name for name, _ in named if name != "threshold"]


def _at(precision: NDArray, predicted: NDArray, target: NDArray, zero_division: float) -> Iterator[tuple[str, float]]:
    yield "map", _mean_of_present(precision)
    for average in ("samples", "micro", "macro"):
        value = fbeta(predicted, target, average=average, zero_division=zero_division)
        yield f"f1_{average}", value


def average_precision(scores: NDArray, target: NDArray) -> NDArray[np.float64]:
    """[C]: the sum over falling thresholds of (recall gained) * precision, in 0..1; nan for a class without positives.

    scores floating and finite [N, C], target bool or 0/1 [N, C]. Equal scores are one threshold, as in scikit-learn's
    `average_precision_score` (no interpolation).
    """
    assert scores.shape == target.shape, f"scores {scores.shape} and target {target.shape} differ in shape"
    assert np.isfinite(scores).all(), "a score is not finite, so it has no rank"
    target = np.asarray(target) > 0.5
    return np.array([_average_precision(column, positive) for column, positive in zip(scores.T, target.T, strict=True)])


def _average_precision(scores: NDArray, positive: NDArray) -> float:
    if not positive.any():
        return float("nan")
    order = np.argsort(scores)[::-1]
    ranked = scores[order]
    last_of_ties = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    found = np.cumsum(positive[order])[last_of_ties]
    precision = found / (last_of_ties + 1)
    return float(np.diff(found, prepend=0) @ precision / found[-1])


def mean_average_precision(scores: NDArray, target: NDArray) -> float:
    """Mean of `average_precision` over the classes that have a positive; nan where none has."""
    return _mean_of_present(average_precision(scores, target))


def _mean_of_present(precision: NDArray) -> float:
    present = precision[~np.isnan(precision)]
    return float(present.mean()) if present.size else float("nan")


def fbeta(
    predicted: NDArray,
    target: NDArray,
    *,
    average: str,
    beta: float = 1.0,
    zero_division: float = 0.0,
) -> float:
    """(1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP) in 0..1; average is `samples`, `macro` (classes) or `micro` (pooled).

    predicted and target bool [N, C]; beta above 1 favours recall; zero_division is the value of nothing predicted where
    nothing is true. van Rijsbergen 1979, "Information Retrieval".
    """
    hits, chosen, true = _counts(predicted, target, _AXIS[average])
    whole = beta**2 * true + chosen
    return float(np.mean(_ratio((1 + beta**2) * hits, whole, zero_division)))


def value_of(metric: Metric, predicted: NDArray, target: NDArray) -> float:
    """The F-beta that the metric names, of predicted and target bool [N, C]."""
    how = {"beta": metric.beta, "zero_division": metric.zero_division}
    return fbeta(predicted, target, average=metric.average, **how)


f1_samples = partial(fbeta, average="samples")
f1_macro = partial(fbeta, average="macro")
f1_micro = partial(fbeta, average="micro")


def unlabelled(target: NDArray, zero_division: float = 0.0) -> list[str]:
    """A line for people about the samples without a true label, bool [N, C], since their part in an
    F1 over samples is a convention and not a fact; none where there are none."""
    bare = len(target) - np.count_nonzero(target.any(1))
    if not bare:
        return []
    each = "0 in an F1 over samples whatever is predicted, so a label predicted there costs nothing, for the tuned "
    each += "threshold too; --zero-division 1 counts 1 where nothing is predicted"
    if zero_division:
        each = "1 in an F1 over samples where nothing is predicted (--zero-division 1), else 0"
    return [f"{bare} of {len(target)} samples have no true label: each counts {each}"]


def left_empty(bare: int, rows: int, rule: str, kind: str) -> list[str]:
    """A line for people where a rule gives `bare` of so many samples no label, though each of a kind (`training
    sample`) has one; none where there are none."""
    if not bare:
        return []
    fix = "`mlc tune --rule expected` chooses the labels of each sample by itself"
    return [
        f"warning: {rule} leaves {bare} of {rows} samples without a label, and in truth every {kind} has one; {fix}"
    ]


def without_labels(predicted: NDArray, target: NDArray, rule: str, zero_division: float = 0.0) -> list[str]:
    """`unlabelled`; where every sample has a label, `left_empty`. predicted, target bool [N, C]."""
    bare = len(predicted) - np.count_nonzero(predicted.any(1))
    return unlabelled(target, zero_division) or left_empty(bare, len(predicted), rule, "one of them")


def summary(scores: NDArray, target: NDArray, threshold: ArrayLike = 0.5) -> dict[str, float]:
    """map and CP, CR, CF1, OP, OR, OF1, the row of a multi-label results table, as fractions in 0..1.

    CP and CR are means over all classes of precision and recall, OP and OR pool all decisions, and CF1 and OF1 are the
    harmonic means of the two (Wang et al. 2016, "CNN-RNN"), so CF1 is not `f1_macro`. threshold is a number or [C].
    """
    target = np.asarray(target) > 0.5
    predicted = scores > np.asarray(threshold, scores.dtype)
    row = {"map": mean_average_precision(scores, target)}
    for letter, axis in (("C", 0), ("O", None)):
        hits, chosen, true = _counts(predicted, target, axis)
        precision, recall = float(np.mean(_ratio(hits, chosen))), float(np.mean(_ratio(hits, true)))
        row[f"{letter}P"], row[f"{letter}R"] = precision, recall
        row[f"{letter}F1"] = float(_ratio(2 * precision * recall, precision + recall))
    return row


def _counts(predicted: NDArray, target: NDArray, axis: int | None) -> tuple[NDArray, NDArray, NDArray]:
    """(true positives, predicted, true), summed over one axis or over everything."""
    return tuple(np.sum(mask, axis=axis, dtype=np.float64) for mask in (predicted & target, predicted, target))


def _ratio(part: ArrayLike, whole: ArrayLike, empty: float = 0.0) -> NDArray[np.float64]:
    """part / whole, `empty` where whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full_like(whole, empty), where=whole != 0)
