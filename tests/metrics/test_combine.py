"""Against scikit-learn and every weight tried by itself."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from mlc.metrics.combine import late, tune_late, union


def answers(seed: int, samples: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models that know different classes well, rounded so that some answers are equal."""
    rng = np.random.default_rng(seed)
    target = rng.random((samples, classes)) < 0.4
    skill = np.linspace(0, 1, classes)
    noise = rng.random((2, samples, classes))
    p_image, p_text = (
        np.round(s * target + (1.3 - s) * n, 2) / 1.3 for s, n in zip((skill, 1 - skill), noise, strict=True)
    )
    return p_image.astype(np.float32), p_text.astype(np.float32), target


def test_union_by_hand():
    p_image, p_text = np.array([[0.9, 0.7, 0.1]]), np.array([[0.1, 0.2, 0.5]])
    assert union(p_image, p_text, 0.8, 0.4).tolist() == [[True, False, True]]
    assert union(p_image, p_text, [0.95, 0.6, 0.0], [0.0, 0.0, 0.5]).tolist() == [[True, True, True]]
    assert union(p_image, p_text, 0.9, 0.5).tolist() == [[False, False, False]]  # above, as everywhere


@pytest.mark.parametrize("seed", range(3))
def test_each_classs_weight_is_the_best_of_all_tried(seed):
    p_image, p_text, target = answers(seed)
    weights = tune_late(p_image, p_text, target, per_class=True, steps=10)
    for c in range(target.shape[1]):
        tried = {w: average_precision_score(target[:, c], late(p_image, p_text, w)[:, c]) for w in np.arange(11) / 10}
        best = max(tried.values())
        assert tried[weights[c]] == pytest.approx(best)
        assert abs(weights[c] - 0.5) == min(abs(w - 0.5) for w, ap in tried.items() if ap > best - 1e-9)
    assert weights[0] < 0.5 < weights[-1]  # each trusts the model that knows the class


@pytest.mark.parametrize("seed", range(2))
def test_one_weight_is_the_best_of_all_weights_and_thresholds_tried(seed):
    p_image, p_text, target = answers(seed, samples=25)
    weights = tune_late(p_image, p_text, target, per_class=False, steps=4)
    assert weights.shape == (4,) and len(set(weights)) == 1
    tried = {}
    for w in np.arange(5) / 4:
        scores = late(p_image, p_text, w)
        tried[w] = max(
            f1_score(target, scores > t, average="samples", zero_division=0) for t in [-1, *np.unique(scores)]
        )
    assert tried[weights[0]] == pytest.approx(max(tried.values()))


def test_a_class_that_nobody_has_gets_a_half_and_equals_do_too():
    p_image, p_text, target = answers(0)
    target[:, 1] = False
    p_text[:, 2] = p_image[:, 2]
    weights = tune_late(p_image, p_text, target, per_class=True)
    assert weights[1] == weights[2] == 0.5


def test_late_takes_a_number_or_one_for_each_class():
    p_image, p_text, _ = answers(0)
    np.testing.assert_allclose(late(p_image, p_text, 0.25), 0.25 * p_image + 0.75 * p_text, rtol=1e-6)
    mixed = late(p_image, p_text, [0.0, 1.0, 0.5, 0.5])
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixed[:, :2], np.stack([p_text[:, 0], p_image[:, 1]], 1))
