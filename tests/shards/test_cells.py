"""Cells of labels: lists as pandas writes them, separators that nobody named, names that look alike."""

import json
import unicodedata
from pathlib import Path

import pytest
from packing import opened, pack_raw, write_raw, write_table

from shards.cells import check_separator, free_separator, split_labels
from shards.console import UserError
from shards.dataset import load_dataset
from shards.table import Columns


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['cat', 'dog']", ("cat", "dog")),
        ('["No Finding", "Mass"]', ("No Finding", "Mass")),
        ("[1, 2.0, 12345678901234567890]", ("1", "2", "12345678901234567890")),
        ('["caf\\u00e9", "\\ud83d\\ude00"]', ("café", "😀")),
        ("['it\\'s', u'x', ]", ("it's", "x")),
        ("[]", ()),
        ("cafe\u0301 x", ("café", "x")),
        ("['cat' 'dog']", ("['cat'", "'dog']")),  # numpy: Python would make one text of both
    ],
)
def test_the_labels_of_a_cell(cell, labels):
    assert split_labels(cell, None) == labels


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (["cat|dog", "cat", "owl", "dog|cat"], "--label-separator '|' (3 classes: cat, dog, owl)"),
        (["cat;dog", "dog;cat"], "2 of 2 cells of Labels have ';'"),
        (["cat,dog"], "or --label-separator ' ' to split at blanks alone (1: cat,dog)"),
        (["No Finding", "No Finding|Mass", "Mass"], "(2 classes: Mass, No Finding)"),
        (['"cat,dog"', '"cat"', "x"], "2 of 3 cells of Labels have brackets or quotes"),
        (["[cat, dog]"], 'such as \'[cat, dog]\'; write ["a", "b"]'),
    ],
)
def test_another_separator_is_noticed(cells, says):
    with pytest.raises(UserError) as error:
        check_separator(Path("t.csv"), "Labels", cells)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cells", [["rock,paper", "x", "y"], ["1girl ;) x", "1girl", "solo"], ["['a', 'b']"] * 3, ["", " "]]
)
def test_what_may_be_a_name_is_left_alone(cells):
    check_separator(Path("t.csv"), "Labels", cells)


def test_a_separator_that_no_class_contains():
    assert free_separator(["a", "b"]) == " "
    assert free_separator(["No Finding", "a|b"]) == ";"
    assert free_separator(["cafe\u0301"]) == " "


def test_a_table_is_packed_only_as_it_is_meant(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=3)
    cells = ["No Finding|Mass", "Mass", ""]
    rows = [[f"{i}.jpg", text] for i, text in enumerate(cells)]
    write_table(raw / "train.csv", ["id", "finding"], rows)
    names = ("--id-column", "id", "--labels-column", "finding")
    assert pack_raw(raw, tmp_path / "out", *names) == 2
    assert "give --label-separator '|'" in capsys.readouterr().err
    assert pack_raw(raw, tmp_path / "out", *names, "--label-separator", "|") == 0
    dataset = load_dataset(tmp_path / "out")
    assert dataset.classes == ("Mass", "No Finding")
    assert dataset.columns == Columns("id", "finding", separator="|")
    # An older pack learns its columns; without them there is a separator that fits the classes.
    text = (tmp_path / "out" / "dataset.json").read_text()
    content = {name: value for name, value in json.loads(text).items() if name != "columns"}
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(content))
    assert load_dataset(tmp_path / "out").columns == Columns(separator="|")
    assert pack_raw(raw, tmp_path / "out", *names, "--label-separator", "|") == 0
    assert (tmp_path / "out" / "dataset.json").read_text() == text
    assert pack_raw(raw, tmp_path / "plain", *names, "--label-separator", " ") == 0
    assert load_dataset(tmp_path / "plain").classes == ("Finding|Mass", "Mass", "No")


@pytest.mark.parametrize(
    ("cells", "flags", "says"),
    [
        (["ImageID x"], [], "class 'ImageID' is called like a column of predictions"),
        (["tags"], ["--labels-column", "tags"], "class 'tags' is called like a column"),
        (["['No Finding']"], [], "class 'No Finding' contains the label separator ' '"),
    ],
)
def test_a_class_that_no_submission_could_name(tmp_path, capsys, cells, flags, says):
    raw = write_raw(tmp_path / "raw", samples=1)
    column = flags[1] if flags else "Labels"
    write_table(raw / "train.csv", ["ImageID", column], [["0.jpg", text] for text in cells])
    assert pack_raw(raw, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err


def test_two_spellings_of_a_name_are_one_class(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=2)
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    write_table(raw / "train.csv", ["ImageID", "Labels"], [["0.jpg", forms[0]], ["1.jpg", forms[1]]])
    (tmp_path / "classes.yaml").write_text(f"classes: [{forms[1]}]", encoding="utf-8")
    for out, flags in (("a", []), ("b", ["--classes", tmp_path / "classes.yaml"])):
        assert pack_raw(raw, tmp_path / out, *flags) == 0
        assert load_dataset(tmp_path / out).classes == ("café",)
        assert opened(tmp_path / out).class_counts().tolist() == [2]


def test_long_captions_and_byte_order_marks(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=2)
    rows = [["0.jpg", "x", "\ufeffa caption"], ["\ufeff1.jpg", "\ufeffx", "long " * 40_000]]
    write_table(raw / "train.csv", ["\ufeffImageID", "Labels", "Caption"], rows)
    assert pack_raw(raw, tmp_path / "out") == 0
    index = opened(tmp_path / "out")
    assert [index.caption(0), len(index.caption(1))] == ["a caption", 200_000]
    assert load_dataset(tmp_path / "out").classes == ("x",) and index.image_id(1) == "1.jpg"
