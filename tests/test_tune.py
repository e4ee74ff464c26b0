"""`mlc tune` as a user calls it, and what predictions then do with its file."""

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score

from mlc.cli import main
from mlc.data.prediction_files import write_probabilities
from mlc.metrics import thresholds
from mlc.metrics.multilabel import fbeta
from shards.dataset import load_dataset, open_index

CLASSES = ["ant", "bee", "cow", "dog"]
YAML = "classes: [ant, bee, cow, dog]\ngroups: {insect: [ant, bee]}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 images: predictions `p.csv`, the truth `truth.csv` in another order, `classes.yaml` with a group."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-0.5, 1.5, (60, 4))
    target = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    ids = [f"{number}.jpg" for number in range(60)]
    write_probabilities(tmp_path / "p.csv", ids, CLASSES, scores)
    rows = [(name, " ".join(np.array(CLASSES)[true])) for name, true in zip(ids, target, strict=True)]
    with (tmp_path / "truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("ImageID", "Labels"), *rows[::-1]])
    (tmp_path / "classes.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "known.npz", scores=scores, target=target)
    return tmp_path


def known(folder):
    with np.load(folder / "known.npz") as file:
        return file["scores"], file["target"]


def tuned(capsys, *argv) -> dict:
    capsys.readouterr()
    assert main(["tune", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


TRUTH = ("--truth", "truth.csv", "--classes", "classes.yaml")


@pytest.mark.parametrize("metric", ["f1_samples", "f2_micro", "f1.5_macro"])
def test_all_rules_and_the_best_honest_one_is_written(folder, capsys, metric):
    found = tuned(capsys, "p.csv", *TRUTH, "--metric", metric, "--min-positives", 1, "--out", "out/t.json")
    assert list(found["rules"]) == list(thresholds.RULES)
    best = max(found["rules"].values(), key=lambda own: own["honest"])
    assert found["rules"][found["chosen"]] == best
    stored = thresholds.load("out/t.json")
    assert stored == found["thresholds"] and stored["rule"] == found["chosen"] and stored["honest"] == best["honest"]
    assert (folder / "out" / "t.png").exists()
    curves = json.loads((folder / "out" / "t-curves.json").read_text())
    assert curves["metric"] == metric and list(curves["groups"]) == ["insect", "other classes"]


@pytest.mark.parametrize("rule", thresholds.RULES)
def test_one_rule_and_its_value(folder, capsys, rule):
    found = tuned(capsys, "p.csv", *TRUTH, "--rule", rule, "--metric", "f2_samples", "--out", "t.json")
    scores, target = known(folder)
    stored = thresholds.load("t.json")
    value = fbeta(thresholds.apply(scores, stored, CLASSES), target, average="samples", beta=2.0)
    assert stored["rule"] == rule and stored["value"] == pytest.approx(value) == found["rules"][rule]["in_sample"]


def test_the_table_for_people(folder, capsys):
    assert main(["tune", "p.csv", "--truth", "truth.csv"]) == 0
    printed = capsys.readouterr()
    assert "honest" in printed.out and "max-fraction" in printed.out and "group" not in printed.out
    assert "nothing written" in printed.err
    assert sorted(path.name for path in folder.iterdir()) == ["classes.yaml", "known.npz", "p.csv", "truth.csv"]


def test_parts_arrow_and_another_order_give_the_same(folder, capsys):
    whole = tuned(capsys, "p.csv", *TRUTH)
    scores, _ = known(folder)
    ids = [f"{number}.jpg" for number in range(60)]
    write_probabilities(folder / "first.csv", ids[40:], CLASSES, scores[40:])
    order = [2, 0, 3, 1]
    names = {"ImageID": ids[:40][::-1], "extra": [5.0] * 40}
    table = pa.table(names | {CLASSES[c]: scores[:40][::-1, c] for c in order})
    with pa.OSFile("second.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert tuned(capsys, "first.csv", "second.arrow", *TRUTH) == whole


def test_a_packed_data_set_and_a_run(shards, tmp_path, capsys):
    """Written into the run, where `mlc predict` and `mlc eval` look for it."""
    dataset = load_dataset(shards)
    index = open_index(dataset, "val")
    target = index.targets(np.arange(len(index)))
    noise = np.random.default_rng(0).normal(0, 0.3, target.shape)
    scores = np.clip(0.2 + 0.4 * target + noise, 0, 1).astype(np.float32)
    ids = [index.image_id(row) for row in range(len(index))]
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best" / "config.json").write_text(json.dumps({"label_names": list(dataset.classes)}))
    write_probabilities(run / "predictions" / "val.csv", ids, dataset.classes, scores)
    (run / "predictions" / "val.json").write_text('{"map": 0.5, "f1_samples@run": 0.1}')  # as `mlc eval` left it
    found = tuned(capsys, "--run", run, "--data", shards, "--split", "val")
    assert set(found["rules"]) == set(thresholds.RULES)
    stored = thresholds.load(run / "best" / "thresholds.json")
    assert stored == found["thresholds"] and (run / "best" / "thresholds.png").exists()
    own = thresholds.apply(scores, stored, dataset.classes)
    assert fbeta(own, target > 0.5, average="samples") == pytest.approx(stored["value"])
    noted = json.loads((run / "predictions" / "val.json").read_text())
    assert noted == {"map": 0.5, "f1_samples@run": pytest.approx(stored["value"])}  # what `mlc compare` shows
    (run / "best" / "config.json").write_text(json.dumps({"label_names": ["other"]}))
    assert main(["tune", "--run", str(run), "--data", str(shards)]) == 2
    assert "other classes" in capsys.readouterr().err


def rewritten(path, change):
    rows = list(csv.reader(path.open(newline="")))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(change(rows))


BAD = {
    "a row is missing": (lambda rows: rows[:-1], "no row for 1 of the 60 images of truth.csv, such as 59.jpg"),
    "a column is missing": (lambda rows: [row[:-1] for row in rows], "no column for 1 of the 4 classes, such as 'dog'"),
    "a row is twice": (lambda rows: [*rows, rows[-1]], "image 59.jpg comes more than once"),
    "not a number": (lambda rows: [*rows[:-1], [rows[-1][0], "nan", *rows[-1][2:]]], "59.jpg, class ant"),
    "not a probability": (lambda rows: [*rows[:-1], [rows[-1][0], "1.5", *rows[-1][2:]]], "59.jpg, class ant"),
    "no predictions": (lambda rows: [["a", "b"], ["1", "2"]], "no column ImageID"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_predictions_are_one_line(folder, capsys, case):
    change, said = BAD[case]
    rewritten(folder / "p.csv", change)
    refused(capsys, said, "p.csv", *TRUTH)


def refused(capsys, said, *argv):
    capsys.readouterr()
    assert main(["tune", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    "argv, said",
    [
        (["p.csv"], "either --data DIR"),
        (["p.csv", "--truth", "truth.csv", "--data", "x"], "either --data DIR"),
        (["--truth", "truth.csv"], "give prediction files"),
        (["p.csv", *TRUTH, "--metric", "f1"], "is no metric"),
        (["p.csv", "--truth", "truth.csv", "--rule", "group"], "no groups"),
        (["p.csv", "p.csv", *TRUTH], "is also in p.csv"),
        (["p.csv", *TRUTH, "--folds", "61"], "only 60 images"),
        (["p.csv", "--truth", "nowhere.csv"], "nowhere.csv"),
        (["p.txt", *TRUTH], "p.txt"),
        (["p.csv", *TRUTH, "--where", "n_labels > 1"], "--fold and --where"),
        (["p.csv", *TRUTH, "--run", "nowhere"], "no such folder"),
    ],
)
def test_bad_flags_are_one_line(folder, capsys, argv, said):
    refused(capsys, said, *argv)


def test_bad_truth_is_one_line(folder, capsys):
    rewritten(folder / "truth.csv", lambda rows: [*rows, ["0.jpg", "ant"]])
    refused(capsys, "truth.csv line 62: image 0.jpg comes more than once, first in line 61", "p.csv", *TRUTH)
    rewritten(folder / "truth.csv", lambda rows: [*rows[:-2], ["0.jpg", "antt"]])
    said = "truth.csv line 61: label 'antt' is none of the 4 classes of classes.yaml; did you mean ant?"
    refused(capsys, said, "p.csv", *TRUTH)
    refused(capsys, "no column for 1 of the 5 classes, such as 'antt'", "p.csv", "--truth", "truth.csv")
    rewritten(folder / "truth.csv", lambda rows: [rows[0], *([name, ""] for name, _ in rows[1:])])
    refused(capsys, "no image has a label", "p.csv", *TRUTH)


@pytest.mark.parametrize("flags", [["--folds", "1"], ["--shrink", "-1"], ["--shrink", "nan"], ["--rule", "best-of"]])
def test_flags_that_cannot_be(folder, flags):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "p.csv", *TRUTH, *flags])
    assert ended.value.code == 2


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "mlc tune --run" in capsys.readouterr().out


def test_labels_on_images_without_any_cost_where_they_should(folder, capsys):
    """The convention is in the file, so that what reads it scores and decides in the same way."""
    scores, target = known(folder)
    bare = int((~target.any(1)).sum())
    for zero in (0, 1):
        flags = ["--rule", "global", "--zero-division", str(zero), "--out", "t.json"]
        assert main(["tune", "p.csv", *TRUTH, *flags]) == 0
        assert f"{bare} of 60 samples have no true label: each counts {zero}" in capsys.readouterr().err
        stored = thresholds.load("t.json")
        assert stored.get("zero_division", 0) == zero
        assert main(["eval", "p.csv", "truth.csv", "--threshold", "t.json", "--json"]) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        expected = f1_score(target, scores > stored["global"], average="samples", zero_division=zero)
        assert found["f1_samples"] == pytest.approx(expected) == found["f1_samples@tuned"] == stored["value"]
        assert found["threshold"] == stored["global"] and f"each counts {zero}" in printed.err
    (folder / "t.json").write_text('{"global": 0.5, "zero_division": "warn"}')
    assert main(["eval", "p.csv", "truth.csv", "--threshold", "t.json"]) == 2
    assert "\"zero_division\" must be 0 or 1, not 'warn'" in capsys.readouterr().err
