"""Calibration against closed forms and scikit-learn, and that no image is calibrated by itself."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from mlc.metrics import calibration
from mlc.metrics.calibration import Curve, counts, cross_fitted, fit, logits, reliability
from mlc.metrics.scorecard import Scorecard


def overconfident(seed: int = 0, images: int = 2000, temperature: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are `temperature` times too large."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1.5, size=(images, 5))
    target = rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
    return (1 / (1 + np.exp(-temperature * logit))).astype(np.float32), target


def ece(scores, target) -> float:
    return Scorecard(scores, scores > 0.5, target).at()["ece"][0]


def test_temperature_is_the_optimum_and_the_true_one():
    scores, target = overconfident()
    found = fit("temperature", counts(scores, target)).temperature
    z, true = logits(scores).ravel(), target.ravel()

    def loss(t: float) -> float:
        return log_loss(true, 1 / (1 + np.exp(-z / t)))

    assert found == pytest.approx(minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x, rel=2e-3)
    assert found == pytest.approx(2.5, rel=0.05)


def test_isotonic_is_scikit_learn_s():
    scores, target = overconfident(images=300)
    scores = np.round(scores, 2)  # few values, each on one place of the grid
    found = fit("isotonic", counts(scores, target))(scores)
    expected = IsotonicRegression(y_min=0, y_max=1).fit(logits(scores).ravel(), target.ravel())
    np.testing.assert_allclose(found.ravel(), expected.predict(logits(scores).ravel()), atol=2e-3)


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_calibrated_probabilities_are_right_more_often(kind):
    scores, target = overconfident()
    made, _ = cross_fitted(kind, scores, target)
    assert made.dtype == np.float32 and ((made >= 0) & (made <= 1)).all()
    assert ece(scores, target) > 0.08 and ece(made, target) < 0.03


@pytest.mark.parametrize("kind", calibration.KINDS)
def test_no_image_has_a_say_in_its_own_calibration(kind):
    scores, target = overconfident(images=200)
    changed = target.copy()
    changed[17] = ~changed[17]
    before, after = (cross_fitted(kind, scores, labels)[0] for labels in (target, changed))
    same = (before == after).all(1)
    assert same[17] and not same.all()


def test_memorising_does_not_look_good():
    """Labels that are pure chance: calibrated on itself isotonic looks perfect, out of fold it does not."""
    rng = np.random.default_rng(0)
    scores, target = rng.random((60, 3)).astype(np.float32), rng.random((60, 3)) < 0.5
    made, curve = cross_fitted("isotonic", scores, target)
    own = Scorecard(curve(scores), scores > 0.5, target).at()["ece"][0]
    assert own < 0.01 < ece(made, target)


def test_certainty_stays_finite():
    scores = np.array([[0.0, 1.0]], np.float32)
    assert np.isfinite(logits(scores)).all()
    assert Curve(temperature=2.0)(scores)[0].tolist() == pytest.approx([np.exp(-8), 1 - np.exp(-8)], abs=1e-4)


def test_reliability_counts_every_decision():
    scores, target = overconfident(images=100)
    said, true, count = reliability(scores, target)
    assert count.sum() == target.size
    edges = np.arange(16) / 15
    inside = (scores >= edges[3]) & (scores < edges[4])
    assert said[3] == pytest.approx(scores[inside].mean()) and true[3] == pytest.approx(target[inside].mean())
