"""What is true of some images, and what files say of the same ones: rows matched by image, columns by class.

A score that is computed on rows in another order looks like a bad model and not like the mistake it is.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlc.data.filters import select_rows
from mlc.data.prediction_files import (
    USUAL,
    places,
    read_predictions,
    refuse_missing,
    refuse_repeats,
    rows_of,
    submission_columns,
)
from shards.cells import nfc
from shards.console import Parser, UserError, did_you_mean, listed, say
from shards.dataset import Dataset, Index, load_dataset, open_index
from shards.table import Columns, Problems, Row, found_classes, read_rows

FIX = "predict all of them, or let the truth have fewer (of --data by --fold or --where)"


@dataclass(frozen=True)
class Truth:
    """The labels of N images: `ids` large_string [N] unique, `target` bool [N, C]; `groups` {name:
    columns}; `columns` of its tables and of submissions. For people are `source`, and `fix` for a
    label that is no class."""

    source: str
    ids: pa.Array
    classes: tuple[str, ...]
    target: NDArray[np.bool_]
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    columns: Columns = USUAL
    fix: str = ""


# ---- truth -----------------------------------------------------------------------------------------------------------


def truth_of_split(data: str, split: str, *, where: str = "", fold: int | None = None) -> Truth:
    """Of a packed data set, of all rows or of those that `select_rows` chooses. Raises UserError for a split without
    labels or with an image twice."""
    dataset = load_dataset(data)
    index = labelled_index(dataset, split)
    rows = select_rows(index, dataset.classes, where=where, fold=fold)
    return truth_of_rows(f"{data}, split {split}", dataset, index, np.arange(len(index)) if rows is None else rows)


def truth_of_rows(source: str, dataset: Dataset, index: Index, rows: NDArray[np.integer]) -> Truth:
    """Of these rows of a split. Raises UserError where an image is among them twice."""
    ids = index.batch.column("image_id").take(pa.array(rows))
    refuse_repeats(source, ids)
    target = index.targets(rows) > 0.5
    return Truth(source, ids, dataset.classes, target, dataset.group_columns, dataset.columns)


def truth_of_table(
    file: Path,
    columns: Columns,
    classes: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    of: Path | str | None = None,
) -> Truth:
    """Of a CSV as `mlc pack` reads it. Raises UserError.

    classes: None for those that occur; else `of` names the file that they are from.
    groups: {name: classes}.
    """
    rows = read_labels(file, columns)
    fix = "" if classes else "; --classes FILE names those that none of its images has"
    classes = tuple(classes or found_classes(row.labels for row in rows))
    numbers = {name: number for number, name in enumerate(classes)}
    found = {group: [numbers[name] for name in names] for group, names in (groups or {}).items()}
    return Truth(str(file), ids_of(rows), classes, multi_hot(rows, classes, of=of), found, columns, fix)


def filled_index(dataset: Dataset, split: str) -> Index:
    """Raises UserError for a split without images. Its tars need not be there."""
    index = open_index(dataset, split)
    if not len(index):
        raise UserError(f"{dataset.url or dataset.root}: the split {split!r} is empty")
    return index


def labelled_index(dataset: Dataset, split: str) -> Index:
    """The same; raises UserError for a split without labels, too."""
    index = filled_index(dataset, split)
    where = dataset.url or dataset.root
    if not index.has_labels:
        raise UserError(f"{where}: the split {split!r} has no labels; name one that has (`mlc stats {where}`)")
    return index


# ---- what files say of it --------------------------------------------------------------------------------------------


def probabilities_of(files: Sequence[Path], truth: Truth) -> NDArray[np.float32]:
    """[N, C] in the order of the truth: the rows of one file, or of several together, such as one for each fold.

    Raises:
        UserError: naming an image of the truth that no file has, or that two have.
    """
    scores = np.empty(truth.target.shape, np.float32)
    seen = np.full(len(scores), -1)
    for number, file in enumerate(files):
        ids, found = read_predictions(file, truth.classes)
        place = places(truth.ids, ids)
        rows = np.flatnonzero(place >= 0)
        if (twice := rows[seen[rows] >= 0]).size:
            raise UserError(
                f"{file}: image {truth.ids[int(twice[0])].as_py()} is also in {files[seen[twice[0]]]}; give parts "
                "without common images, or average models by `mlc ensemble`"
            )
        _note_left_out(file, len(ids) - len(rows), len(ids), truth)
        seen[rows] = number
        scores[rows] = found[place[rows]]
    named = " and ".join(map(str, files)) if len(files) < 3 else f"the {len(files)} files"
    refuse_missing(named, truth.ids, seen < 0, f"images of {truth.source}", FIX)
    return scores


def labels_of(file: Path, truth: Truth) -> NDArray[np.bool_]:
    """[N, C]: a submission's label sets in the order of the truth. Raises UserError naming an image that it lacks, or a
    label that the truth does not have."""
    rows = read_submission(file, truth.columns)
    place = rows_of(file, ids_of(rows), truth.ids, f"images of {truth.source}", FIX)
    _note_left_out(file, len(rows) - len(place), len(rows), truth)
    return multi_hot([rows[number] for number in place], truth.classes, of=truth.source, fix=truth.fix)


def _note_left_out(file: Path, number: int, of: int, truth: Truth) -> None:
    if number:
        say(f"note: {number} of {of} images of {file} are not in {truth.source}; left out")


# ---- tables of labels ------------------------------------------------------------------------------------------------


def read_labels(file: Path, columns: Columns = USUAL) -> list[Row]:
    """The rows of a truth or a submission, each image once. Raises UserError naming the lines that are wrong."""
    problems = Problems()
    rows = read_rows(file, columns, problems, need_labels=True)
    first: dict[str, int] = {}
    for row in rows:
        line = first.setdefault(row.image_id, row.line)
        if line != row.line:
            problems.add(row.source, row.line, f"image {row.image_id} comes more than once, first in line {line}")
    if problems:
        lines = problems.lines()
        raise UserError(lines[0] if len(lines) == 1 else f"{file}: {len(problems)} bad rows:\n{listed(lines)}")
    return rows


def read_submission(file: Path, columns: Columns) -> list[Row]:
    """The rows of a submission, written with these columns or with the usual ones. Raises UserError."""
    return read_labels(file, submission_columns(file, columns) or columns)


def add_column_flags(parser: Parser, tables: str) -> None:
    """For `given_columns`; `tables` says what is read."""
    add = parser.add_argument
    default = "that of --data, else"
    add("--id-column", metavar="NAME", help=f"column of {tables} ({default} ImageID)")
    add("--labels-column", metavar="NAME", help=f"column of {tables} ({default} Labels)")
    add("--label-separator", metavar="S", help=f"stands between labels in {tables} ({default} any white space)")


def given_columns(options: Namespace) -> Columns:
    """What the flags say of tables, and beside them the data set of --data. Raises UserError."""
    known = load_dataset(options.data).columns if options.data else USUAL
    flags = {"image_id": "id_column", "labels": "labels_column", "separator": "label_separator"}
    given = {name: getattr(options, flag) for name, flag in flags.items()}
    if "" in given.values():
        raise UserError("--id-column, --labels-column and --label-separator must not be empty")
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def ids_of(rows: Sequence[Row]) -> pa.Array:
    """large_string [N]"""
    return pa.array([row.image_id for row in rows], pa.large_string())


def multi_hot(
    rows: Sequence[Row],
    classes: Sequence[str],
    *,
    of: Path | str | None = "the predictions",
    fix: str = "",
) -> NDArray[np.bool_]:
    """[N, C]. Raises UserError naming the line of a label that is none of the classes, which are those
    `of` a file, and how to `fix` it."""
    column = {nfc(name): number for number, name in enumerate(classes)}
    target = np.zeros((len(rows), len(classes)), bool)
    for place, row in enumerate(rows):
        for label in row.labels:
            if label not in column:
                raise UserError(
                    f"{row.source} line {row.line}: label {label!r} is none of the {len(classes)} classes of "
                    f"{of}{did_you_mean(label, classes)}{fix}"
                )
            target[place, column[label]] = True
    return target
