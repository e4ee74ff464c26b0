"""Every optimum against all thresholds there are, values against scikit-learn's."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import fbeta_score

from mlc.metrics import threshold_search
from mlc.metrics.multilabel import value_of
from mlc.metrics.threshold_search import Metric, best_thresholds
from shards.console import UserError

METRICS = [
    Metric(beta, average, zero)
    for beta, average, zero in itertools.product((0.5, 1.0, 2.0), ("samples", "micro", "macro"), (0, 1))
]
ids = [f"{metric.name}-{metric.zero_division}" for metric in METRICS]


def value(predicted, target, metric) -> float:
    return value_of(metric, predicted, target)


def levels(scores) -> list[float]:
    """One threshold for every set of labels that one threshold can give."""
    found = np.unique(scores.astype(np.float64))
    return [found[0] - 1, *((found[1:] + found[:-1]) / 2), found[-1] + 1]


def above(scores, blocks, thresholds, rest=1.0) -> np.ndarray:
    column = np.full(scores.shape[1], rest)
    for block, threshold in zip(blocks, thresholds, strict=True):
        column[block] = threshold
    return scores > column.astype(scores.dtype)


def small(seed, rows=7, classes=4, ties=True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random((rows, classes)) < rng.choice([0.1, 0.3, 0.7], size=classes)
    target[0, 0] = True
    scores = rng.random((rows, classes)) + rng.choice([0.0, 0.6]) * target
    scores = (scores / scores.max()).astype(np.float32)
    return (np.ceil(scores * 5) / 5 if ties else scores), target


@pytest.mark.parametrize("metric", METRICS, ids=ids)
@pytest.mark.parametrize("ties", [False, True])
def test_no_global_threshold_is_better(metric, ties):
    for seed in range(8):
        scores, target = small(seed, 9, 6, ties)
        (threshold,), found = best_thresholds(scores, target, metric)
        predicted = scores > threshold
        assert found == pytest.approx(max(value(scores > t, target, metric) for t in levels(scores)), abs=1e-12)
        how = {"average": metric.average, "zero_division": metric.zero_division}
        theirs = fbeta_score(target, predicted, beta=metric.beta, **how)
        assert found == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("metric", [m for m in METRICS if m.average != "samples"], ids=str)
@pytest.mark.parametrize("blocks", [[[0], [1], [2], [3]], [[0, 2], [1, 3]], [[2], [0, 1]]], ids=str)
def test_no_other_thresholds_are_better(metric, blocks):
    """Micro and macro: exact whatever shares a threshold. Column 3 of the last blocks stays where it is."""
    for seed in range(6):
        scores, target = small(seed)
        found, reached = best_thresholds(scores, target, metric, blocks, start=0.5)
        assert reached == pytest.approx(value(above(scores, blocks, found, 0.5), target, metric), abs=1e-12)
        every = itertools.product(*(levels(scores[:, block]) for block in blocks))
        best = max(value(above(scores, blocks, thresholds, 0.5), target, metric) for thresholds in every)
        assert reached == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("metric", [m for m in METRICS if m.average == "samples"], ids=str)
@pytest.mark.parametrize("blocks", [[[0], [1], [2], [3]], [[0, 2], [1, 3]]], ids=str)
def test_no_single_move_is_better_for_the_mean_over_samples(metric, blocks):
    """Coordinate ascent: nothing better than the very best is claimed, and nothing near is better."""
    reached_best = []
    for seed in range(8):
        scores, target = small(seed)
        (start,), global_value = best_thresholds(scores, target, metric)
        found, reached = best_thresholds(scores, target, metric, blocks, start)
        assert reached == pytest.approx(value(above(scores, blocks, found), target, metric), abs=1e-12)
        assert reached >= global_value - 1e-12
        for number, block in enumerate(blocks):
            for threshold in levels(scores[:, block]):
                other = [*found[:number], threshold, *found[number + 1 :]]
                assert value(above(scores, blocks, other), target, metric) <= reached + 1e-12
        every = itertools.product(*(levels(scores[:, block]) for block in blocks))
        best = max(value(above(scores, blocks, thresholds), target, metric) for thresholds in every)
        assert reached <= best + 1e-12
        reached_best.append(reached > best - 1e-12)
    assert sum(reached_best) >= 4  # it may end elsewhere, and mostly does not


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_small_matrix(data):
    rows, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    cells = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=rows * classes, max_size=rows * classes)
    scores = np.array(data.draw(cells), np.float32).reshape(rows, classes)
    target = np.array(data.draw(cells)).reshape(rows, classes) > 0.5
    metric = data.draw(st.sampled_from(METRICS))
    blocks = [[column] for column in range(classes)]
    found, reached = best_thresholds(scores, target, metric, blocks, start=0.3)
    assert reached == pytest.approx(value(above(scores, blocks, found), target, metric), abs=1e-12)
    every = itertools.product(*([-1, 0, 0.25, 0.5, 1] for _ in blocks))
    best = max(value(above(scores, blocks, thresholds), target, metric) for thresholds in every)
    assert reached <= best + 1e-12 and (metric.average == "samples" or reached >= best - 1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=ids)
@pytest.mark.parametrize("gap", [0, 1, 4])
@pytest.mark.parametrize("shallow", [1, 12])
def test_leaving_the_low_scores_out_changes_nothing(metric, gap, shallow, monkeypatch):
    """`shallow`: with so much less room that a search must go deeper several times, rows in pieces."""
    floor = threshold_search._floor
    monkeypatch.setattr(threshold_search, "_floor", lambda s, columns, count: floor(s, columns, count // shallow))
    monkeypatch.setattr(threshold_search, "CHUNK", threshold_search.CHUNK if shallow == 1 else 700)
    rng = np.random.default_rng(gap)
    target = rng.random((200, 60)) < 0.01
    scores = (1 / (1 + np.exp(5 - gap * target - rng.standard_normal(target.shape)))).astype(np.float32)
    cases = [[slice(None)], [list(range(20)), list(range(20, 60))], [[column] for column in range(60)]]
    starts = [None, 0.02, 0.02]
    pruned = [best_thresholds(scores, target, metric, *case) for case in zip(cases, starts, strict=True)]
    if gap == 4:
        block = threshold_search.Block(scores, target, metric, slice(None), None)
        assert len(block.entries.scores) < scores.size / 4
    monkeypatch.setattr(threshold_search, "_floor", lambda *_: -np.inf)
    for case, start, (thresholds, reached) in zip(cases, starts, pruned, strict=True):
        whole, whole_value = best_thresholds(scores, target, metric, case, start)
        assert reached == pytest.approx(whole_value, abs=1e-12)
        assert thresholds == whole


def test_a_search_goes_deeper_when_it_began_too_high(monkeypatch):
    """A class whose positives have the lowest scores, with room for a handful."""
    monkeypatch.setattr(threshold_search.Block, "_keep", _shallow(threshold_search.Block._keep))
    target = np.zeros((100, 1), bool)
    target[:30] = True
    scores = np.linspace(0.1, 0.9, 100, dtype=np.float32)[:, None]
    for metric in METRICS:
        _, found = best_thresholds(scores, target, metric)
        assert found == pytest.approx(max(value(scores > t, target, metric) for t in levels(scores)), abs=1e-12)


def _shallow(keep):
    return lambda block, count: keep(block, 5 if count > 300 else count)


def test_a_class_that_is_better_never_predicted():
    scores = np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    target = np.array([[True, False], [True, False]])
    found, reached = best_thresholds(scores, target, Metric(), [[0], [1]], start=0.5)
    assert reached == 1 and not (scores[:, 1] > found[1]).any()


def test_without_gain_the_threshold_stays():
    scores, target = np.array([[0.9, 0.8]], np.float32), np.array([[True, True]])
    assert best_thresholds(scores, target, Metric(), [[0], [1]], start=0.5) == ([0.5, 0.5], 1.0)


@pytest.mark.parametrize("name", ["f1", "f_samples", "f1_weighted", "f0_micro", "samples", "f-1_micro", ""])
def test_no_such_metric(name):
    with pytest.raises(UserError, match="is no metric"):
        Metric.of(name)


def test_names_of_metrics():
    assert Metric.of("f1_samples") == Metric() and Metric.of("f1.5_micro") == Metric(1.5, "micro")
    assert Metric(0.5, "macro").name == "f0.5_macro" and Metric.of(Metric(2).name) == Metric(2)
    for metric in METRICS:
        assert Metric.of_rule(metric.described) == metric
    assert Metric.of_rule({"global": 0.5}) == Metric.of_rule({"metric": None}) == Metric()


@pytest.mark.parametrize("labelled", [0, 2])
def test_labels_on_images_that_have_none_can_be_made_to_cost(labelled):
    """Twenty images without labels look like the two that have one: it is best to predict nothing."""
    scores = np.linspace(0.5, 0.9, 22, dtype=np.float32)[:, None]
    target = np.arange(22)[:, None] < labelled
    (threshold,), reached = best_thresholds(scores, target, Metric(zero_division=1))
    assert 0.9 < threshold < 1 and reached == (22 - labelled) / 22
    (threshold,), _ = best_thresholds(scores, target, Metric())
    assert not labelled or threshold < 0.5
