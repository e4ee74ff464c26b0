"""Against scikit-learn, SciPy, closed forms, and all weights tried."""

import itertools

import numpy as np
import pytest
from scipy.stats import gmean, rankdata
from sklearn.metrics import average_precision_score, f1_score, log_loss

from mlc.metrics import combine, multilabel


def answers(
    seed: int, models: int = 2, samples: int = 60, classes: int = 4, positive: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
    """(stack [M, N, C], target): each model knows other classes well; rounded, so that some answers are equal."""
    rng = np.random.default_rng(seed)
    target = rng.random((samples, classes)) < positive
    skill = np.stack([np.roll(np.linspace(0.1, 0.9, classes), k) for k in range(models)])[:, None]
    noise = rng.random((models, samples, classes))
    return np.round((skill * target + noise) / (1 + skill), 2).astype(np.float32), target


def cross_entropy(scores: np.ndarray, target: np.ndarray) -> float:
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(np.mean([log_loss(target[:, c], p[:, c], labels=[False, True]) for c in range(target.shape[1])]))


# ---- means -----------------------------------------------------------------------------------------------------------


def test_means_by_numpy_and_scipy():
    stack, _ = answers(0, models=3)
    weights = [0.5, 0.2, 0.3]
    np.testing.assert_allclose(combine.mean(stack), stack.mean(0), atol=1e-7)
    np.testing.assert_allclose(combine.mean(stack, weights), np.average(stack, axis=0, weights=weights), atol=1e-7)
    np.testing.assert_allclose(combine.geometric(stack), gmean(stack, axis=0), atol=1e-6)
    for c in range(4):
        np.testing.assert_allclose(combine.ranks(stack)[1, :, c], rankdata(stack[1, :, c]) / 60, rtol=1e-6)
    own = np.array([[1.0, 0.0, 0.5, 0.2], [0.0, 1.0, 0.5, 0.3], [0.0, 0.0, 0.0, 0.5]])
    mixed = combine.mean(stack, own)
    np.testing.assert_array_equal(mixed[:, :2], np.stack([stack[0, :, 0], stack[1, :, 1]], 1))
    np.testing.assert_allclose(mixed[:, 3], stack[:, :, 3].T @ own[:, 3], atol=1e-6)
    assert combine.mean(np.ones((3, 1, 1), np.float32), weights).max() == 1  # not a rounding above it


def test_a_model_that_is_sure_of_no_rules_a_label_out():
    stack = np.array([[[0.0, 0.9]], [[0.8, 0.4]]], np.float32)
    np.testing.assert_allclose(combine.geometric(stack), [[0, 0.6]], atol=1e-6)


def test_union_and_vote_by_hand():
    stack = np.array([[[0.9, 0.7, 0.1]], [[0.1, 0.2, 0.5]]], np.float32)
    assert combine.union(stack, [0.8, 0.4]).tolist() == [[True, False, True]]
    assert combine.union(stack, [[0.95, 0.6, 0.0], [0.0, 0.0, 0.5]]).tolist() == [[True, True, True]]
    assert combine.union(stack, [0.9, 0.5]).tolist() == [[False, False, False]]  # above, as everywhere
    sets = np.array([[[1, 1, 0, 0]], [[1, 0, 1, 0]], [[0, 1, 1, 0]]], bool)
    assert combine.vote(sets, [1, 1, 1]).tolist() == [[True, True, True, False]]
    assert combine.vote(sets, [3, 1, 1]).tolist() == [[True, True, False, False]]
    assert combine.vote(sets, [0.1, 0.2, 0.3]).tolist() == [[False, True, True, False]]  # a half is no majority
    assert combine.vote(sets[:2], [0.90125, 0.9009]).tolist() == [[True, True, False, False]]  # the better one decides


@pytest.mark.parametrize("seed", range(3))
def test_a_vote_of_equals_is_the_majority_of_random_sets(seed):
    sets = np.random.default_rng(seed).random((5, 40, 6)) < 0.5
    np.testing.assert_array_equal(combine.vote(sets, np.full(5, 0.7)), sets.sum(0) >= 3)
    np.testing.assert_array_equal(combine.vote(sets, np.ones(5), share=0.0), sets.any(0))
    np.testing.assert_array_equal(combine.vote(sets, np.ones(5), share=0.8), sets.all(0))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", [2, 3])
def test_tuned_weights_have_the_least_cross_entropy_of_all(models):
    stack, target = answers(1, models)
    weights = combine.tuned(stack, target)
    assert weights.shape == (models,) and weights.sum() == pytest.approx(1) and (weights >= 0).all()
    found = cross_entropy(combine.mean(stack, weights), target)
    grid = [w for w in itertools.product(np.arange(0, 1.001, 0.05), repeat=models) if abs(sum(w) - 1) < 1e-9]
    tried = {w: cross_entropy(combine.mean(stack, w), target) for w in grid}
    best = min(tried, key=tried.get)
    assert found <= tried[best] + 1e-9
    np.testing.assert_allclose(weights, best, atol=0.08)


def test_a_model_that_knows_nothing_gets_no_weight_and_copies_share():
    stack, target = answers(2)
    good = np.where(target, 0.9, 0.2).astype(np.float32)
    assert combine.tuned(np.stack([good, 1 - good]), target) == pytest.approx([1, 0], abs=1e-6)
    weights = combine.tuned(np.stack([stack[0], stack[0]]), target)
    np.testing.assert_allclose(combine.mean(np.stack([stack[0]] * 2), weights), stack[0], atol=1e-6)


def test_each_class_has_its_own_weights_and_a_rare_one_those_of_all():
    stack, target = answers(3, samples=400)
    target[:, 1] = False
    target[3, 1] = True
    together = combine.tuned(stack, target)
    stack[:, :, 1] = 0.01  # both say the same of the rare class, so that nothing speaks for other weights
    free, drawn = (combine.tuned_per_class(stack, target, prior) for prior in (0.0, combine.PRIOR))
    for c in (0, 2, 3):
        tried = [
            cross_entropy(combine.mean(stack, [w, 1 - w])[:, [c]], target[:, [c]]) for w in np.arange(0, 1.01, 0.02)
        ]
        assert free[0, c] == pytest.approx(np.argmin(tried) * 0.02, abs=0.02)
        low, high = sorted((free[0, c], together[0]))
        assert low - 0.02 <= drawn[0, c] <= high + 0.02
    together = combine.tuned(stack, target)
    np.testing.assert_allclose(drawn[:, 1], together, atol=1e-3)
    np.testing.assert_allclose(combine.tuned_per_class(stack, target, 1e7), np.stack([together] * 4, 1), atol=1e-3)
    assert drawn[0, 0] < 0.5 < drawn[0, 3]  # each class trusts the model that knows it


@pytest.mark.parametrize("metric", ["f1_samples", "f2_samples", "map"])
def test_greedy_is_caruanas_loop(metric):
    """Written down once more with lists."""
    stack, target = answers(4, models=3)
    bag, path = [], []
    for _ in range(combine.ROUNDS):
        means = [np.sum([stack[k] for k in [*bag, new]], axis=0) / np.float32(len(bag) + 1) for new in range(3)]
        values = [combine.value(scores, target, metric) for scores in means]
        bag.append(int(np.argmax(values)))
        path.append(max(values))
        best = int(np.argmax(path))
        if len(path) - (best + 1) >= combine.PATIENCE:
            break
    weights = combine.greedy(stack, target, metric)
    np.testing.assert_allclose(weights, np.bincount(bag[: best + 1], minlength=3) / (best + 1), atol=1e-9)
    reached = combine.value(combine.mean(stack, weights), target, metric)
    assert reached >= max(combine.value(own, target, metric) for own in stack)


def test_one_weight_beats_both_models_where_each_knows_half():
    stack, target = answers(5, samples=200)
    alone = [combine.value(own, target, "f1_samples") for own in stack]
    for weights in (
        combine.tuned(stack, target),
        combine.greedy(stack, target),
        combine.tuned_per_class(stack, target),
    ):
        assert combine.value(combine.mean(stack, weights), target, "f1_samples") > max(alone)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_values_are_scikit_learns():
    stack, target = answers(6)
    average = average_precision_score(target, stack[0], average="macro")
    assert combine.value(stack[0], target, "map") == pytest.approx(average)
    for kind in ("samples", "micro", "macro"):
        tried = [f1_score(target, stack[0] > t, average=kind, zero_division=0) for t in [-1, *np.unique(stack[0])]]
        assert combine.value(stack[0], target, f"f1_{kind}") == pytest.approx(max(tried))


def test_the_honest_score_never_sees_the_labels_it_is_measured_on():
    """Weights made for labels that are pure chance look good on them, and are worth chance."""
    rng = np.random.default_rng(0)
    stack = rng.random((20, 100, 6)).astype(np.float32)
    target = rng.random((100, 6)) < 0.3
    metrics = ("f1_macro", "map")
    seen = []

    def fit(stack, target):
        seen.append(len(target))
        return combine.greedy(stack, target, "map")

    honest = combine.cross_fitted(stack, target, fit, metrics)
    assert seen == [80] * 5
    optimistic = combine.value(combine.mean(stack, combine.greedy(stack, target, "map")), target, "map")
    chance = np.mean([combine.value(own, target, "map") for own in stack])
    assert optimistic > chance + 0.05 and abs(honest["map"] - chance) < 0.03


def test_without_anything_to_fit_honest_is_the_plain_map_and_the_threshold_is_of_the_others():
    stack, target = answers(7, samples=50)
    honest = combine.cross_fitted(stack, target, lambda stack, target: np.array([0.3, 0.7]), ("f1_micro", "map"))
    scores = combine.mean(stack, [0.3, 0.7])
    assert honest["map"] == pytest.approx(combine.value(scores, target, "map"))
    part = np.random.RandomState(0).permutation(50) % 5
    predicted = np.zeros_like(target)
    for k in range(5):
        known = part != k
        tried = {t: f1_score(target[known], scores[known] > t, average="micro") for t in np.unique(scores)}
        best = max(tried.values())
        predicted[~known] = scores[~known] > max(t for t, f1 in tried.items() if f1 > best - 1e-12)
    assert honest["f1_micro"] == pytest.approx(multilabel.f1_micro(predicted, target), abs=0.02)
