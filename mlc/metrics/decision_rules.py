"""From probabilities to labels: the rules that won competitions, each fitted to images with known labels, and what each
is worth on images it was not fitted to. A thousand thresholds always look good on the images that chose them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.metrics import top_k
from mlc.metrics.multilabel import value_of
from mlc.metrics.threshold_search import Metric, best_thresholds, between
from mlc.metrics.thresholds import RULES, apply, of_maximum

REST = "other classes"  # the group of the classes that have none
TRAINED = ("global", "expected")  # those that a training compares: fast to fit, the simplest first
FOLDS, MOST = 5, 20_000  # of their comparison; images that it looks at
# How each rule's parameters are found. Of the ascents no step can be bettered, of the exact ones nothing at all.
EXACT, ASCENT, NONE = "exact", "ascent", "no fit"


@dataclass(frozen=True)
class Setup:
    """What a fit needs beside scores and target; `groups` {name: columns} holds every class once, or nothing.

    A class's own threshold counts as n / (n + shrink) of it and the global one as the rest, n its positives; with fewer
    than `min_positives` it is the global one.
    """

    metric: Metric
    classes: Sequence[str]
    groups: Mapping[str, Sequence[int]]
    shrink: float = 20.0
    min_positives: int = 10

    @property
    def rules(self) -> list[str]:
        """The rules there are for these data, the simplest first."""
        return [rule for rule in RULES if rule != "group" or self.groups]

    def search(self, rule: str) -> str:
        """EXACT, ASCENT or NONE."""
        if rule == "expected":
            return NONE
        alone = rule not in ("group", "class") or self.metric.average != "samples"
        return EXACT if alone and rule != "top-k" else ASCENT


def with_rest(groups: Mapping[str, Sequence[int]], classes: int) -> dict[str, list[int]]:
    """The groups and, where they leave out classes, one more of those; {} for no groups."""
    rest = sorted(set(range(classes)) - {column for columns in groups.values() for column in columns})
    found = {name: list(columns) for name, columns in groups.items()}
    return found | {REST: rest} if found and rest else found


def fit(rules: Sequence[str], scores: NDArray, target: NDArray, setup: Setup) -> dict[str, dict[str, Any]]:
    """{rule: the content of its `thresholds.json`}, scores floating [N, C], target bool [N, C]."""
    start = 0.5
    if target.any() or setup.metric.zero_division:
        (start,), _ = best_thresholds(scores, target, setup.metric)
    found = {}
    for rule in rules:
        content = setup.metric.described | {"rule": rule, "global": start}
        found[rule] = content | _FIT[rule](scores, target, setup, start)
    return found


def cross_fitted(
    rules: Sequence[str], scores: NDArray, target: NDArray, setup: Setup, folds: int, seed: int = 0, advance=None
) -> dict[str, NDArray[np.bool_]]:
    """{rule: bool [N, C]}: what each rule predicts for every image when fitted to the images of the other folds.

    advance is called after each fold.
    """
    part = folds_of(len(scores), folds, seed)
    predicted = {rule: np.zeros(scores.shape, bool) for rule in rules}
    for number in range(folds):
        held_out = part == number
        for rule, content in fit(rules, scores[~held_out], target[~held_out], setup).items():
            predicted[rule][held_out] = apply(scores[held_out], content, setup.classes)
        if advance:
            advance()
    return predicted


def chosen(
    scores: NDArray, target: NDArray, classes: Sequence[str], zero_division: float = 0.0, metric: str = "f1_samples"
) -> dict[str, Any]:
    """The `thresholds.json` of the rule of TRAINED that is best on images that it was not fitted to, cross-fitted; one
    threshold where there is nothing to fit to. scores floating [N, C], target bool [N, C].

    `value` is that of all images, `honest` the cross-fitted one and `compared` {rule: cross-fitted value}.
    """
    setup = Setup(Metric.of(metric, zero_division), classes, {})
    some = np.sort(np.random.default_rng(0).permutation(len(scores))[:MOST])
    rules, honest = TRAINED, {}
    if len(some) < FOLDS or not target[some].any():
        rules = TRAINED[:1]
    else:
        held_out = cross_fitted(rules, scores[some], target[some], setup, FOLDS)
        honest = {rule: value_of(setup.metric, predicted, target[some]) for rule, predicted in held_out.items()}
    best = max(rules, key=lambda rule: honest.get(rule, 0.0))
    content = fit([best], scores, target, setup)[best]
    content["value"] = value_of(setup.metric, apply(scores, content, classes), target)
    return content | ({"honest": honest[best], "compared": honest} if honest else {})


def folds_of(images: int, folds: int, seed: int) -> NDArray[np.int64]:
    """[N]: the fold of each image, at random, of sizes that differ by one at most."""
    return np.random.default_rng(seed).permutation(images) % folds


# ---- fits: (scores, target, setup, best global threshold) -> what the rule adds to the file --------------------------


def _global(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    return {}


def _group(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    found = _group_thresholds(scores, target, setup, start)
    own = {column: found[name] for name, columns in setup.groups.items() for column in columns}
    return {"classes": {name: own[column] for column, name in enumerate(setup.classes)}, "groups": found}


def _group_thresholds(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, float]:
    """{group: threshold}; a group with too few positives keeps the global one."""
    enough = [name for name, c in setup.groups.items() if target[:, c].sum() >= max(1, setup.min_positives)]
    values, _ = best_thresholds(scores, target, setup.metric, [setup.groups[name] for name in enough], start)
    return dict.fromkeys(setup.groups, start) | dict(zip(enough, values, strict=True))


def _class(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    enough = np.flatnonzero(target.sum(0) >= max(1, setup.min_positives))
    values = np.full(target.shape[1], start)
    values[enough], _ = best_thresholds(scores, target, setup.metric, [[column] for column in enough], start)
    return {"classes": _shrunk(values, target, setup, start)}


def _balance(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    """False positives and false negatives are equally many where as many are predicted as true, class by class."""
    common = matching(scores.reshape(-1), int(target.sum()))
    counts = target.sum(0)
    values = np.full(len(counts), common)
    for column in np.flatnonzero(counts >= max(1, setup.min_positives)):
        values[column] = matching(scores[:, column], int(counts[column]))
    return {"global": common, "classes": _shrunk(values, target, setup, common)}


def _shrunk(values: NDArray, target: NDArray, setup: Setup, towards: float) -> dict[str, float]:
    positives = target.sum(0)
    share = positives / np.maximum(positives + setup.shrink, 1)
    return dict(zip(setup.classes, (towards + share * (values - towards)).tolist(), strict=True))


def _max_fraction(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    """One threshold on every score over the highest in its row: exact, like the global one."""
    if not target.any():
        return {"fraction": 1.0}
    (fraction,), _ = best_thresholds(of_maximum(scores), target, setup.metric)
    return {"fraction": fraction}


def _top_k(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    groups = setup.groups or {"all": list(range(len(setup.classes)))}
    thresholds = _group_thresholds(scores, target, setup, start) if setup.groups else {"all": start}
    found = top_k.fit(scores, target, setup.metric, groups, thresholds)
    described = {
        name: {
            "threshold": own.threshold,
            "min": own.least,
            "max": own.most,
            "classes": [setup.classes[c] for c in groups[name]],
        }
        for name, own in found.items()
    }
    return {"classes": list(setup.classes), "groups": described}


def _label_count(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    """As many labels are predicted as there are; with one threshold that also balances false positives and negatives
    over all classes together."""
    return {"global": matching(scores.reshape(-1), int(target.sum()))}


def matching(scores: NDArray, count: int) -> float:
    """The threshold that the nearest number of scores to `count` is above; of equally near ones the higher."""
    if not count:
        top = scores.max()
        return float(top + max(1 - top, 0) / 2)
    lowest = np.partition(scores, scores.size - count)[scores.size - count]
    above, at_least = np.count_nonzero(scores > lowest), np.count_nonzero(scores >= lowest)
    if above and count - above <= at_least - count:
        return between(lowest, np.min(scores, where=scores > lowest, initial=np.inf))
    below = np.max(scores, where=scores < lowest, initial=-np.inf)
    return between(below if np.isfinite(below) else min(lowest, scores.dtype.type(0)), lowest)


def _expected(scores: NDArray, target: NDArray, setup: Setup, start: float) -> dict[str, Any]:
    return {"beta": setup.metric.beta}


_FIT = {
    "global": _global,
    "group": _group,
    "class": _class,
    "max-fraction": _max_fraction,
    "top-k": _top_k,
    "balance": _balance,
    "label-count": _label_count,
    "expected": _expected,
}
