"""Prediction files, a probability for each image and class, and submissions, a set of labels for each image: read,
brought to an order of rows and columns, and written.

Two files of the same images in another order fit each other number by number, and mean nothing: so nothing is ever
matched by its place, and what has no partner is refused by its name.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from shards.cells import free_separator, nfc, survives
from shards.console import UserError, did_you_mean, say
from shards.dataset import Index
from shards.files import check_download, disk_errors, whole
from shards.table import PREDICTION_ID, Columns

USUAL = Columns()
KINDS = (".csv", ".arrow")


def is_prediction_file(name: str) -> bool:
    return Path(name).suffix.lower() in KINDS and not Path(name).is_dir()


def submission_columns(file: Path, columns: Columns = USUAL) -> Columns | None:
    """How a submission is written: with the given columns, or else with the usual ones. None for any
    other file, such as probabilities. Raises UserError."""
    header = read_header(file) if file.suffix.lower() == ".csv" else ()
    ways = (columns, USUAL)
    return next((way for way in ways if way.image_id in header and way.labels in header), None)


def is_submission(file: Path, columns: Columns = USUAL) -> bool:
    """Whether it has label sets in place of probabilities. Raises UserError."""
    return submission_columns(file, columns) is not None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> list[str]:
    """The names of the columns of a CSV or Arrow file. Raises UserError."""
    if not is_prediction_file(str(file)):
        raise UserError(f"{file}: expected predictions in a .csv or .arrow file")
    check_download(file)
    try:
        if file.suffix.lower() == ".csv":
            with pa.csv.open_csv(file) as reader:  # only its header is of interest
                return reader.schema.names
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
            return reader.schema.names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as predictions: {str(error).splitlines()[0]}") from None


def class_columns(file: Path) -> tuple[str, ...]:
    """The classes of a prediction file, in its order. Raises UserError for another file."""
    names = [name for name in read_header(file) if name]  # without pandas' index, whose name is empty
    if PREDICTION_ID not in names or len(names) < 2:
        raise UserError(
            f"{file}: no predictions; they have a column {PREDICTION_ID} and one of probabilities for each class. If "
            "these are label sets, --id-column and --labels-column name their columns, or --data a data set with those"
        )
    if is_submission(file):
        raise UserError(
            f"{file} is a submission, label sets without probabilities; `mlc ensemble --vote` combines those"
        )
    return tuple(name for name in names if name != PREDICTION_ID)


def read_predictions(file: Path, classes: Sequence[str]) -> tuple[pa.Array, np.ndarray]:
    """(image ids, large_string [N], probabilities float32 [N, C]) of a prediction file, its columns in the order of
    `classes`; columns of other classes are passed over. Raises UserError.
    """
    check_download(file)
    try:
        table = _read_csv(file, classes) if file.suffix.lower() == ".csv" else _read_arrow(file, classes)
        ids = table.column(PREDICTION_ID).cast(pa.large_string()).combine_chunks()
        probabilities = np.empty((len(table), len(classes)), np.float32)
        for column, name in enumerate(classes):
            probabilities[:, column] = table.column(name).cast(pa.float32()).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as predictions: {str(error).splitlines()[0]}") from None
    wrong = ~((probabilities >= 0) & (probabilities <= 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"{file}: image {ids[row].as_py()}, class {classes[column]}: {probabilities[row, column]:g} is no "
            f"probability ({wrong.sum()} such values)"
        )
    refuse_repeats(str(file), ids)
    return ids, probabilities


def _read_csv(file: Path, classes: Sequence[str]) -> pa.Table:
    names = _columns(file, read_header(file), classes)
    kinds = dict.fromkeys(names, pa.float32()) | {PREDICTION_ID: pa.large_string()}
    options = pa.csv.ConvertOptions(column_types=kinds, include_columns=names, strings_can_be_null=False)
    return pa.csv.read_csv(file, convert_options=options).rename_columns([PREDICTION_ID, *classes])


def _read_arrow(file: Path, classes: Sequence[str]) -> pa.Table:
    names = _columns(file, read_header(file), classes)
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        return reader.read_all().select(names).rename_columns([PREDICTION_ID, *classes])


def _columns(file: Path, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """What the file calls the image and these classes: the same names, in either form of Unicode."""
    if PREDICTION_ID not in names:
        raise UserError(
            f"{file}: no column {PREDICTION_ID}, so these are no predictions; `mlc predict --split train` makes them"
        )
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(nfc(name), []).append(name)
    missing = [name for name in classes if nfc(name) not in found]
    if missing:
        raise UserError(
            f"{file}: no column for {len(missing)} of the {len(classes)} classes, such as {missing[0]!r}"
            f"{did_you_mean(missing[0], names)}; predict with a model of the same classes"
        )
    wanted = [nfc(name) for name in (PREDICTION_ID, *classes)]
    if twice := [name for name in wanted if len(found[name]) > 1]:
        raise UserError(f"{file}: two columns are called {twice[0]!r}")
    return [found[name][0] for name in wanted]


# ---- rows by name ----------------------------------------------------------------------------------------------------


def aligned(file: str | Path, index: Index, classes: Sequence[str]) -> NDArray[np.float32]:
    """[len(index), C]: the probabilities of a prediction file, in the order of the index and of `classes`.

    Raises:
        UserError: naming the first image of the split that the file does not have.
    """
    ids, probabilities = read_predictions(Path(file), classes)
    wanted = index.batch.column("image_id")
    fix = "predict that split whole, or name another --split"
    return probabilities[rows_of(file, ids, wanted, f"images of {index.path.stem}", fix)]


def rows_of(file: str | Path, ids: pa.Array, wanted: pa.Array, what: str, fix: str) -> NDArray[np.int32]:
    """Where each of the `wanted` [N] is among the `ids` of a file. Raises UserError naming the first that is nowhere,
    `what` they are and how to `fix` it."""
    rows = places(wanted, ids)
    refuse_missing(file, wanted, rows < 0, what, fix)
    return rows


def places(wanted: pa.Array, ids: pa.Array) -> NDArray[np.int32]:
    """Where each of the `wanted` [N] is among the `ids`, -1 for one that is nowhere."""
    return pc.fill_null(pc.index_in(wanted, value_set=ids), -1).to_numpy()


def refuse_missing(file: str | Path, wanted: pa.Array, missing: NDArray[np.bool_], what: str, fix: str) -> None:
    """Raises UserError where any of the `wanted` [N] is `missing` [N]."""
    if missing.any():
        first = wanted[int(missing.argmax())].as_py()
        raise UserError(f"{file}: no row for {missing.sum()} of the {len(wanted)} {what}, such as {first}; {fix}")


def refuse_repeats(source: str, ids: pa.Array) -> None:
    """Raises UserError naming an image that comes more than once."""
    if len(pc.unique(ids)) < len(ids):
        counted = pc.value_counts(ids)
        often = counted.filter(pc.greater(counted.field("counts"), 1))[0]["values"].as_py()
        raise UserError(f"{source}: image {often} comes more than once, so rows cannot be matched by name; keep one")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_probabilities(path: Path, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray) -> None:
    """`ImageID` and a column per class, in row order; CSV with nine digits (a float32 to the last bit), or Arrow, by
    the file's name; written whole."""
    if path.suffix == ".arrow":
        columns = {PREDICTION_ID: pa.array(ids, pa.large_string())} | dict(zip(classes, scores.T, strict=True))
        _write_arrow(path, pa.table(columns))
        return
    write_csv(
        path,
        [PREDICTION_ID, *classes],
        ([image_id, *(f"{p:.9g}" for p in row)] for image_id, row in zip(ids, scores, strict=True)),
    )


def write_submission(
    path: Path,
    ids: Sequence[str],
    classes: Sequence[str],
    predicted: np.ndarray,
    columns: Columns = USUAL,
) -> None:
    """The predicted classes [N, C] of each image as the tables of the data set have them:
    `ImageID,Labels`, joined by blanks, unless `columns` say otherwise. Raises UserError as
    `separator_of`."""
    separator = separator_of(columns, classes)
    labels = (separator.join(classes[c] for c in np.flatnonzero(row)) for row in predicted)
    write_csv(path, [columns.image_id, columns.labels], zip(ids, labels, strict=True))


def separator_of(columns: Columns, classes: Sequence[str]) -> str:
    """What stands between the labels of a submission; where none is named, one that no class contains.
    Raises UserError where a class contains it, so that nobody could read the class again."""
    if columns.separator is None:
        separator = free_separator(classes)
        if separator != " ":
            say(f"note: class names have blanks in them; {separator!r} stands between labels")
        return separator
    for name in classes:
        if not survives(name, columns.separator):
            raise UserError(
                f"class {name!r} contains {columns.separator!r}, which stands between the labels of a submission; "
                "choose another with --label-separator, of `mlc pack` or here"
            )
    return columns.separator


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
