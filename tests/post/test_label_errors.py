"""Likely wrong labels: equal to cleanlab and to the definition, row by row."""

import numpy as np
import pytest

from mlc.post.label_errors import METHODS, by_class, errors, margins, mean_errors, relative, scores, suspects


def example(seed: int, rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Labels of five classes from common to rare, a tenth of the predictions far off."""
    rng = np.random.default_rng(seed)
    given = rng.random((rows, 5)) < [0.7, 0.4, 0.2, 0.05, 0.02]
    given[0], given[1] = True, False
    near = np.clip(given * 0.7 + rng.normal(0.15, 0.15, given.shape), 0.01, 0.99)
    return np.where(rng.random(given.shape) < 0.1, 1 - near, near), given


def brute_force(p: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The confident joint of one class, entry by entry, from its definition."""
    confident = [np.mean(1 - p[~given]), np.mean(p[given])]
    found = []
    for probability, label in zip(p, given, strict=True):
        of = [1 - probability, probability]
        sides = [side for side in (0, 1) if of[side] >= confident[side]]
        guess = max(sides, key=lambda side: of[side]) if sides else int(label)
        found.append(guess != label and of[guess] > of[int(label)])
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_suspects_are_off_the_diagonal_of_the_confident_joint(seed):
    p, given = example(seed)
    found = suspects(errors(p, given), given)
    assert 20 < found.sum() < 300
    for c in range(5):
        assert np.array_equal(found[:, c], brute_force(p[:, c], given[:, c]))


@pytest.mark.parametrize("seed", range(4))
def test_suspects_are_those_of_cleanlab(seed):
    cleanlab = pytest.importorskip("cleanlab.multilabel_classification.filter")
    p, given = example(seed)
    labels = [np.flatnonzero(row).tolist() for row in given]
    theirs = cleanlab.find_multilabel_issues_per_class(labels, p, filter_by="confident_learning", n_jobs=1)
    assert np.array_equal(suspects(errors(p, given), given), theirs)


def test_the_mean_error_is_of_each_class_and_side():
    p, given = example(7)
    mean = mean_errors(errors(p, given), given)
    for c in range(5):
        assert mean[1, c] == pytest.approx(1 - p[given[:, c], c].mean(), abs=1e-6)
        assert mean[0, c] == pytest.approx(p[~given[:, c], c].mean(), abs=1e-6)
    error = errors(p, given)
    assert by_class(error, given)[given[:, 2], 2].mean() == pytest.approx(1, abs=1e-4)


def test_a_class_without_one_side_is_never_suspicious():
    p, given = example(3)
    given[:, 4], p[:, 4] = False, 0.99
    assert not suspects(errors(p, given), given)[:, 4].any()
    assert (margins(errors(p, given), given)[:, 4] < 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_flipped_labels_are_ranked_first(method):
    """With good predictions every method puts the entries that were flipped before nearly all others."""
    rng = np.random.default_rng(0)
    true = rng.random((500, 4)) < [0.5, 0.3, 0.1, 0.05]
    p = np.clip(true * 0.8 + rng.uniform(0, 0.2, true.shape), 0, 1)
    flipped = rng.random(true.shape) < 0.02
    score = scores(p, true ^ flipped, method)
    top = np.argsort(-score.reshape(-1))[: flipped.sum()]
    assert flipped.reshape(-1)[top].mean() > 0.9
    assert score.dtype == np.float32


def test_relative_is_the_log_odds_of_a_wrong_label():
    p, given = example(5)
    score = relative(p, given)
    for c in range(5):
        usual = p[given[:, c], c].mean()
        odds = p[:, c] / (1 - p[:, c])
        expected = np.where(given[:, c], np.log(usual / (1 - usual)) - np.log(odds), np.log(odds))
        assert score[:, c] == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(relative(np.array([[0.0, 1.0]]), np.array([[True, False]]))).all()
