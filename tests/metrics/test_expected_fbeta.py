"""Against the expectation over all label sets, for every answer there is."""

import itertools

import numpy as np
import pytest

from mlc.metrics import expected_fbeta
from mlc.metrics.expected_fbeta import decide, expected_values


def expectation(answer, probabilities, beta, zero=0) -> float:
    total = 0.0
    for truth in itertools.product((0, 1), repeat=len(probabilities)):
        chance = np.prod(np.where(truth, probabilities, 1 - probabilities))
        whole = beta**2 * sum(truth) + sum(answer)
        total += chance * (1 + beta**2) * np.dot(truth, answer) / whole if whole else chance * zero
    return total


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 1.5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zero", [0, 1])
def test_no_set_of_labels_has_a_higher_expectation(beta, seed, zero):
    probabilities = np.random.default_rng(seed).random((4, 5)) ** (1 + seed)
    predicted = decide(probabilities, beta, zero)
    for row, answer in zip(probabilities, predicted, strict=True):
        best = max(expectation(other, row, beta, zero) for other in itertools.product((0, 1), repeat=5))
        assert expectation(answer, row, beta, zero) == pytest.approx(best, abs=1e-12)
    assert predicted.any(1).all() or zero


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_expected_values_of_the_likeliest_labels(beta):
    falling = -np.sort(-np.random.default_rng(0).random((3, 6)), axis=1)
    found = expected_values(falling, beta)
    for row, values in zip(falling, found, strict=True):
        expected = [expectation(np.arange(6) < size, row, beta) for size in range(7)]
        np.testing.assert_allclose(values, expected, atol=1e-12)


def test_many_classes_are_cut_with_a_small_error(monkeypatch):
    rng = np.random.default_rng(1)
    probabilities = np.concatenate([rng.random((50, 10)), rng.random((50, 80)) * 0.01], axis=1)
    falling = -np.sort(-probabilities, axis=1)
    exact = expected_values(falling, 1.0)[:, :31]
    cut = expected_values(falling[:, :30], 1.0, falling[:, 30:].sum(1))
    np.testing.assert_allclose(cut, exact, atol=2e-4)
    whole = decide(probabilities.astype(np.float32))
    monkeypatch.setattr(expected_fbeta, "DEPTH", 30)
    monkeypatch.setattr(expected_fbeta, "CHUNK", 7)
    np.testing.assert_array_equal(decide(probabilities.astype(np.float32)), whole)


def test_certain_and_impossible_labels():
    probabilities = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    np.testing.assert_array_equal(decide(probabilities), [[1, 0, 1], [0, 0, 0], [1, 0, 0]])
