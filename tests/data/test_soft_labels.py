"""Probabilities find their rows by image id and their columns by class name, whatever their order."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlc.data.prediction_files import is_prediction_file
from mlc.data.sampler import Rows
from mlc.data.soft_labels import SoftLabels
from mlc.data.sources import open_split
from shards.console import UserError
from shards.dataset import load_dataset


@pytest.fixture(scope="module")
def dataset(shards):
    return load_dataset(shards)


def probability(image_id: str, name: str, seed: int = 0) -> float:
    return (hash((image_id, name, seed)) % 1000) / 1000


def write(path: Path, dataset, *, splits=("train",), seed: int = 0, change=None) -> str:
    """A file of all images of the splits, rows shuffled, columns backwards, one column too many."""
    ids = sorted(open_split(dataset, s).image_id(row) for s in splits for row in range(len(open_split(dataset, s))))
    names = [*dataset.classes[::-1], "another"]
    table = {"ImageID": ids} | {name: [probability(i, name, seed) for i in ids] for name in names}
    if change:
        change(table)
    if path.suffix == ".arrow":
        arrow = pa.table(table)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, arrow.schema) as writer:
            writer.write_table(arrow)
        return str(path)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "arrow"])
def test_each_row_of_each_source_has_its_own(kind, dataset, tmp_path):
    indexes = [open_split(dataset, split) for split in ("train", "val")]
    sources = [Rows(index, 0) for index in indexes]
    files = [write(tmp_path / f"{n}.{kind}", dataset, splits=("train", "val"), seed=n) for n in (0, 1)]
    soft = SoftLabels(files, sources, dataset.classes)
    source, row = np.array([0, 1, 1, 0, 0]), np.array([5, 0, 7, 99, 5])
    found = soft(source, row)
    assert len(soft) == 2 and found.shape == (5, 2, len(dataset.classes)) and found.dtype == np.float32
    for place, (s, r) in enumerate(zip(source, row, strict=True)):
        for n in (0, 1):
            expected = [probability(indexes[s].image_id(r), name, n) for name in dataset.classes]
            np.testing.assert_allclose(found[place, n], expected, atol=1e-7)


def test_only_the_rows_that_take_part_must_be_there(dataset, tmp_path):
    index = open_split(dataset, "train")
    left_out = index.image_id(3)

    def without(table):
        place = table["ImageID"].index(left_out)
        for column in table.values():
            del column[place]

    file = write(tmp_path / "p.csv", dataset, change=without)
    SoftLabels([file], [Rows(index, 0, rows=np.array([0, 1, 2, 4]))], dataset.classes)
    with pytest.raises(UserError, match=f"no row for 1 of the {len(index)} training images, such as {left_out};"):
        SoftLabels([file], [Rows(index, 0)], dataset.classes)


def change_first(value):
    def change(table):
        table[list(table)[1]][0] = value

    return change


def rename(old: str, new: str):
    def change(table):
        table[new] = table.pop(old)

    return change


def twice(table):
    table["ImageID"][1] = table["ImageID"][0]


@pytest.mark.parametrize(
    "change, words",
    [
        (rename("ImageID", "id"), "no column ImageID"),
        (change_first(-3.5), "-3.5 is no probability"),
        (change_first(float("nan")), "nan is no probability"),
        (change_first("many"), "cannot be read as predictions"),
        (twice, "comes more than once"),
    ],
)
def test_mistakes_are_one_line(change, words, dataset, tmp_path):
    file = write(tmp_path / "p.csv", dataset, change=change)
    with pytest.raises(UserError) as error:
        SoftLabels([file], [Rows(open_split(dataset, "train"), 0)], dataset.classes)
    assert words in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def test_a_class_that_is_missing_is_named(dataset, tmp_path):
    name = dataset.classes[2]
    file = write(tmp_path / "p.arrow", dataset, change=rename(name, f"{name}s"))
    with pytest.raises(UserError, match=f"no column for 1 of the .* such as {name!r}; did you mean {name}s"):
        SoftLabels([file], [Rows(open_split(dataset, "train"), 0)], dataset.classes)


def test_files_that_are_none(dataset, tmp_path):
    (tmp_path / "run.csv").mkdir()
    assert is_prediction_file("a/b.CSV") and is_prediction_file("p.arrow") and not is_prediction_file("runs/a")
    assert not is_prediction_file(str(tmp_path / "run.csv"))
    for name, content in (("no.csv", None), ("no.arrow", None), ("empty.csv", b""), ("bad.arrow", b"ARROW1 not")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        problem = "is empty: download" if content == b"" else "cannot be read as predictions"
        with pytest.raises(UserError, match=f"{name} {problem}"):
            SoftLabels([str(tmp_path / name)], [Rows(open_split(dataset, "train"), 0)], dataset.classes)
