import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mlc.metrics.thresholds import apply, best_global_threshold, describe, load, of_maximum, rule_of, save, write
from shards.console import UserError

METRICS = ("f1_samples", "f1_micro", "f1_macro")


def value_at(scores, target, threshold, metric) -> float:
    return f1_score(target, scores > scores.dtype.type(threshold), average=metric[3:], zero_division=0)


def brute_force(scores, target, metric) -> float:
    levels = np.unique(scores.astype(np.float64))
    middles = [levels[0] - 1, *(levels[1:] + levels[:-1]) / 2]
    return max(f1_score(target, scores > middle, average=metric[3:], zero_division=0) for middle in middles)


def batch(seed, rows, classes, ties) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = rng.random((rows, classes)) < rng.choice([0.02, 0.2, 0.6])
    target[0, 0] = True
    scores = rng.random((rows, classes)) * (1 + rng.choice([0.0, 0.5, 3.0]) * target)
    scores = (scores / scores.max()).astype(np.float32)
    return (np.round(scores, 1) if ties else scores), target


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_threshold_is_better(metric, ties, seed):
    scores, target = batch(seed, 12, 7, ties)
    threshold, value = best_global_threshold(scores, target, metric)
    assert value == pytest.approx(brute_force(scores, target, metric), abs=1e-12)
    assert value == pytest.approx(value_at(scores, target, threshold, metric), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_threshold_is_better_for_any_small_matrix(data):
    rows, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    cells = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=rows * classes, max_size=rows * classes)
    scores = np.array(data.draw(cells)).reshape(rows, classes)
    target = np.array(data.draw(cells)).reshape(rows, classes) > 0.5
    for metric, average in zip(METRICS, (1, None, 0), strict=True):
        threshold, value = best_global_threshold(scores, target, metric)
        assert value == pytest.approx(max(_f1(scores > t, target, average) for t in (-1, 0, 0.25, 0.5, 1)), abs=1e-12)
        assert value == pytest.approx(_f1(scores > threshold, target, average), abs=1e-12)


def _f1(predicted, target, axis) -> float:
    whole = predicted.sum(axis) + target.sum(axis)
    return float(np.mean(2 * (predicted & target).sum(axis) / np.maximum(whole, 1)))


def test_the_threshold_lies_midway():
    scores, target = np.array([[0.9, 0.5, 0.1]]), np.array([[True, False, False]])
    assert best_global_threshold(scores, target) == (pytest.approx(0.7), 1.0)
    # every label is true: below the lowest score, and above 0
    assert best_global_threshold(scores, np.ones((1, 3), bool)) == (pytest.approx(0.05), pytest.approx(1.0))


@pytest.mark.parametrize("lowest", [0.0, -2.0])
def test_everything_can_be_predicted_at_a_lowest_score_of_zero_or_less(lowest):
    scores, target = np.array([[1.0, lowest]]), np.ones((1, 2), bool)
    threshold, value = best_global_threshold(scores, target)
    assert value == 1.0 and (scores > threshold).all()


def test_neighbouring_float32_scores_are_separated():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    scores, target = np.array([[low, high]]), np.array([[False, True]])
    threshold, value = best_global_threshold(scores, target)
    assert value == 1.0
    np.testing.assert_array_equal(apply(scores, {"global": threshold}), target)


def test_without_labels_the_threshold_is_a_half():
    assert best_global_threshold(np.full((3, 2), 0.4), np.zeros((3, 2))) == (0.5, 0.0)


def test_round_trip_through_the_file(tmp_path):
    scores, target = batch(1, 12, 7, ties=False)
    threshold, value = best_global_threshold(scores, target)
    save(tmp_path / "thresholds.json", metric="f1_samples", threshold=threshold, value=value)
    stored = load(tmp_path / "thresholds.json")
    assert stored == {"metric": "f1_samples", "global": threshold, "value": value}
    np.testing.assert_array_equal(apply(scores, stored), scores > np.float32(threshold))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"global": "high"}', '{"global": NaN}', '{"global": true}'])
def test_a_broken_file_is_one_line(tmp_path, content):
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(UserError, match="--threshold") as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read thresholds"):
        load(tmp_path / "nowhere.json")


def test_the_file_is_plain_json(tmp_path):
    save(tmp_path / "t.json", metric="f1_micro", threshold=np.float32(0.25), value=np.float64(0.5))
    assert json.loads((tmp_path / "t.json").read_text()) == {"metric": "f1_micro", "global": 0.25, "value": 0.5}


def test_a_rule_is_a_number_or_a_file(tmp_path):
    save(tmp_path / "t.json", metric="f1_micro", threshold=0.25, value=0.5)
    assert rule_of("0.25")["global"] == rule_of(str(tmp_path / "t.json"))["global"] == 0.25
    for text, words in (("nan", "expected a number or"), ("high", "expected a number or"), ("no.json", "cannot read")):
        with pytest.raises(UserError, match=words):
            rule_of(text)


# ---- other rules -----------------------------------------------------------------------------------------------------

SCORES = np.array([[0.9, 0.5, 0.1], [0.2, 0.3, 0.05], [0.0, 0.0, 0.0]], np.float32)
CLASS_KIND = {"a": 0.95, "b": 0.25, "c": 0.01}
TOP_K = {
    "rule": "top-k",
    "classes": ["a", "b", "c"],
    "groups": {
        "x": {"threshold": 0.4, "min": 1, "max": 1, "classes": ["c", "a"]},
        "y": {"threshold": 0.4, "min": 0, "max": 1, "classes": ["b"]},
    },
}
RULES = {
    "label-count": ({"rule": "label-count"}, [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
    "class": ({"rule": "class", "classes": CLASS_KIND}, [[0, 1, 1], [0, 1, 1], [0, 0, 0]]),
    "max-fraction": ({"rule": "max-fraction", "fraction": 0.6}, [[1, 0, 0], [1, 1, 0], [0, 0, 0]]),
    "top-k": (TOP_K, [[1, 1, 0], [1, 0, 0], [0, 0, 0]]),
    "expected": ({"rule": "expected", "beta": 1.0}, [[1, 1, 0], [1, 1, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("kind", RULES)
def test_each_rule_is_applied_as_its_file_says(kind, tmp_path):
    rule, expected = RULES[kind]
    write(tmp_path / "thresholds.json", rule | {"metric": "f1_samples", "global": 0.4})
    stored = load(tmp_path / "thresholds.json")
    np.testing.assert_array_equal(apply(SCORES, stored), np.array(expected, bool))
    order = [2, 0, 1]
    moved = apply(SCORES[:, order], stored, ["c", "a", "b"])
    np.testing.assert_array_equal(moved, np.array(expected, bool)[:, order])
    assert describe(stored)


def test_a_fraction_of_the_maximum():
    np.testing.assert_allclose(of_maximum(SCORES), [[1, 5 / 9, 1 / 9], [2 / 3, 1, 1 / 6], [0, 0, 0]], rtol=1e-6)


def test_other_classes_are_refused_by_name():
    rule = {"rule": "class", "classes": CLASS_KIND, "global": 0.4}
    with pytest.raises(UserError, match="such as 'c'"):
        apply(SCORES, rule, ["a", "b", "d"])
    with pytest.raises(UserError, match="3 and not 2"):
        apply(SCORES[:, :2], rule)


@pytest.mark.parametrize(
    "content",
    [
        {"rule": "clas"},
        {"rule": "class"},
        {"rule": "class", "classes": {"a": "high"}},
        {"rule": "group", "classes": {}},
        {"rule": "max-fraction"},
        {"rule": "expected", "beta": 0},
        {"rule": "top-k", "classes": ["a"], "groups": {}},
        TOP_K | {"classes": ["a", "b"]},
        TOP_K | {"classes": ["a", 1, "c"]},
        TOP_K | {"groups": {"x": {"threshold": 0.4, "min": 2, "max": 1, "classes": ["a", "b", "c"]}}},
        TOP_K | {"groups": {"x": {"threshold": 0.4, "min": 0.5, "max": 1, "classes": ["a", "b", "c"]}}},
    ],
)
def test_a_rule_without_what_it_needs_is_one_line(tmp_path, content):
    write(tmp_path / "thresholds.json", content | {"global": 0.4})
    with pytest.raises(UserError, match=r"thresholds\.json") as error:
        load(tmp_path / "thresholds.json")
    assert len(str(error.value).splitlines()) == 1
