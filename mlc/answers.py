"""Prediction files beside the truth: rows matched by image, columns by class, and refused by name where they do not
fit.

A score that is computed on rows in another order looks like a bad model and not like the mistake it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlc.data.soft_labels import read_header, read_predictions
from shards.console import UserError, did_you_mean, listed, say
from shards.dataset import load_dataset, open_index
from shards.table import Columns, Problems, Row, found_classes, read_rows


@dataclass(frozen=True)
class Truth:
    """The labels of N images: `ids` [N] unique, `target` bool [N, C]; `groups` {name: columns}, `source` for people."""

    source: str
    ids: Sequence[str]
    classes: tuple[str, ...]
    target: np.ndarray
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)


def is_submission(file: Path) -> bool:
    """Whether a file has label sets, `ImageID,Labels`, and no probabilities."""
    return file.suffix.lower() == ".csv" and "Labels" in read_header(file)


def predicted_classes(file: Path) -> tuple[str, ...]:
    """The classes that a prediction file has columns for, in its order. Raises UserError."""
    names = read_header(file)
    if "ImageID" not in names or len(names) < 2:
        raise UserError(f"{file}: no predictions; they have a column ImageID and one of probabilities for each class")
    return tuple(name for name in names if name != "ImageID")


def truth_of_split(data: str, split: str) -> Truth:
    """Of a packed data set. Raises UserError for a split without labels or with an image twice."""
    dataset = load_dataset(data)
    index = open_index(dataset, split)
    if not index.has_labels:
        raise UserError(f"--split {split} of {data} has no labels; name one that has (`mlc stats {data}` lists them)")
    ids = index.batch.column("image_id").to_pylist()
    _refuse_repeats(f"split {split} of {data}", ids)
    target = index.targets(np.arange(len(ids))) > 0.5
    return Truth(f"{data} {split}", ids, dataset.classes, target, dataset.group_columns)


def truth_of_table(file: Path, columns: Columns, classes: Sequence[str] | None) -> Truth:
    """Of a CSV as `mlc pack` reads it; classes None takes those that occur. Raises UserError."""
    rows = table_rows(file, columns)
    classes = tuple(classes or found_classes(row.labels for row in rows))
    return Truth(str(file), [row.image_id for row in rows], classes, _multi_hot(file, rows, classes))


def table_rows(file: Path, columns: Columns) -> list[Row]:
    """The rows of a labelled CSV, each image once. Raises UserError naming the lines that are wrong."""
    problems = Problems()
    rows = read_rows(file, columns, problems, need_labels=True)
    if problems:
        raise UserError(f"{len(problems)} bad rows:\n{listed(problems.lines())}")
    _refuse_repeats(str(file), [row.image_id for row in rows])
    return rows


def probabilities_of(file: Path, truth: Truth) -> np.ndarray:
    """float32 [N, C]: a prediction file's rows and columns in the order of the truth. Raises UserError."""
    ids, scores = read_predictions(file, truth.classes)
    return scores[_places(file, ids, truth)]


def labels_of(file: Path, truth: Truth, separator: str = " ") -> np.ndarray:
    """bool [N, C]: a submission's label sets in the order of the truth. Raises UserError."""
    rows = table_rows(file, Columns(separator=separator))
    places = _places(file, pa.array([row.image_id for row in rows], pa.large_string()), truth)
    return _multi_hot(file, rows, truth.classes)[places]


def submitted_classes(files: Sequence[Path], columns: Columns) -> tuple[str, ...]:
    """Every label of some tables or submissions."""
    return found_classes(row.labels for file in files for row in table_rows(file, columns))


def _multi_hot(file: Path, rows: Sequence[Row], classes: Sequence[str]) -> np.ndarray:
    column = {name: number for number, name in enumerate(classes)}
    target = np.zeros((len(rows), len(classes)), bool)
    for place, row in enumerate(rows):
        for label in row.labels:
            if label not in column:
                raise UserError(
                    f"{file} line {row.line}: {label!r} is none of the {len(classes)} classes of the other file"
                    f"{did_you_mean(label, classes)}"
                )
            target[place, column[label]] = True
    return target


def _places(file: Path, ids: pa.Array, truth: Truth) -> np.ndarray:
    """int64 [N]: the row of the file for each image of the truth."""
    place = pc.fill_null(pc.index_in(pa.array(truth.ids, pa.large_string()), value_set=ids), -1).to_numpy()
    missing = np.flatnonzero(place < 0)
    if len(missing):
        raise UserError(
            f"{file} has no row for {len(missing)} of the {len(place)} images of {truth.source}, such as "
            f"{truth.ids[missing[0]]}; predict the same images"
        )
    if len(ids) > len(place):
        say(f"{file}: {len(ids) - len(place)} images are not in {truth.source} and count for nothing")
    return place


def _refuse_repeats(where: str, ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        values = pc.value_counts(pa.array(ids, pa.large_string()))
        often = values.filter(pc.greater(values.field("counts"), 1))[0]["values"].as_py()
        raise UserError(f"{where}: image {often} comes more than once, so rows cannot be matched by name")
