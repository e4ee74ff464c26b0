"""A sigmoid at 0.5 is rarely where F1 is best: labels are sparse and the loss knows nothing of F1. The best single
threshold is found exactly, out of all of them, because a grid would make the tuned number depend on its spacing.

`thresholds.json` beside a checkpoint: `{"metric": "f1_samples", "global": 0.23, "value": 0.71}`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.console import UserError
from shards.files import whole

# What one F1 is taken over: a sample's row, a class's column, or everything as one long row. All three are then means
# of F1 over the rows of a matrix, and one algorithm serves them.
_ROWS = {
    "f1_samples": lambda matrix: matrix,
    "f1_macro": lambda matrix: matrix.T,
    "f1_micro": lambda matrix: matrix.reshape(1, -1),
}


def best_global_threshold(scores: NDArray, target: NDArray, metric: str = "f1_samples") -> tuple[float, float]:
    """(threshold, value): the optimum of `metric` over every threshold there is, with the rule `score > threshold`.

    scores floating [N, C], target bool or 0/1 [N, C]; metric is f1_samples, f1_micro or f1_macro, an F1 without labels
    and predictions counting as 0. A label joins its row's prediction when the threshold passes its score, and changes
    that row's F1 by a known amount: summed from the highest score down these give the metric at every threshold, read
    only between distinct scores. The threshold lies midway between its two neighbouring scores (for the lowest score:
    between it and 0). Without a positive label every threshold is worth 0 and 0.5 is returned.
    """
    assert scores.shape == target.shape, f"scores {scores.shape} and target {target.shape} differ in shape"
    target = np.asarray(target) > 0.5
    if not target.any():
        return 0.5, 0.0
    ranked, changes = _changes(_ROWS[metric](scores), _ROWS[metric](target))
    order = np.argsort(ranked)[::-1]
    ranked, value = ranked[order], np.cumsum(changes[order])
    last_of_ties = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    best = last_of_ties[np.argmax(value[last_of_ties])]
    below = ranked[best + 1] if best + 1 < ranked.size else min(ranked[best], ranked.dtype.type(0))
    return _between(below, ranked[best]), float(value[best])


def _changes(scores: NDArray, target: NDArray) -> tuple[NDArray, NDArray]:
    """[K], [K]: the scores that can matter, and what each adds to the mean over rows of F1 when it is passed."""
    mask = scores > _floor(scores, target)
    row, scores_kept, hit = np.nonzero(mask)[0], scores[mask], target[mask]
    order = np.lexsort((-scores_kept, row))  # row by row, falling
    counts = mask.sum(1)
    first = (np.cumsum(counts) - counts)[row]
    found = np.append(0, np.cumsum(hit[order]))
    place = np.arange(row.size)
    f1 = 2 * (found[place + 1] - found[first]) / (place + 1 - first + target.sum(1)[row]) / len(scores)
    return scores_kept[order], f1 - np.where(place == first, 0.0, np.roll(f1, 1))


def _floor(scores: NDArray, target: NDArray) -> float:
    """A threshold that the best one is certainly above: with a thousand classes nearly all scores lie below it, and
    leaving them out of the sort saves most of the time and memory.

    A row with T true labels reaches at most 2 T / (k + T) once k >= T labels are predicted, and k only grows as the
    threshold falls. Where the mean of that bound is below a value already seen, nothing further down can win.
    """
    true = target.sum(1)
    every = [size // 1000 + 1 for size in scores.shape]
    sample = np.sort(scores[:: every[0], :: every[1]], axis=None)[::-1]
    seen, share = 0.0, target.mean() / 4
    while share < 1:
        floor = sample[int(share * sample.size)]
        mask = scores > floor
        predicted, hits = mask.sum(1), (mask & target).sum(1)
        whole = np.maximum(predicted + true, 1)
        seen = max(seen, float(np.mean(2 * hits / whole)))
        if np.mean(np.where(predicted >= true, 2 * true / whole, 1.0)) < seen:
            return float(floor)
        share *= 2
    return -math.inf


def _between(low: np.floating, high: np.floating) -> float:
    """The middle, in the scores' own precision: NumPy compares float32 with a Python float as float32, where the middle
    of two neighbours rounds to one of them. The lower one still separates them, the upper one does not.
    """
    middle = low + (high - low) / 2
    if low < middle < high:
        return float(middle)
    return float(low if low < high else np.nextafter(high, high.dtype.type(-np.inf)))


def apply(scores: NDArray, thresholds: Mapping) -> NDArray[np.bool_]:
    """bool [N, C]: which labels are predicted, by the content of a `thresholds.json`."""
    return scores > thresholds["global"]


def save(path: str | Path, *, metric: str, threshold: float, value: float) -> None:
    """Writes `thresholds.json`; the threshold survives the round trip to the last bit."""
    content = {"metric": metric, "global": float(threshold), "value": float(value)}
    with whole(Path(path)) as building:
        building.write_text(json.dumps(content, indent=2) + "\n")


def load(path: str | Path) -> dict:
    """The content of a `thresholds.json`; UserError where it is missing, no JSON or without a usable threshold."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read thresholds from {path}: {error}; give --threshold 0.5 instead") from error
    threshold = content.get("global") if isinstance(content, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise UserError(f'{path}: "global" must be a number, not {threshold!r}; give --threshold 0.5 instead')
    return content
