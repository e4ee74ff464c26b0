"""How a model orders the labels of one image, whatever the thresholds: the ranking metrics of multi-label learning.

All of them follow from two ranks of each true label, so these are counted once, and only for the true labels: with a
thousand classes and five labels an image, sorting every row would do two hundred times the work.
"""

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22  # comparisons made at a time: bounds the memory


def ranking(scores: NDArray, target: NDArray) -> dict[str, NDArray[np.float64]]:
    """{ranking_loss, coverage_error, lrap}: float64 [N] each, whose means are scikit-learn's metrics of these names.

    ranking_loss: share of (true, other) pairs in the wrong order, ties counting as wrong; 0 where one kind is missing.
    coverage_error: how far down the ranking the last true label is; 0 for an image without labels.
    lrap: label ranking average precision; 1 where all labels or none are true.
    scores floating [N, C], target bool [N, C]. Tsoumakas, Katakis, Vlahavas 2010, "Mining Multi-label Data".
    """
    row, above, true_above = _ranks(scores, target)
    images, classes = target.shape
    true = target.sum(1)
    loss, coverage, precision = np.zeros(images), np.zeros(images), np.zeros(images)
    np.add.at(loss, row, above - true_above)
    np.maximum.at(coverage, row, above)
    np.add.at(precision, row, true_above / above)
    pairs = true * (classes - true)
    whole = pairs == 0
    return {
        "ranking_loss": np.where(whole, 0.0, loss / np.maximum(pairs, 1)),
        "coverage_error": coverage,
        "lrap": np.where(whole, 1.0, precision / np.maximum(true, 1)),
    }


def _ranks(scores: NDArray, target: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(row, labels of the row with at least its score, true ones among them), int64 [labels] of all true labels."""
    row, column = np.nonzero(target)
    above, true_above = np.empty(len(row), np.int64), np.empty(len(row), np.int64)
    step = max(1, CHUNK // max(1, target.shape[1]))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        mask = scores[row[part]] >= scores[row[part], column[part]][:, None]
        above[part] = mask.sum(1)
        true_above[part] = (mask & target[row[part]]).sum(1)
    return row, above, true_above
