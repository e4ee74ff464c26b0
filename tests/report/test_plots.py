import numpy as np
from PIL import Image

from mlc.data.reader import TarReader
from mlc.data.sources import open_split
from mlc.report.plots import _verdict, contact_sheet
from shards.dataset import load_dataset


def test_every_label_is_in_one_of_three_lists():
    classes = ["a", "b", "c", "d"]
    said = np.array([True, False, True, False])
    assert [text for text, _ in _verdict(np.array([0, 1]), said, classes)] == ["✓ a", "missed b", "wrong c"]


def test_hundreds_of_wrong_labels_stay_on_their_line():
    ((text, _),) = _verdict(np.array([], int), np.ones(500, bool), [f"class {c}" for c in range(500)])
    assert len(text) < 40 and text.endswith("…")


def test_a_long_name_is_cut_and_not_left_out():
    said = np.array([True, True])
    ((text, _),) = _verdict(np.array([], int), said, ["culture::north_american_great_lakes_region", "b"])
    assert text == "wrong culture::north_american_gr"[:31] + "…"


def test_the_sheet_draws_from_all_rows_and_labels_begin_at_one_height(shards, tmp_path, monkeypatch):
    """Of images of any shape; the same ones each time."""
    reader = TarReader(open_split(load_dataset(shards), "train"))
    read, shapes = [], []
    real = reader.read
    monkeypatch.setattr(reader, "read", lambda row: read.append(row) or real(row))
    shown = "matplotlib.axes.Axes.imshow"
    monkeypatch.setattr(shown, lambda axis, image, **_: shapes.append(image.size))
    rows = np.arange(len(reader))
    for _ in range(2):
        contact_sheet(tmp_path / "sheet.png", reader, rows, np.zeros((len(rows), 18), bool), ["c"] * 18)
    assert read[:24] == read[24:] and max(read) > 24 and set(shapes) == {(200, 200)}


def test_contact_sheet_of_a_split(shards, tmp_path):
    dataset = load_dataset(shards)
    reader = TarReader(open_split(dataset, "val"))
    predicted = np.zeros((len(reader), len(dataset.classes)), bool)
    rows = np.arange(len(reader))
    contact_sheet(tmp_path / "deep" / "sheet.png", reader, rows, predicted, dataset.classes)
    assert Image.open(tmp_path / "deep" / "sheet.png").size == (1320, 1100)
