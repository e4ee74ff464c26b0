import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, fbeta_score, precision_score, recall_score
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from mlc.metrics.multilabel import (
    average_precision,
    evaluate,
    f1_macro,
    f1_micro,
    f1_samples,
    fbeta,
    mean_average_precision,
    summary,
    unlabelled,
    without_labels,
)

BY_AVERAGE = {"samples": f1_samples, "micro": f1_micro, "macro": f1_macro}


def batch(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """[60, 9] with a class without positives, one that is always there, and rows without labels or predictions."""
    rng = np.random.default_rng(seed)
    target = rng.random((60, 9)) < 0.25
    scores = (0.7 * rng.random((60, 9)) + 0.3 * target).astype(np.float32)
    target[:, 2], target[:, 3], target[5:9] = False, True, False
    scores[7:12] = 0.01
    return (np.round(scores, 1) if ties else scores), target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learn(seed, ties):
    scores, target = batch(seed, ties)
    mine = average_precision(scores, target)
    with_positives = [c for c in range(9) if c != 2]
    expected = [average_precision_score(target[:, c], scores[:, c]) for c in with_positives]
    np.testing.assert_allclose(mine[with_positives], expected, rtol=1e-12)
    assert np.isnan(mine[2])
    assert mean_average_precision(scores, target) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_torchmetrics(ties):
    scores, target = batch(0, ties)
    keep = [c for c in range(9) if c != 2]
    expected = multilabel_average_precision(
        torch.tensor(scores[:, keep]), torch.tensor(target[:, keep]).long(), 8, average="none"
    )
    np.testing.assert_allclose(average_precision(scores[:, keep], target[:, keep]), expected, rtol=1e-5)


def test_average_precision_by_hand():
    # ranks of the positives: 1 and 3, then everything tied: precision is the share of positives
    scores, target = np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[1], [0], [1], [0]])
    assert average_precision(scores, target)[0] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert average_precision(np.full((4, 1), 0.5), target)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("average", ["samples", "micro", "macro"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zero", [0, 1])
def test_f1_equals_scikit_learn(average, seed, zero):
    scores, target = batch(seed)
    predicted = scores > 0.5
    how = {"average": average, "zero_division": zero}
    for truth in (target, np.zeros_like(target)):
        expected = fbeta_score(truth, predicted, beta=2, **how)
        assert fbeta(predicted, truth, beta=2, **how) == pytest.approx(expected, rel=1e-12)
    expected = f1_score(target, predicted, **how)
    assert BY_AVERAGE[average](predicted, target, zero_division=zero) == pytest.approx(expected, rel=1e-12)
    named = dict(evaluate(scores, target, groups={"all": range(9)}, zero_division=zero))
    assert named[f"f1_{average}"] == named[f"f1_{average}/all"] == pytest.approx(expected, rel=1e-12)


def test_samples_without_labels_are_told():
    target = np.array([[True, False], [False, False], [False, False]])
    (line,) = unlabelled(target)
    assert line.startswith("2 of 3 samples have no true label: each counts 0") and "--zero-division 1" in line
    assert "where nothing is predicted (--zero-division 1)" in unlabelled(target, 1)[0]
    assert unlabelled(target[:1]) == []


def test_samples_that_a_rule_leaves_without_a_label_are_counted_where_each_has_one():
    target = np.eye(3, dtype=bool)
    predicted = target & [True, False, True]
    assert without_labels(target, target, "x") == []
    (line,) = without_labels(predicted, target, "threshold 0.4")
    assert line.startswith("warning: threshold 0.4 leaves 1 of 3 samples without a label, and in truth every one of")
    (line,) = without_labels(predicted, predicted, "threshold 0.4")
    assert line == unlabelled(predicted)[0]


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_equals_torchmetrics(average):
    scores, target = batch(0)
    keep = [c for c in range(9) if c != 2]  # torchmetrics drops a class without positives or predictions
    expected = multilabel_f1_score(
        torch.tensor(scores[:, keep]), torch.tensor(target[:, keep]).long(), 8, threshold=0.5, average=average
    )
    assert BY_AVERAGE[average](scores[:, keep] > 0.5, target[:, keep]) == pytest.approx(expected.item(), rel=1e-5)


def test_the_report_row_equals_scikit_learn():
    scores, target = batch(1)
    predicted = scores > 0.5
    row = summary(scores, target, 0.5)
    for letter, average in (("C", "macro"), ("O", "micro")):
        precision = precision_score(target, predicted, average=average, zero_division=0)
        recall = recall_score(target, predicted, average=average, zero_division=0)
        assert row[letter + "P"] == pytest.approx(precision) and row[letter + "R"] == pytest.approx(recall)
        assert row[letter + "F1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert row["map"] == pytest.approx(mean_average_precision(scores, target))


def test_a_threshold_per_class():
    scores, target = batch(2)
    limits = np.linspace(0.2, 0.6, 9)
    found = dict(evaluate(scores, target, limits))
    assert found["f1_micro"] == pytest.approx(f1_score(target, scores > limits, average="micro"))
    assert summary(scores, target, limits)["OP"] == pytest.approx(
        precision_score(target, scores > limits, average="micro")
    )


def test_evaluate_names_groups_and_tuned_value():
    scores, target = batch(3)
    found = dict(evaluate(scores, target, 0.5, groups={"digit": range(5), "ink": [5, 6, 7, 8]}))
    per_group = ["map", "f1_samples", "f1_micro", "f1_macro"]
    assert list(found) == [
        *per_group,
        "f1_samples@tuned",
        "threshold",
        *(f"{name}/{group}" for group in ("digit", "ink") for name in per_group),
    ]
    assert found["f1_samples@tuned"] >= found["f1_samples"]
    assert found["f1_samples@tuned"] == pytest.approx(f1_samples(scores > np.float32(found["threshold"]), target))
    assert found["map/ink"] == pytest.approx(mean_average_precision(scores[:, 5:], target[:, 5:]))
    assert found["f1_macro/digit"] == pytest.approx(
        f1_score(target[:, :5], scores[:, :5] > 0.5, average="macro", zero_division=0)
    )


def test_nothing_to_find_gives_zeros_and_no_warning():
    scores, target = np.full((4, 3), 0.2, np.float32), np.zeros((4, 3), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(evaluate(scores, target))
    assert np.isnan(found.pop("map")) and found.pop("threshold") == 0.5
    assert set(found.values()) == {0.0}


def test_a_score_that_is_not_a_number_is_refused():
    scores, target = batch(0)
    scores[3, 3] = np.nan
    with pytest.raises(AssertionError, match="not finite"):
        average_precision(scores, target)
