"""The counts against a plain count over the CSV."""

import csv
import json
import statistics
from collections import Counter

import pytest
from packing import pack_raw, write_raw

from shards import stats
from shards.console import run


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = write_raw(tmp_path_factory.mktemp("stats") / "raw", samples=30, test=4)
    (folder / "classes.yaml").write_text(
        "classes: ['4', '3', '2', '1', '0', never]\ngroups: {low: ['0', '1'], high: ['3', '4', never]}"
    )
    return folder


@pytest.fixture(scope="module")
def out(raw):
    assert pack_raw(raw, raw.parent / "out", "--test-csv", raw / "test.csv", "--folds", "4") == 0
    return raw.parent / "out"


def as_json(capsys, *argv) -> dict:
    capsys.readouterr()
    assert run(stats.main, [*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts(raw, out, capsys):
    with (raw / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [row["Labels"].split() for row in rows]
    counts = Counter(label for row in labels for label in row)
    captions = [len(row["Caption"]) for row in rows if row["Caption"]]
    found = as_json(capsys, out)["splits"]
    train = found["train"]
    assert train["classes"] == {name: counts[name] for name in ("4", "3", "2", "1", "0", "never")}
    assert train["groups"] == {"low": counts["0"] + counts["1"], "high": counts["3"] + counts["4"]}
    assert train["samples"] == 30
    assert train["without_labels"] == sum(not row for row in labels)
    sizes = Counter(map(len, labels))
    assert train["label_counts"] == [sizes[n] for n in range(max(sizes) + 1)]
    assert train["labels_per_image"] == round(statistics.mean(map(len, labels)), 4)
    assert train["captions"] == {
        "with_caption": len(captions),
        "characters_max": max(captions),
        "characters_mean": round(statistics.mean(captions), 2),
        "characters_median": statistics.median(captions),
    }
    assert sorted(train["folds"]) == [7, 7, 8, 8]
    assert train["bytes"] == (out / "train-000000.tar").stat().st_size
    assert set(found["test"]) == {"samples", "shards", "bytes", "captions"}


def test_one_split(out, capsys):
    assert list(as_json(capsys, out, "--split", "test")["splits"]) == ["test"]
    assert run(stats.main, [str(out), "--split", "val"]) == 2
    assert "has no split 'val'; it has: train, test" in capsys.readouterr().err


def test_tables_for_people(out, capsys):
    capsys.readouterr()
    assert run(stats.main, [str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("6 classes, 2 groups", "samples per fold", "all of low", "never", "labels per image", "30"):
        assert text in shown
    assert "0 (0.0%)" in shown


def test_names_are_not_markup(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=2, classes=1)
    text = (raw / "train.csv").read_text()
    (raw / "train.csv").write_text(text.replace("0.jpg,0", "0.jpg,[red]bold[/red]"))
    assert pack_raw(raw, tmp_path / "out", "--label-separator", " ") == 0
    capsys.readouterr()
    assert run(stats.main, [str(tmp_path / "out")]) == 0
    assert "[red]bold[/red]" in capsys.readouterr().out
