"""The best that needs no model, against scikit-learn with the labels written out."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from mlc.metrics.constant import best_constant, chance_map, constant_f1


@pytest.mark.parametrize("zero_division", [0.0, 1.0])
def test_f1_of_every_size_is_scikit_learns(zero_division):
    random = np.random.default_rng(0)
    target = random.random((40, 7)) < np.array([0.45, 0.1, 0.3, 0.0, 0.2, 0.05, 0.4])
    target[:5] = False
    owner, columns = np.nonzero(target)
    order = random.permutation(7)
    values = constant_f1(order, columns, owner, 40, zero_division)
    for size in range(8):
        always = np.zeros_like(target)
        always[:, order[:size]] = True
        expected = f1_score(target, always, average="samples", zero_division=zero_division)
        assert values[size] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_best_size_has_a_value_where_no_class_has_half_of_the_samples():
    target = np.eye(4, dtype=bool)[[0, 0, 1, 2, 3]]
    owner, columns = np.nonzero(target)
    assert best_constant(target.mean(0), columns, owner, 5) == (1, pytest.approx(0.4))
    assert best_constant([0, 0, 0, 1], columns, owner, 5)[0] == 2  # commonest where it was counted: 3, then 0
    nothing = np.zeros(0, int)
    assert best_constant(np.ones(3), nothing, nothing, 2) == (0, 0.0)


def test_chance_is_the_map_of_scores_that_are_all_equal():
    target = np.random.default_rng(1).random((30, 5)) < 0.2
    target[:, 2] = False
    _, columns = np.nonzero(target)
    present = target[:, target.any(0)]
    expected = average_precision_score(present, np.zeros(present.shape), average="macro")
    assert chance_map(columns, 30) == pytest.approx(expected)
    assert np.isnan(chance_map(columns[:0], 30))
