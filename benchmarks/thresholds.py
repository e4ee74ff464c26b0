"""Seconds to find the best thresholds: one, one for each group, one for each class, for the size of a museum's archive.

1,103 classes in two groups and 110,000 images with about three labels each, most classes rare; random probabilities,
right for common classes and poor for rare ones. Beside them (`--peers`) a coarser answer to the first of the three
questions: a grid of 99 global thresholds with a plain NumPy F-beta, and one point of it with scikit-learn's.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import common
import numpy as np
from sklearn.metrics import fbeta_score

from mlc.metrics.multilabel import fbeta
from mlc.metrics.threshold_search import Metric, best_thresholds

GRID = np.arange(1, 100) / 100
LABELS = 3.2  # an image


def made(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32, target bool), [N, C] each."""
    rng = np.random.default_rng(0)
    frequency = np.exp(rng.normal(-7, 1.4, classes))
    frequency *= LABELS / frequency.sum()
    target = rng.random((images, classes), dtype=np.float32) < frequency
    scores = rng.standard_normal((images, classes), dtype=np.float32)
    scores *= 1.3
    scores += np.log(frequency).astype(np.float32) + 4 * target
    np.exp(-scores, out=scores)
    scores += 1
    np.reciprocal(scores, out=scores)
    return scores, target


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def by_grid(scores: np.ndarray, target: np.ndarray, metric: Metric) -> float:
    return max(fbeta(scores > t, target, average=metric.average, beta=metric.beta) for t in GRID)


def by_scikit_learn(scores: np.ndarray, target: np.ndarray, metric: Metric, threshold: float) -> float:
    return fbeta_score(target, scores > threshold, average=metric.average, beta=metric.beta, zero_division=0)


def main() -> None:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=110_000, help="(default: 110000)")
    parser.add_argument("--classes", type=int, default=1103, help="(default: 1103)")
    parser.add_argument("--metrics", nargs="+", default=["f1_samples", "f2_samples", "f1_micro", "f1_macro"])
    parser.add_argument("--peers", action="store_true", help="also the grids, which take minutes")
    args = parser.parse_args()
    images, classes, rounds = (2000, 200, 1) if args.quick else (args.images, args.classes, args.rounds)
    scores, target = made(images, classes)
    third = classes // 3
    blocks = {"group": [list(range(third)), list(range(third, classes))], "class": [[c] for c in range(classes)]}
    candidates = {}
    for name in args.metrics:
        metric = Metric.of(name)
        (start,), _ = best_thresholds(scores, target, metric)
        candidates[f"{name}, global"] = partial(best_thresholds, scores, target, metric)
        for kind, own in blocks.items():
            candidates[f"{name}, {kind}"] = partial(best_thresholds, scores, target, metric, own, start)
        if args.peers:
            candidates[f"{name}, 99 global thresholds, NumPy"] = partial(by_grid, scores, target, metric)
            one = partial(by_scikit_learn, scores, target, metric, start)
            candidates[f"{name}, 1 global threshold, scikit-learn"] = one
    measured = common.interleaved({name: partial(seconds, call) for name, call in candidates.items()}, rounds)
    rows = [[name, f"{median(took):.2f}", f"{common.spread(took):.0%}"] for name, took in measured.items()]
    print(
        f"{images} images x {classes} classes, {target.sum() / images:.2f} labels each, {common.rounds_said(rounds)}\n"
    )
    print(common.table(["search", "s", "spread"], rows))
    versions = common.versions("numpy", "scikit-learn")
    print(f"\n{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    common.write_json(args.json, versions=versions, images=images, classes=classes, seconds=measured)


if __name__ == "__main__":
    main()
