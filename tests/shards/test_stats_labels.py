"""`mlc stats --labels`: correlations as NumPy's, classes that nobody has, tables for people and JSON for programs."""

import json

import numpy as np
import pytest
from indexes import CLASSES, make_index

from shards import stats
from shards.console import run
from shards.stats_labels import LEAST_EXPECTED, correlations, pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return folder, make_index(folder, 400, seed=5)


def test_correlations_are_those_of_the_columns(data):
    target = data[1].targets(np.arange(400))
    found = correlations((target.T @ target).astype(int), 400)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(target.T)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(found[4]).all()  # nobody has it


def test_pairs_are_those_that_meet_or_could():
    both = np.array([[60, 30, 0, 0], [30, 40, 0, 1], [0, 0, 20, 0], [0, 1, 0, 2]])
    found = {(p["one"], p["other"]): p for p in pairs(both, 100, "abcd")}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c"), ("b", "d")}  # c and d: 0.4 expected, none seen
    assert found["a", "c"] | {"correlation": 0} == {
        "one": "a",
        "other": "c",
        "correlation": 0,
        "images": 0,
        "expected": 12.0,
    }
    assert found["a", "c"]["correlation"] < 0 < found["a", "b"]["correlation"] and LEAST_EXPECTED < 8


def test_the_verb(data, capsys):
    assert run(stats.main, [str(data[0]), "--labels", "--json"]) == 0
    split = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert split["never"] == ["nothing"]
    target = data[1].targets(np.arange(400)) > 0.5
    only = target[target.sum(1) == 1].sum(0) / np.maximum(target.sum(0), 1)
    assert split["alone"] == {name: round(float(only[c]), 4) for c, name in enumerate(CLASSES[:4])}
    assert run(stats.main, [str(data[0]), "--labels"]) == 0
    said = capsys.readouterr().out
    assert "labels that go together in train" in said and "tag::a=b" in said
    assert "no sample in train, so nothing can be learnt or measured there: nothing" in said
    with pytest.raises(SystemExit):
        stats.main([str(data[0]), "--labels", "--captions"])
    assert "leave --captions and --html out" in capsys.readouterr().err
    assert run(stats.main, [str(data[0]), "--labels", "--split", "nope"]) == 2
