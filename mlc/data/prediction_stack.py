"""Several prediction files, or label sets, of the same images: rows and columns are those of the first file, and each
of the others must have the same, in any order. The truth may know more images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlc.data.prediction_files import (
    USUAL,
    class_columns,
    is_submission,
    places,
    read_predictions,
    rows_of,
)
from mlc.data.truth import ids_of, labelled_index, multi_hot, read_labels, read_submission
from mlc.metrics import thresholds
from shards.console import UserError
from shards.dataset import load_dataset
from shards.table import Columns, found_classes


@dataclass(frozen=True)
class Stack:
    """`values`: probabilities float32, or label sets bool, [M, N, C]; `ids` large_string [N]."""

    ids: pa.Array
    classes: tuple[str, ...]
    values: NDArray


@dataclass(frozen=True)
class Known:
    """The classes there are, the file that says so, and how to `fix` a label that is none of them."""

    classes: tuple[str, ...]
    source: Path | str
    fix: str = ""


def read_stack(files: Sequence[Path]) -> Stack:
    """Prediction files of the same images and classes, in any order. Raises UserError naming what one of them lacks."""
    classes = class_columns(files[0])
    for file in files[1:]:
        _same(file, class_columns(file), files[0], classes, "class")
    ids, first = read_predictions(files[0], classes)
    values = np.empty((len(files), *first.shape), np.float32)
    values[0] = first
    for number, file in enumerate(files[1:], 1):
        theirs, scores = read_predictions(file, classes)
        values[number] = scores[_order(file, theirs, files[0], ids)]
    return Stack(ids, classes, values)


def read_sets(
    files: Sequence[Path],
    rules: Sequence[Mapping | None],
    columns: Columns = USUAL,
    known: Known | None = None,
) -> Stack:
    """The label sets of submissions, and of prediction files by their thresholds (the content of a `thresholds.json`
    each; None only for a submission), written with these `columns`. Classes are those of the prediction files, else
    the `known` ones, else all labels that the submissions have. Raises UserError for a label that is no class.
    """
    submitted = {file: read_submission(file, columns) for file in files if is_submission(file, columns)}
    table = next((file for file in files if file not in submitted), None)
    labels = (row.labels for rows in submitted.values() for row in rows)
    if table:
        known = Known(class_columns(table), table)
    known = known or Known(found_classes(labels), "")
    classes = known.classes
    sets: list[tuple[pa.Array, NDArray]] = []
    for file, rule in zip(files, rules, strict=True):
        if file in submitted:
            sets.append((ids_of(submitted[file]), multi_hot(submitted[file], classes, of=known.source, fix=known.fix)))
        elif rule is None:
            raise UserError(f"{file} has probabilities: give --threshold, one for each file or one for all")
        else:
            _same(file, class_columns(file), table, classes, "class")
            ids, scores = read_predictions(file, classes)
            sets.append((ids, thresholds.apply(scores, rule, classes)))
    first = sets[0][0]
    values = [chosen[_order(file, ids, files[0], first)] for file, (ids, chosen) in zip(files, sets, strict=True)]
    return Stack(first, classes, np.stack(values))


def target_of_split(stack: Stack, data: str, split: str) -> NDArray[np.bool_]:
    """[N, C]: the labels that a packed data set has for the images of the stack.

    Raises:
        UserError: an image without labels, or a class that only one side has.
    """
    dataset = load_dataset(data)
    index = labelled_index(dataset, split)
    _same("the prediction", stack.classes, data, dataset.classes, "class")
    rows = _true_rows(f"{data}, split {split}", index.batch.column("image_id"), stack)
    columns = [dataset.classes.index(name) for name in stack.classes]
    return index.targets(rows)[:, columns] > 0.5


def target_of_table(stack: Stack, file: Path, columns: Columns = USUAL) -> NDArray[np.bool_]:
    """[N, C]: the labels that a CSV has for the images of the stack. Raises UserError for an image
    without a row, or a label that is no class."""
    rows = read_labels(file, columns)
    return multi_hot([rows[place] for place in _true_rows(file, ids_of(rows), stack)], stack.classes)


def _true_rows(source: str | Path, ids: pa.Array, stack: Stack) -> NDArray[np.int32]:
    return rows_of(source, ids, stack.ids, "predicted images", "give the truth of all of them")


def _order(file: Path, theirs: pa.Array, first: Path, ids: pa.Array) -> NDArray[np.int32]:
    """Where each row of the first file is in this one."""
    order = places(ids, theirs)
    if (order < 0).any() or len(theirs) > len(ids):
        _same(file, theirs.to_pylist(), first, ids.to_pylist(), "image")
    return order


def _same(file: Path | str, theirs: Sequence[str], first: Path | str, names: Sequence[str], what: str) -> None:
    """Raises UserError naming one that only one of the two has."""
    for there, missing, given, wanted in ((first, file, names, theirs), (file, first, theirs, names)):
        known = set(wanted)
        only = [name for name in given if name not in known]
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise UserError(f"{there} has {what} {only[0]!r}{more}, {missing} has not; predict the same with both")
