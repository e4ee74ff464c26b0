"""Rules against all that they could have chosen, and the honest value against labels that were never looked at."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, fbeta_score

from mlc.metrics import decision_rules
from mlc.metrics.decision_rules import Setup, chosen, cross_fitted, fit, folds_of, matching, with_rest
from mlc.metrics.multilabel import fbeta
from mlc.metrics.threshold_search import Metric
from mlc.metrics.thresholds import RULES, apply, of_maximum


def made(seed, rows=40, classes=6, ties=False, noise=1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1, classes) + rng.normal(0, 1.5, (rows, classes))
    target = rng.random((rows, classes)) < 1 / (1 + np.exp(-logits))
    scores = (1 / (1 + np.exp(-logits - noise * rng.standard_normal(logits.shape)))).astype(np.float32)
    return (np.ceil(scores * 8) / 8 if ties else scores), target


def setup(metric="f1_samples", classes=6, **more) -> Setup:
    more = {"groups": {"x": [0, 3], "y": [1, 2, 4, 5]}, "shrink": 0.0, "min_positives": 0} | more
    return Setup(Metric.of(metric), [f"c{number}" for number in range(classes)], **more)


METRICS = ["f1_samples", "f2_samples", "f1_micro", "f2_macro"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_the_fraction_of_the_maximum_is_the_best_there_is(metric, ties):
    for seed in range(4):
        scores, target = made(seed, ties=ties)
        own = setup(metric)
        rule = fit(["max-fraction"], scores, target, own)["max-fraction"]
        options = {"beta": own.metric.beta, "average": own.metric.average, "zero_division": 0}
        relative = of_maximum(scores)
        every = [-1.0, *(np.unique(relative) + 1e-6)]
        best = max(fbeta_score(target, relative > fraction, **options) for fraction in every)
        assert fbeta_score(target, apply(scores, rule), **options) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_false_positives_balance_false_negatives_in_each_class(ties):
    for seed in range(6):
        scores, target = made(seed, ties=ties)
        predicted = apply(scores, fit(["balance"], scores, target, setup())["balance"])
        for column in range(6):
            _, wrong, missed, _ = confusion_matrix(target[:, column], predicted[:, column], labels=[0, 1]).ravel()
            chosen = [(scores[:, column] > t).sum() for t in [-1, *scores[:, column]]]
            nearest = min(abs(int(count) - target[:, column].sum()) for count in chosen)
            assert abs(wrong - missed) == nearest and (ties or nearest == 0)


@pytest.mark.parametrize("ties", [False, True])
def test_as_many_labels_as_in_truth(ties):
    for seed in range(6):
        scores, target = made(seed, ties=ties)
        predicted = apply(scores, fit(["label-count"], scores, target, setup())["label-count"])
        nearest = min(abs(int((scores > t).sum()) - target.sum()) for t in [-1, *np.unique(scores)])
        assert abs(int(predicted.sum()) - target.sum()) == nearest


@pytest.mark.parametrize("count, expected", [(0, 0), (1, 1), (2, 1), (3, 4), (4, 4), (6, 6)])
def test_matching_a_count_among_equal_scores(count, expected):
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.2, 0.0], np.float32)
    assert (scores > matching(scores, count)).sum() == expected


def test_a_rare_class_takes_the_global_threshold():
    scores, target = made(0, rows=200)
    target[:, 2] = False
    target[:5, 2] = True
    rule = fit(["class"], scores, target, setup(min_positives=6))["class"]
    assert rule["classes"]["c2"] == rule["global"] and rule["classes"]["c1"] != rule["global"]
    balance = fit(["balance"], scores, target, setup(min_positives=6))["balance"]
    assert balance["classes"]["c2"] == balance["global"] != rule["global"]


def test_a_class_is_drawn_towards_the_global_threshold_by_its_positives():
    scores, target = made(0, rows=200)
    alone = fit(["class"], scores, target, setup())["class"]
    drawn = fit(["class"], scores, target, setup(shrink=30.0))["class"]
    for column, name in enumerate(alone["classes"]):
        share = target[:, column].sum() / (target[:, column].sum() + 30)
        expected = share * alone["classes"][name] + (1 - share) * alone["global"]
        assert drawn["classes"][name] == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
def test_more_thresholds_are_never_worse_on_the_images_that_chose_them(metric):
    scores, target = made(3, rows=120)
    own = setup(metric)
    value = {
        rule: fbeta(apply(scores, content), target, average=own.metric.average, beta=own.metric.beta)
        for rule, content in fit(RULES, scores, target, own).items()
    }
    assert value["global"] <= value["group"] + 1e-12 and value["global"] <= value["class"] + 1e-12
    assert value["label-count"] <= value["global"]


# ---- honest values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_labels_of_held_out_images_are_never_looked_at(rule):
    """Whatever their labels are, the predictions for them stay the same."""
    scores, target = made(1, rows=60)
    before = cross_fitted([rule], scores, target, setup(), folds=3, seed=5)[rule]
    rng = np.random.default_rng(0)
    for fold in range(3):
        own = folds_of(60, 3, 5) == fold
        shuffled = target.copy()
        shuffled[own] = rng.permutation(target[own].reshape(-1)).reshape(-1, 6)
        after = cross_fitted([rule], scores, shuffled, setup(), folds=3, seed=5)[rule]
        np.testing.assert_array_equal(after[own], before[own])


def test_a_cross_fit_is_a_fit_to_the_other_folds():
    scores, target = made(2, rows=50)
    predicted = cross_fitted(["class", "top-k"], scores, target, setup(), folds=4, seed=1)
    part = folds_of(50, 4, 1)
    assert np.bincount(part).tolist() == [13, 13, 12, 12]
    for fold in range(4):
        rules = fit(["class", "top-k"], scores[part != fold], target[part != fold], setup())
        for rule, content in rules.items():
            np.testing.assert_array_equal(predicted[rule][part == fold], apply(scores[part == fold], content))


def test_noise_learnt_by_heart_is_found_out():
    """Labels that have nothing to do with the scores: a class's threshold gains on its own images, and only there."""
    rng = np.random.default_rng(0)
    scores, target = rng.random((150, 30)).astype(np.float32), rng.random((150, 30)) < 0.1
    own = setup("f1_macro", 30, groups={})
    rule = fit(["class"], scores, target, own)["class"]
    in_sample = fbeta(apply(scores, rule), target, average="macro")
    honest = fbeta(cross_fitted(["class"], scores, target, own, 5)["class"], target, average="macro")
    assert in_sample > honest + 0.05


def test_classes_without_a_group_are_one_more():
    assert with_rest({"x": [1, 3]}, 4) == {"x": [1, 3], "other classes": [0, 2]}
    assert with_rest({"x": [0], "y": [1]}, 2) == {"x": [0], "y": [1]} and with_rest({}, 2) == {}


def test_without_groups_there_is_no_rule_for_them():
    scores, target = made(0)
    own = setup(groups={})
    assert "group" not in own.rules and "top-k" in own.rules
    fit(own.rules, scores, target, own)


def test_what_is_exact_is_said():
    assert [setup().search(rule) for rule in ("global", "class", "top-k", "expected")] == [
        "exact",
        "ascent",
        "ascent",
        "no fit",
    ]
    assert setup("f1_macro").search("class") == setup("f1_micro").search("group") == "exact"


def test_training_folds_without_labels_do_not_stop_it():
    scores, target = made(0)
    fit(RULES, scores, np.zeros_like(target), setup())


def test_a_training_takes_the_rule_that_is_best_on_images_left_out():
    """Where every image has labels but the network is unsure of some, one threshold leaves those empty."""
    rng = np.random.default_rng(3)
    target = rng.random((600, 6)) < 0.25
    target[np.arange(600), rng.integers(6, size=600)] = True
    sure = np.where(target, 0.9, 0.1) + rng.normal(0, 0.05, target.shape)
    dim = np.where(np.arange(600)[:, None] % 2 == 0, 1.0, 0.1)
    names = [f"c{column}" for column in range(6)]
    found = chosen((sure * dim).clip(0, 1), target, names)
    assert found["rule"] == "expected" and found["honest"] == found["compared"]["expected"]
    assert found["compared"]["expected"] > found["compared"]["global"] + 0.02
    held_out = cross_fitted(["global"], (sure * dim).clip(0, 1), target, setup(), 5)["global"]
    assert found["compared"]["global"] == pytest.approx(fbeta_score(target, held_out, beta=1, average="samples"))
    overconfident = np.where(target, 0.999, 0.4) - rng.random(target.shape) * 0.1  # one threshold is all that is needed
    assert chosen(overconfident, target, names)["rule"] == "global"


def test_a_training_without_labels_to_choose_by_keeps_one_threshold():
    scores = np.full((8, 2), 0.3)
    for target in (np.zeros((8, 2), bool), np.ones((8, 2), bool)):
        found = chosen(scores[: 8 if target.any() else 3], target[: 8 if target.any() else 3], ["a", "b"])
        assert found["rule"] == "global"
    assert "honest" not in chosen(scores, np.zeros((8, 2), bool), ["a", "b"])


def test_many_images_are_judged_by_some_of_them(monkeypatch):
    scores, target = made(1, rows=300)
    whole = chosen(scores, target, list("abcdef"))
    monkeypatch.setattr(decision_rules, "MOST", 100)
    some = chosen(scores, target, list("abcdef"))
    assert some["compared"] != whole["compared"] and some["global"] == whole["global"]
