"""Whether 0.8 means eight of ten, and making it so: needed wherever probabilities are added, compared or shown to
people.

One curve for all classes, since most classes have too few positives for one of their own. Both kinds only need to know
how many decisions and how many true ones there are at each logit, so a table of these is all that is kept of a hundred
million decisions, and leaving a fold out is a subtraction.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from mlc.metrics.scorecard import calibration_bins

KINDS = ("temperature", "isotonic")
REACH, STEP = 16.0, 1e-3  # logits from -16 to 16 in steps of a thousandth; beyond, as at the end
_SIZE = round(2 * REACH / STEP) + 1
_ROWS = 4096


@dataclass(frozen=True)
class Curve:
    """A map of probabilities: temperature divides the logit, `steps` (logits, probabilities) interpolates."""

    temperature: float | None = None
    steps: tuple[NDArray, NDArray] | None = None

    def __call__(self, scores: NDArray) -> NDArray[np.float32]:
        """float32, shape of `scores`."""
        logit = logits(scores)
        if self.steps is None:
            return (1 / (1 + np.exp(-logit / self.temperature))).astype(np.float32)
        return np.interp(logit, *self.steps).astype(np.float32)


def logits(scores: NDArray) -> NDArray[np.float64]:
    """log(p / (1 - p)), within +-16."""
    p = scores.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -REACH, REACH)


def counts(scores: NDArray, target: NDArray) -> NDArray[np.int64]:
    """[2, logits]: how many decisions are at each logit of the grid, and how many of them are true."""
    found = np.zeros((2, _SIZE), np.int64)
    for start in range(0, len(scores), _ROWS):
        place = np.rint((logits(scores[start : start + _ROWS]) + REACH) / STEP).astype(np.int64)
        found[0] += np.bincount(place.ravel(), minlength=_SIZE)
        found[1] += np.bincount(place[target[start : start + _ROWS]], minlength=_SIZE)
    return found


def fit(kind: str, table: NDArray[np.int64]) -> Curve:
    """The curve with the least cross entropy (temperature; Guo et al. 2017, "On Calibration of Modern Neural Networks")
    or squared error (isotonic; Zadrozny and Elkan 2002) for the decisions in a table of `counts`."""
    place = np.flatnonzero(table[0])
    grid, every, true = place * STEP - REACH, table[0, place], table[1, place]
    if kind == "isotonic":
        curve = IsotonicRegression(y_min=0, y_max=1).fit(grid, true / every, sample_weight=every)
        return Curve(steps=(curve.X_thresholds_, curve.y_thresholds_))

    def loss(log_temperature: float) -> float:
        z = grid / np.exp(log_temperature)
        return float((every * np.logaddexp(0, z) - true * z).sum() / every.sum())

    return Curve(temperature=float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)))


def cross_fitted(
    kind: str, scores: NDArray, target: NDArray, *, folds: int = 5, seed: int = 0
) -> tuple[NDArray[np.float32], Curve]:
    """(calibrated probabilities, the curve of all images): each image's by the curve of the other folds' images, so
    that what is measured on them is what new images would show."""
    fold = np.random.default_rng(seed).permutation(len(scores)) % min(folds, len(scores))
    own = [np.flatnonzero(fold == number) for number in range(fold.max() + 1)]
    tables = [counts(scores[rows], target[rows]) for rows in own]
    every = sum(tables)
    found = np.empty(scores.shape, np.float32)
    for rows, table in zip(own, tables, strict=True):
        curve = fit(kind, every - table)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            found[part] = curve(scores[part])
    return found, fit(kind, every)


def reliability(scores: NDArray, target: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(mean probability, share that is true, decisions) of each of the 15 bins, nan where one is empty."""
    said, true, count = calibration_bins(scores, target).sum(0)
    with np.errstate(invalid="ignore"):
        return said / count, true / count, count.astype(np.int64)
