"""Intervals that hold the truth as often as they say, and a comparison that is not fooled by what is hard for both."""

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from mlc.metrics.bootstrap import compare, difference, draws, interval, intervals
from mlc.metrics.multilabel import f1_samples
from mlc.metrics.scorecard import Scorecard


def world(seed: int, images: int = 300, skill: float = 2.0, noise: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random((images, 6)) < 0.3
    hard = rng.normal(size=(images, 1))  # some images are hard for every model
    own = np.random.default_rng([seed, noise]).normal(size=target.shape) if noise else rng.normal(size=target.shape)
    logits = skill * (2 * target - 1) + 2 * hard * (2 * target - 1) + own
    return (1 / (1 + np.exp(-logits))).astype(np.float32), target


def card(scores, target) -> Scorecard:
    return Scorecard(scores, scores > 0.5, target)


def test_draws_are_resamples_and_repeat_with_the_seed():
    weights = draws(40, 500, seed=3)
    assert weights.shape == (40, 500) and (weights.sum(0) == 40).all()
    assert (weights == draws(40, 500, seed=3)).all() and (weights != draws(40, 500, seed=4)).any()
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 40) ** 40, abs=0.01)


def test_interval_is_scipy_s():
    scores, target = world(0)
    found = intervals(card(scores, target), draws(300, 4000))["f1_samples"]
    hits, chosen, true = ((m).sum(1) for m in ((scores > 0.5) & target, scores > 0.5, target))
    each = np.where(chosen + true > 0, 2 * hits / np.maximum(chosen + true, 1), 0)
    expected = scipy_bootstrap((each,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert each.mean() == pytest.approx(f1_samples(scores > 0.5, target))
    assert found == pytest.approx(expected, abs=0.003)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    truth = {name: value[0] for name, value in card(*world(99, images=40_000)).at().items()}
    held = {"f1_micro": 0, "map": 0}
    for seed in range(60):
        found = intervals(card(*world(seed, images=150)), draws(150, 200))
        for name in held:
            held[name] += found[name].low <= truth[name] <= found[name].high
    assert all(count >= 50 for count in held.values()), held  # 57 expected, 50 is one in a thousand


def test_comparison_is_paired():
    """A small gain on images that differ a lot: far inside the two intervals, and yet certain."""
    scores, target = world(1)
    better = np.clip(scores + 0.06 * (2 * target - 1), 0, 1).astype(np.float32)
    weights = draws(300, 1000)
    one, other = card(scores, target), card(better, target)
    found = compare(one, other, weights)["f1_micro"]
    apart = [intervals(each, weights)["f1_micro"] for each in (one, other)]
    assert apart[0].high > apart[1].low  # the two intervals overlap
    assert found.better == "B" and found.low > 0 and found.p == pytest.approx(2 / 1001)
    back = compare(other, one, weights)["f1_micro"]
    assert back.better == "A" and back.value == -found.value and back.p == found.p
    loss = compare(one, other, weights)["loss"]
    assert loss.value < 0 and loss.better == "B"  # lower is better


def test_equal_models_are_rarely_told_apart():
    wrong = 0
    for seed in range(60):
        (scores, target), (other, _) = world(seed, noise=1), world(seed, noise=2)
        found = compare(card(scores, target), card(other, target), draws(300, 200))
        wrong += found["f1_samples"].better != ""
    assert wrong <= 10  # 3 expected


def test_a_file_against_itself():
    scores, target = world(2)
    found = compare(card(scores, target), card(scores, target), draws(300, 100))
    assert all(one.value == 0 and one.p == 1 and one.better == "" for one in found.values())


def test_missing_replicates_are_left_out():
    values = np.array([np.nan, 1.0, 2.0, 3.0])
    assert interval(values, 2.0).low >= 1 and np.isnan(interval(values[:1], np.nan).low)
    assert difference("map", 2.0, values).p == pytest.approx(2 / 4)


def test_intervals_of_many_rare_classes_hold_their_own_estimate():
    """Three to five positives a class: what a draw does to each of them alone is more than the spread of their mean."""
    rng = np.random.default_rng(0)
    target = rng.random((300, 400)) < rng.choice([3, 4, 5], 400) / 300
    scores = 1 / (1 + np.exp(1.5 - 2.2 * target - rng.normal(size=target.shape)))
    rare = card(scores.astype(np.float32), target)
    weights, values = draws(300, 80), rare.at()
    found = intervals(rare, weights)
    for name in ("map", "f1_macro", "CF1"):
        assert found[name].low < values[name][0] < found[name].high, name
    assert np.mean(rare.at(weights)["map"] > values["map"][0]) > 0.97  # a draw alone is too good


def test_the_bias_is_taken_off_and_an_f1_stays_one():
    assert interval(np.array([0.8, 0.9, 1.0, 1.0]), 0.99).high == 1  # and not 1.065
    found = difference("map", 0.0, np.array([0.4, 0.5, 0.6]))
    assert (found.low, found.high) == pytest.approx((-0.095, 0.095)) and found.p == 1
