import numpy as np
import pytest

from mlc.metrics.multilabel import value_of
from mlc.metrics.threshold_search import Metric
from mlc.report import threshold_curves
from mlc.report.threshold_curves import curves, plot

GROUPS = {"x": [0, 2], "y": [1, 3, 4]}


@pytest.mark.parametrize("name, zero", [("f1_samples", 0), ("f1_samples", 1), ("f2_macro", 1), ("f0.5_micro", 0)])
def test_every_point_is_the_metric_at_that_threshold(name, zero, monkeypatch):
    rng, metric = np.random.default_rng(0), Metric.of(name, zero)
    scores = np.round(rng.random((30, 5)) * 40).astype(np.float32) / 40  # some scores are thresholds
    target = rng.random(scores.shape) < 0.4
    monkeypatch.setattr(threshold_curves, "CHUNK", 35)
    found = curves(scores, target, metric, GROUPS)
    for curve, columns in ((found["all"], [0, 1, 2, 3, 4]), *((found["groups"][g], c) for g, c in GROUPS.items())):
        own, true = scores[:, columns], target[:, columns]
        for place in range(0, 199, 9):
            predicted = own > found["threshold"][place]
            hits = (predicted & true).sum()
            expected = value_of(metric, predicted, true)
            assert curve["value"][place] == pytest.approx(expected, abs=1e-6)
            assert curve["precision"][place] == pytest.approx(hits / max(predicted.sum(), 1), abs=1e-6)
            assert curve["recall"][place] == pytest.approx(hits / true.sum(), abs=1e-6)
            assert curve["labels"][place] == pytest.approx(predicted.sum() / 30, abs=1e-6)


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_the_picture_is_a_picture(tmp_path, groups):
    scores = np.random.default_rng(0).random((20, 5)).astype(np.float32)
    found = curves(scores, scores > 0.5, Metric(), groups)
    rules = {"global": {"in_sample": 0.8, "honest": 0.7}, "class": {"in_sample": 0.9, "honest": 0.6}}
    plot(tmp_path / "t.png", found, rules, "global")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
