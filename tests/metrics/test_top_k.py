"""Against a loop over rows, and against all bounds and thresholds there are."""

import itertools

import numpy as np
import pytest

from mlc.metrics.multilabel import value_of
from mlc.metrics.threshold_search import Metric
from mlc.metrics.top_k import Bounds, decide, fit


def by_hand(scores, bounds) -> np.ndarray:
    predicted = np.zeros(scores.shape, bool)
    for row, said in zip(scores, predicted, strict=True):
        order = sorted(range(len(row)), key=lambda column: -row[column])
        for rank, column in enumerate(order[: bounds.most]):
            said[column] = row[column] > 0 and (rank < bounds.least or row[column] > bounds.threshold)
    return predicted


@pytest.mark.parametrize("least, most", [(0, 4), (0, 2), (1, 1), (1, 3), (2, 2), (4, 4), (0, 0)])
def test_decisions_are_those_of_a_loop(least, most):
    scores = np.random.default_rng(0).integers(0, 5, (60, 4)) / 4
    bounds = Bounds(0.5, least, most)
    np.testing.assert_array_equal(decide(scores, bounds), by_hand(scores, bounds))


def made(seed) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = np.ceil(rng.random((9, 5)) * 8).astype(np.float32) / 8
    target = rng.random(scores.shape) < scores * 0.7
    target[0, 0] = True
    return scores, target


def all_bounds(scores, deepest):
    for most in range(deepest + 1):
        for least, threshold in itertools.product(range(most + 1), np.arange(-1, 9) / 8 + 0.01):
            yield Bounds(threshold, least, most)


@pytest.mark.parametrize("average", ["samples", "micro", "macro"])
@pytest.mark.parametrize("beta, zero", [(1.0, 0), (2.0, 0), (1.0, 1)])
def test_nothing_near_is_better(average, beta, zero):
    """One group: the other bound or another threshold alone never helps, and mostly no bounds at all are better."""
    metric, reached_best = Metric(beta, average, zero), []
    for seed in range(6):
        scores, target = made(seed)
        deepest = min(5, int((1 + beta**2) * target.sum(1).max()))
        found = fit(scores, target, metric, {"all": range(5)}, {"all": 0.5})["all"]

        def value(bounds, scores=scores, target=target):
            return value_of(metric, decide(scores, bounds), target)

        every = [(value(bounds), bounds) for bounds in all_bounds(scores, deepest)]
        near = [v for v, b in every if (b.least == found.least) or (b.most == found.most)]
        assert value(found) >= max(near) - 1e-9 and found.most <= deepest
        reached_best.append(value(found) >= max(v for v, _ in every) - 1e-9)
    assert sum(reached_best) >= 4


def test_exactly_one_culture_and_some_tags():
    """What no threshold can do: the first group has one label in each image, whatever its probabilities."""
    rng = np.random.default_rng(0)
    scores = rng.random((200, 8)).astype(np.float32) * rng.choice([0.2, 1.0], size=(200, 1)).astype(np.float32)
    target = np.zeros(scores.shape, bool)
    np.put_along_axis(target, scores[:, :4].argmax(1)[:, None], True, 1)
    target[:, 4:] = scores[:, 4:] > 0.3
    found = fit(scores, target, Metric(), {"culture": range(4), "tag": range(4, 8)}, {"culture": 0.5, "tag": 0.5})
    culture, tag = decide(scores[:, :4], found["culture"]), decide(scores[:, 4:], found["tag"])
    np.testing.assert_array_equal(np.concatenate([culture, tag], 1), target)
