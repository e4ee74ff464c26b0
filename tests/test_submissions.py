"""Submissions as a competition wants them: its columns and its separator, written, read, scored and combined."""

import json

import numpy as np
import pytest
from PIL import Image

from mlc import ensemble, scores
from mlc.data.filters import read_names
from mlc.data.prediction_files import read_predictions, write_csv, write_probabilities, write_submission
from shards import pack
from shards.cells import nfc
from shards.console import UserError, run
from shards.dataset import load_dataset
from shards.table import Columns

SETS = [("No Finding",), ("Mass", "No Finding"), (), ("Mass",)]
IDS = [f"{number}.jpg" for number in range(4)]
CLASSES = ("Mass", "No Finding")
TARGET = np.array([[name in labels for name in CLASSES] for labels in SETS])
FLAGS = ["--id-column", "id", "--labels-column", "finding", "--label-separator", "|"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """data, a packed data set; perfect.csv, a submission; truth.csv and usual.csv, the same with the usual columns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for number, name in enumerate([*IDS, "t.jpg"]):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "raw" / name)
    rows = [[name, "|".join(labels)] for name, labels in zip(IDS, SETS, strict=True)]
    write_csv(tmp_path / "raw" / "train.csv", ["id", "finding"], rows)
    write_csv(tmp_path / "raw" / "test.csv", ["id"], [["t.jpg"]])
    tables = ["--csv", "raw/train.csv", "--test-csv", "raw/test.csv", "--images", "raw"]
    assert pack.main([*tables, "--out", "data", "-j1", *FLAGS]) == 0
    columns = load_dataset("data").columns
    write_submission(tmp_path / "perfect.csv", IDS[::-1], CLASSES, TARGET[::-1], columns)
    for name in ("truth.csv", "usual.csv"):
        write_csv(tmp_path / name, ["ImageID", "Labels"], rows)
    return tmp_path


def said(capsys, verb, *argv: str) -> str:
    code = run(verb.main, [*argv])
    found = capsys.readouterr()
    assert code == 2 and found.err.count("\n") == 1, found.err
    return found.err


def test_a_submission_has_the_columns_of_the_data_set(world):
    lines = (world / "perfect.csv").read_text().splitlines()
    assert lines == ["id,finding", "3.jpg,Mass", "2.jpg,", "1.jpg,Mass|No Finding", "0.jpg,No Finding"]


@pytest.mark.parametrize(
    "argv",
    [
        ["perfect.csv", "--data", "data", "--split", "train"],
        ["usual.csv", "truth.csv", "--label-separator", "|"],
        ["perfect.csv", "raw/train.csv", *FLAGS],
    ],
)
def test_a_perfect_submission_is_perfect(world, capsys, argv):
    assert run(scores.main, [*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["f1_macro"] == 1 and [row["name"] for row in found["classes"]] == list(CLASSES)


@pytest.mark.parametrize(
    "flags", [["--data", "data", "--split", "train"], ["--data", "data", "--split", "test"], FLAGS]
)
def test_a_vote_keeps_the_names(world, flags):
    vote = ["--vote", "perfect.csv", "again.csv", *flags, "--out", "vote.csv"]
    (world / "again.csv").write_text((world / "perfect.csv").read_text())
    assert run(ensemble.main, vote) == 0
    assert (world / "vote.csv").read_text() == (world / "perfect.csv").read_text()


def test_a_mean_of_names_with_blanks(world, capsys):
    for name in "ab":
        write_probabilities(world / f"{name}.csv", IDS, CLASSES, TARGET * np.float32(0.9))
    assert run(ensemble.main, ["a.csv", "b.csv", "--threshold", "0.5", "--out", "out.csv"]) == 0
    assert "'|' stands between labels" in capsys.readouterr().err
    assert "1.jpg,Mass|No Finding\n" in (world / "out-submission.csv").read_text()
    flags = ["a.csv", "b.csv", "--threshold", "0.5", "--out", "out.csv", "--label-separator", " "]
    assert "class 'No Finding' contains ' '" in said(capsys, ensemble, *flags)


def test_a_label_that_is_no_class_is_a_mistake(world, capsys):
    text = (world / "perfect.csv").read_text()
    (world / "typo.csv").write_text(text.replace("3.jpg,Mass", "3.jpg,Mas"))
    (world / "classes.yaml").write_text("classes: [Mass, No Finding, Mas]")
    split = ["--data", "data", "--split", "train"]
    words = "typo.csv line 2: label 'Mas' is none of the 2 classes of "
    vote = ["--vote", "typo.csv", "perfect.csv", "--out", "vote.csv"]
    for found in (said(capsys, scores, "typo.csv", *split), said(capsys, ensemble, *vote, *split)):
        assert words in found and "; did you mean Mass?" in found
    table = ["raw/train.csv", *FLAGS]
    assert "--classes FILE names those" in said(capsys, scores, "typo.csv", *table)
    assert "--classes FILE names" in said(capsys, ensemble, *vote, "--truth", *table)
    assert run(scores.main, ["typo.csv", *table, "--classes", "classes.yaml"]) == 0


def test_other_columns_are_named_by_flags(world, capsys):
    found = said(capsys, ensemble, "--vote", "perfect.csv", "perfect.csv", "--out", "x.csv")
    assert "named twice" in found
    found = said(capsys, ensemble, "--vote", "perfect.csv", "raw/train.csv", "--out", "x.csv")
    assert "--id-column and --labels-column name their columns" in found
    unlabelled = ["--data", "data", "--split", "test", "--compare", "--out", "x.csv"]
    assert "has no labels" in said(capsys, ensemble, "--vote", "perfect.csv", "raw/train.csv", *unlabelled)
    found = said(capsys, ensemble, "--vote", "usual.csv", "truth.csv", "--out", "x.csv")
    assert "give --label-separator '|'" in found


def test_a_list_of_images_may_be_a_part_of_the_table(world):
    assert read_names(world / "perfect.csv", "id") == IDS[::-1]


def test_classes_in_the_other_form_of_unicode(tmp_path):
    write_probabilities(tmp_path / "p.csv", IDS, ["cafe\u0301"], np.full((4, 1), 0.5, np.float32))
    _, found = read_predictions(tmp_path / "p.csv", [nfc("cafe\u0301")])
    assert found.tolist() == [[0.5]] * 4
    with pytest.raises(UserError, match="no column for 1 of the 1 classes, such as 'cafe'"):
        read_predictions(tmp_path / "p.csv", ["cafe"])


def test_a_damaged_note_of_the_columns(world):
    file = world / "data" / "dataset.json"
    content = json.loads(file.read_text())
    for columns in ({"separator": ""}, {"separator": 1}, ["id"], {"label": "x"}):
        file.write_text(json.dumps(content | {"columns": columns}))
        with pytest.raises(UserError, match=r"dataset.json: columns must be names for caption, image_id"):
            load_dataset("data")
    file.write_text(json.dumps(content | {"columns": {"image_id": "id"}}))
    assert load_dataset("data").columns == Columns("id", separator=" ")
