"""Two models' answers to the same samples, put together after both are trained: what an image says and what its caption
says. All of it on probabilities that were held out or predicted out of fold; weights that were tuned on training data
would trust the model that knows it by heart.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlc.metrics.multilabel import average_precision
from mlc.metrics.thresholds import best_global_threshold


def union(
    p_image: NDArray, p_text: NDArray, threshold_image: ArrayLike, threshold_text: ArrayLike
) -> NDArray[np.bool_]:
    """bool [N, C]: the labels that either model predicts, each above a threshold of its own (a number or [C])."""
    of_image, of_text = (p > np.asarray(t, p.dtype) for p, t in ((p_image, threshold_image), (p_text, threshold_text)))
    return of_image | of_text


def late(p_image: NDArray, p_text: NDArray, weights: ArrayLike) -> NDArray:
    """w p_image + (1 - w) p_text, [N, C]; w, the image's share, is a number or [C], as `tune_late` gives it."""
    w = np.asarray(weights, p_image.dtype)
    return w * p_image + (1 - w) * p_text


def tune_late(
    p_image: NDArray, p_text: NDArray, target: NDArray, *, per_class: bool, steps: int = 20
) -> NDArray[np.float64]:
    """[C]: the image's share in `late`, out of 0, 1 / steps, ..., 1. Of equally good ones the nearest to a half.

    per_class: each class's own, with the highest average precision (a half for a class without positives); else one for
    all, with the highest sample-F1 at the threshold that is best for it.
    p_image, p_text probabilities [N, C], target bool or 0/1 [N, C].
    """
    assert p_image.shape == p_text.shape == target.shape, f"{p_image.shape}, {p_text.shape} and {target.shape} differ"
    grid = np.arange(steps + 1) / steps
    grid = grid[np.argsort(np.abs(grid - 0.5), kind="stable")]  # argmax takes the first of equals
    mixtures = (late(p_image, p_text, w) for w in grid)
    if per_class:
        values = np.stack([average_precision(scores, target) for scores in mixtures])
        best = np.nan_to_num(values).argmax(0)
        return np.where(np.isnan(values[0]), 0.5, grid[best])
    values = [best_global_threshold(scores, target)[1] for scores in mixtures]
    return np.full(target.shape[1], grid[int(np.argmax(values))])
