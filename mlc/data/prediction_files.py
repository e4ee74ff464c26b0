"""Prediction files, submissions and truth brought to the same rows and columns, by name. Two files of the same images
in another order fit each other number by number, and mean nothing: so nothing is ever matched by its place, and what
has no partner is refused by its name.
"""

import csv
import itertools
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlc.data.soft_labels import read_header, read_predictions
from mlc.data.sources import open_split
from mlc.metrics import thresholds
from shards.console import UserError, did_you_mean, listed
from shards.dataset import load_dataset
from shards.files import disk_errors, whole
from shards.table import Columns, Problems, Row, found_classes, read_rows


@dataclass(frozen=True)
class Answers:
    """`stack`: probabilities float32, or label sets bool, [M, N, C]; rows and columns are those of the first file."""

    ids: list[str]
    classes: list[str]
    stack: NDArray


def read_stack(files: Sequence[Path]) -> Answers:
    """Prediction files of the same images and classes, in any order. Raises UserError naming what one of them lacks."""
    classes = class_columns(files[0])
    for file in files[1:]:
        _same(file, class_columns(file), files[0], classes, "class")
    ids, first = read_predictions(files[0], classes)
    stack = np.empty((len(files), *first.shape), np.float32)
    stack[0] = first
    for number, file in enumerate(files[1:], 1):
        theirs, scores = read_predictions(file, classes)
        stack[number] = scores[_places(file, theirs, files[0], ids)]
    return Answers(ids.to_pylist(), classes, stack)


def read_sets(files: Sequence[Path], rules: Sequence[Mapping | None], also: Sequence[str] = ()) -> Answers:
    """The label sets of submissions, and of prediction files by their thresholds (the content of a `thresholds.json`
    each; None only for a submission). Classes are those of the prediction files, or else all labels that the
    submissions and `also` have.
    """
    tables = [None if is_submission(file) else file for file in files]
    submitted = {file: read_labels(file) for file, table in zip(files, tables, strict=True) if table is None}
    known = next((class_columns(table) for table in tables if table), None)
    labels = itertools.chain([also], *(rows.values() for rows in submitted.values()))
    classes = known or list(found_classes(labels))
    sets: list[tuple[pa.Array, NDArray]] = []
    for file, rule in zip(files, rules, strict=True):
        if file in submitted:
            ids = pa.array(submitted[file], pa.large_string())
            sets.append((ids, _multi_hot(file, submitted[file].values(), classes)))
        elif rule is None:
            raise UserError(f"{file} has probabilities: give --threshold, one for each file or one for all")
        else:
            _same(file, class_columns(file), next(filter(None, tables)), classes, "class")
            ids, scores = read_predictions(file, classes)
            sets.append((ids, thresholds.apply(scores, rule, classes)))
    first = sets[0][0]
    stack = [chosen[_places(file, ids, files[0], first)] for file, (ids, chosen) in zip(files, sets, strict=True)]
    return Answers(first.to_pylist(), classes, np.stack(stack))


def class_columns(file: Path) -> list[str]:
    """The classes of a prediction file, in its order. Raises UserError for another file."""
    names = [name for name in read_header(file) if name]  # without pandas' index, whose name is empty
    if "ImageID" not in names or len(names) < 2:
        raise UserError(f"{file}: no predictions; they have a column ImageID and one of probabilities for each class")
    if is_submission(file):
        raise UserError(f"{file} is a submission, label sets without probabilities; `--vote` combines those")
    return [name for name in names if name != "ImageID"]


def is_submission(file: Path) -> bool:
    """Whether it has label sets in place of probabilities."""
    return file.suffix.lower() == ".csv" and "Labels" in read_header(file)


# ---- truth -----------------------------------------------------------------------------------------------------------


def add_truth_flags(parser) -> None:
    parser.add_argument("--data", help="packed data set with the true labels: a folder or a URL")
    parser.add_argument("--split", default="val", help="split of --data (default: val)")
    parser.add_argument("--truth", metavar="CSV", help="true labels, ImageID,Labels as `mlc pack` reads them")


def truth_classes(options: Namespace) -> Sequence[str]:
    """The classes of --data, or the labels in --truth; none without either."""
    if options.data:
        return load_dataset(options.data).classes
    return sorted(set().union(*read_labels(Path(options.truth)).values())) if options.truth else ()


def read_truth(options: Namespace, answers: Answers) -> NDArray[np.bool_] | None:
    """bool [N, C] of the rows of `answers`, by --data and --split or --truth; None where neither is given.

    Raises:
        UserError: an image without truth, or a class or label that only one side has.
    """
    if options.data and options.truth:
        raise UserError("give --data or --truth, not both")
    if options.truth:
        file = Path(options.truth)
        rows = read_labels(file)
        return _multi_hot(file, [rows[name] for name in _known(answers.ids, rows, file)], answers.classes)
    if not options.data:
        return None
    dataset = load_dataset(options.data)
    index = open_split(dataset, options.split, labelled=True)
    _same("the prediction", answers.classes, options.data, dataset.classes, "class")
    places = pc.index_in(pa.array(answers.ids, pa.large_string()), value_set=index.batch.column("image_id"))
    if places.null_count:
        _known(answers.ids, set(index.batch.column("image_id").to_pylist()), f"{options.data}, split {options.split!r}")
    columns = [dataset.classes.index(name) for name in answers.classes]
    return index.targets(places.to_numpy())[:, columns] > 0.5


def _known(ids: Sequence[str], there, where: Path | str) -> Sequence[str]:
    missing = [name for name in ids if name not in there]
    if missing:
        raise UserError(f"{where} has no labels for {len(missing)} of {len(ids)} predictions, such as {missing[0]}")
    return ids


def read_labels(file: Path) -> dict[str, tuple[str, ...]]:
    """{image: its labels} of a CSV `ImageID,Labels`. Raises UserError with the lines that are wrong."""
    problems = Problems()
    rows: dict[str, Row] = {}
    for row in read_rows(file, Columns(), problems, need_labels=True):
        if row.image_id in rows:
            problems.add(str(file), row.line, f"image {row.image_id} is in line {rows[row.image_id].line} already")
        rows[row.image_id] = row
    if problems:
        raise UserError(f"{file}: {len(problems)} rows cannot be used\n{listed(problems.lines())}")
    return {name: row.labels or () for name, row in rows.items()}


def _multi_hot(file: Path, label_sets, classes: Sequence[str]) -> NDArray[np.bool_]:
    column = {name: number for number, name in enumerate(classes)}
    label_sets = list(label_sets)
    sets = np.zeros((len(label_sets), len(classes)), bool)
    for row, labels in enumerate(label_sets):
        for label in labels:
            if label not in column:
                raise UserError(f"{file}: label {label!r} is no class of the predictions{did_you_mean(label, classes)}")
            sets[row, column[label]] = True
    return sets


# ---- names -----------------------------------------------------------------------------------------------------------


def _places(file: Path, theirs: pa.Array, first: Path, ids: pa.Array) -> NDArray:
    """Where each row of the first file is in this one."""
    places = pc.index_in(ids, value_set=theirs)
    if places.null_count or len(theirs) > len(ids):
        _same(file, theirs.to_pylist(), first, ids.to_pylist(), "image")
    return places.to_numpy()


def _same(file: Path | str, theirs: Sequence[str], first: Path | str, names: Sequence[str], what: str) -> None:
    """Raises UserError naming one that only one of the two has."""
    for there, missing, given, wanted in ((first, file, names, theirs), (file, first, theirs, names)):
        known = set(wanted)
        only = [name for name in given if name not in known]
        if only:
            more = f" and {len(only) - 1} more" if len(only) > 1 else ""
            raise UserError(f"{there} has {what} {only[0]!r}{more}, {missing} has not; predict the same with both")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_probabilities(path: Path, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray) -> None:
    """`ImageID` and a column per class, in row order; CSV with nine digits (a float32 to the last bit), or Arrow, by
    the file's name; written whole."""
    if path.suffix == ".arrow":
        columns = {"ImageID": pa.array(ids, pa.large_string())} | dict(zip(classes, scores.T, strict=True))
        _write_arrow(path, pa.table(columns))
        return
    write_csv(
        path,
        ["ImageID", *classes],
        ([image_id, *(f"{p:.9g}" for p in row)] for image_id, row in zip(ids, scores, strict=True)),
    )


def write_submission(path: Path, ids: Sequence[str], classes: Sequence[str], predicted: np.ndarray) -> None:
    """`ImageID,Labels`, the predicted classes joined by blanks."""
    labels = (" ".join(classes[c] for c in np.flatnonzero(row)) for row in predicted)
    write_csv(path, ["ImageID", "Labels"], zip(ids, labels, strict=True))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """UTF-8 with the header first; whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as building, building.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_arrow(path: Path, table: pa.Table) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, pa.ArrowException) as building, pa.ipc.new_file(building, table.schema) as writer:
        writer.write_table(table)
