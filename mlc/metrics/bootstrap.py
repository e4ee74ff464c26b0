"""How sure a number is: what it would be on other images like these. Images are drawn, not decisions, since the labels
of one image go together; two models are compared on the same draws, where what is hard for both cancels.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap": percentile intervals, and the share of replicates on the
other side of zero as the p-value; both after the replicates' bias is taken off (chapter 10). Where classes have three
to five positives it is larger than the spread of a mean over many classes: a positive that is drawn twice stands before
itself and raises its average precision, and a class whose positives are not drawn has an F1 of 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlc.metrics.scorecard import LOWER_IS_BETTER, Scorecard

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """B minus A; `better` says which of the two is ahead beyond chance, "" where neither is."""

    value: float
    low: float
    high: float
    p: float
    better: str


def draws(images: int, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """[images, count]: how often each image is in each of `count` samples of as many images, drawn with replacement."""
    rng = np.random.default_rng(seed)
    found = np.empty((count, images), np.uint8)  # one image more than 255 times: not in the life of the universe
    for number in range(count):
        found[number] = np.bincount(rng.integers(images, size=images), minlength=images)
    return np.ascontiguousarray(found.T)


def interval(replicates: NDArray, value: float) -> Interval:
    """The middle 95 % of a metric's [B], less their bias: their mean is moved to the `value` of the images themselves.
    What is in 0..1 stays there; nan where no replicate has a value, one without is left out."""
    low, high = _middle(_centred(replicates, value))
    bounded = not (np.nanmin(replicates, initial=0) < 0 or np.nanmax(replicates, initial=1) > 1)
    return Interval(max(low, 0.0), min(high, 1.0)) if bounded else Interval(low, high)


def _centred(replicates: NDArray, value: float) -> NDArray:
    """Those that have a value, so that their mean is the `value`."""
    known = replicates[~np.isnan(replicates)]
    return known - (known.mean() - value) if known.size and not np.isnan(value) else known


def _middle(values: NDArray) -> Interval:
    if not values.size:
        return Interval(np.nan, np.nan)
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high))


def compare(one: Scorecard, other: Scorecard, weights: NDArray) -> dict[str, Difference]:
    """{metric: other minus one} of two models on the same images in the same order, over the metrics both have."""
    assert len(one) == len(other) == len(weights), "the two models have not seen the same images"
    values = [card.at() for card in (one, other)]
    replicates = [card.at(weights) for card in (one, other)]
    return {
        name: difference(name, values[1][name][0] - values[0][name][0], replicates[1][name] - replicates[0][name])
        for name in values[0]
        if name in values[1]
    }


def difference(name: str, value: float, replicates: NDArray) -> Difference:
    """p, two-sided: how often a draw says the contrary; never below 1 / (draws + 1), which is all they can show."""
    known = _centred(replicates, value)
    low, high = _middle(known)
    contrary = min((known <= 0).sum(), (known >= 0).sum())
    p = min(1.0, 2 * (1 + contrary) / (1 + len(known)))
    clear = p < 1 - LEVEL and value != 0
    ahead = (value > 0) != (name.partition("/")[0] in LOWER_IS_BETTER)
    return Difference(float(value), low, high, float(p), ("B" if ahead else "A") if clear else "")


def intervals(card: Scorecard, weights: NDArray) -> Mapping[str, Interval]:
    """{metric: its 95 % interval}."""
    found = card.at()
    return {name: interval(values, found[name][0]) for name, values in card.at(weights).items()}
