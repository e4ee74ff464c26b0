"""Every metric against scikit-learn, on random data with ties, empty rows, and classes with no or all positives."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_coverage_error,
    multilabel_ranking_average_precision,
    multilabel_ranking_loss,
)

from mlc.metrics import multilabel
from mlc.metrics.bootstrap import draws
from mlc.metrics.ranking import CHUNK, ranking
from mlc.metrics.scorecard import Scorecard

GROUPS = {"one": [0, 2, 5], "other": [1, 3, 4, 6, 7, 8]}


def batch(seed: int, ties: bool = False, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random((rows, 9)) < 0.25
    scores = (0.7 * rng.random((rows, 9)) + 0.3 * target).astype(np.float32)
    target[:, 2], target[:, 3], target[5:9] = False, True, False
    target[9] = True
    scores[7:12] = 0.01
    return (np.clip(np.round(scores, 1), 0.1, 0.9) if ties else scores), target


def metrics_of(scores, target, weights=None, zero=0) -> dict:
    return Scorecard(scores, scores > 0.5, target, GROUPS, zero).at(weights)


def reference(scores, target, zero=0) -> dict[str, float]:
    """All of it by scikit-learn, on rows as they are."""
    predicted = scores > 0.5
    found = {}
    for average in ("samples", "micro", "macro", "weighted"):
        common = {"average": average, "zero_division": zero}
        found[f"precision_{average}"] = sk.precision_score(target, predicted, **common)
        found[f"recall_{average}"] = sk.recall_score(target, predicted, **common)
        found[f"f1_{average}"] = sk.f1_score(target, predicted, **common)
        found[f"f2_{average}"] = sk.fbeta_score(target, predicted, beta=2, **common)
    for name, columns in GROUPS.items():
        for average in ("samples", "micro", "macro"):
            common = {"average": average, "zero_division": zero}
            found[f"f1_{average}/{name}"] = sk.f1_score(target[:, columns], predicted[:, columns], **common)
            found[f"f2_{average}/{name}"] = sk.fbeta_score(target[:, columns], predicted[:, columns], beta=2, **common)
    found["map"] = mean_ap(scores, target)
    found |= {f"map/{name}": mean_ap(scores[:, columns], target[:, columns]) for name, columns in GROUPS.items()}
    by_class = zip(scores.T.astype(np.float64), target.T, strict=True)
    found["loss"] = np.mean([sk.log_loss(t, p, labels=[0, 1]) for p, t in by_class])
    found["ranking_loss"] = sk.label_ranking_loss(target, scores)
    found["coverage_error"] = sk.coverage_error(target, scores)
    found["lrap"] = sk.label_ranking_average_precision_score(target, scores)
    for letter, average in (("C", "macro"), ("O", "micro")):
        precision, recall = found[f"precision_{average}"], found[f"recall_{average}"]
        found |= {f"{letter}P": precision, f"{letter}R": recall}
        found[f"{letter}F1"] = 2 * precision * recall / (precision + recall)
    return found


def mean_ap(scores, target) -> float:
    present = target.any(0)
    by_class = zip(scores.T[present], target.T[present], strict=True)
    return np.mean([sk.average_precision_score(t, p) for p, t in by_class])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zero", [0, 1])
def test_every_metric_equals_scikit_learn(seed, ties, zero):
    scores, target = batch(seed, ties)
    found, expected = metrics_of(scores, target, zero=zero), reference(scores, target, zero)
    assert set(found) == {*expected, "ece"}
    for name, value in expected.items():
        assert found[name][0] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("zero", [0, 1])
def test_without_a_true_label_every_average_is_scikit_learns(zero):
    scores, target = batch(0)[0], np.zeros((60, 9), bool)
    found = metrics_of(scores, target, zero=zero)
    for average in ("samples", "micro", "macro", "weighted"):
        common = {"average": average, "zero_division": zero}
        expected = sk.precision_recall_fscore_support(target, scores > 0.5, **common)[:3]
        names = [f"{rate}_{average}" for rate in ("precision", "recall", "f1")]
        assert [found[name][0] for name in names] == pytest.approx(expected), average


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_repeated_images(ties):
    """What a bootstrap replicate is: scikit-learn on the drawn rows, written out."""
    scores, target = batch(5, ties)
    weights = draws(len(scores), 6, seed=1)
    found = metrics_of(scores, target, weights)
    for number in range(6):
        rows = np.repeat(np.arange(len(scores)), weights[:, number])
        expected = reference(scores[rows], target[rows])
        for name, value in expected.items():
            assert found[name][number] == pytest.approx(value, rel=1e-6), name
        assert found["ece"][number] == pytest.approx(metrics_of(scores[rows], target[rows])["ece"][0])


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_and_calibration_equal_torchmetrics(ties):
    scores, target = batch(1, ties)
    p, t = torch.tensor(scores), torch.tensor(target).long()
    found = metrics_of(scores, target)
    assert found["ece"][0] == pytest.approx(binary_calibration_error(p.ravel(), t.ravel(), n_bins=15).item(), rel=1e-5)
    assert found["lrap"][0] == pytest.approx(multilabel_ranking_average_precision(p, t, 9).item(), rel=1e-5)
    apart = [len(set(row)) == 9 for row in scores.tolist()]  # torchmetrics takes ties in the order they come in
    loss = metrics_of(scores[apart], target[apart])["ranking_loss"][0] if any(apart) else 0
    assert loss == (pytest.approx(multilabel_ranking_loss(p[apart], t[apart], 9).item(), rel=1e-5) if any(apart) else 0)
    some = target.any(1)  # torchmetrics counts all labels where none is true
    covered = metrics_of(scores[some], target[some])["coverage_error"][0]
    assert covered == pytest.approx(multilabel_coverage_error(p[some], t[some], 9).item(), rel=1e-5)


def test_loss_is_torch_s_where_probabilities_are_0_and_1():
    scores = np.array([[0, 1, 0.25], [1, 0, 1]], np.float32)
    target = np.array([[1, 1, 0], [0, 0, 1]], bool)
    expected = torch.nn.functional.binary_cross_entropy(torch.tensor(scores), torch.tensor(target).float())
    assert metrics_of_small(scores, target)["loss"][0] == pytest.approx(expected.item())


def metrics_of_small(scores, target) -> dict:
    return Scorecard(scores, scores > 0.5, target).at()


def test_ranking_in_pieces(monkeypatch):
    scores, target = batch(2)
    whole = ranking(scores, target)
    monkeypatch.setattr("mlc.metrics.ranking.CHUNK", 30)
    assert CHUNK > 30
    for name, values in ranking(scores, target).items():
        np.testing.assert_array_equal(values, whole[name])


def test_bootstrap_in_pieces(monkeypatch):
    scores, target = batch(2)
    weights = draws(len(scores), 7)
    whole = metrics_of(scores, target, weights)
    monkeypatch.setattr("mlc.metrics.scorecard.BLOCK", 2 * len(scores))
    for name, values in metrics_of(scores, target, weights).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-12)


def test_agrees_with_the_metrics_of_the_training():
    scores, target = batch(3)
    found = metrics_of(scores, target)
    for name, value in multilabel.evaluate(scores, target, groups=GROUPS):
        if name in found:
            assert found[name][0] == pytest.approx(value), name
    for name, value in multilabel.summary(scores, target).items():
        assert found[name][0] == pytest.approx(value), name


def test_classes():
    scores, target = batch(4)
    found = Scorecard(scores, scores > 0.5, target).classes()
    precision, recall, f1, support = sk.precision_recall_fscore_support(target, scores > 0.5, zero_division=0)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        np.testing.assert_allclose(found[name], expected)
    np.testing.assert_allclose(found["ap"], multilabel.average_precision(scores, target))
    assert found["predicted"].tolist() == (scores > 0.5).sum(0).tolist()


def test_label_sets_have_no_ranking():
    scores, target = batch(4)
    found = Scorecard(None, scores > 0.5, target, GROUPS).at()
    whole = metrics_of(scores, target)
    ranked = {"loss", "map", "map/one", "map/other", "ranking_loss", "coverage_error", "lrap", "ece"}
    assert set(whole) - set(found) == ranked
    assert all(found[name][0] == whole[name][0] for name in found)


def test_a_replicate_without_positives_has_no_average_precision():
    target = np.array([[1, 0], [0, 0], [0, 0]], bool)
    scores = np.array([[0.9, 0.1], [0.2, 0.1], [0.3, 0.1]], np.float32)
    found = Scorecard(scores, scores > 0.5, target).at(np.array([[0, 1], [3, 1], [0, 1]], np.uint8))
    assert np.isnan(found["map"][0]) and found["map"][1] == 1
