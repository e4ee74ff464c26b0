"""Soft labels on disk: what teachers said about the training images, once and for all, as `mlc predict --split train`
wrote it. A student then costs no more than one without a teacher.

The rows of a file belong to images by their id and its columns to classes by their name, so a file serves every packing
of the images, several data sets together, and folds. Soft labels ride in the batch as `soft`, beside the targets.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mlc.data.sampler import Rows
from shards.console import UserError, did_you_mean
from shards.dataset import Index

KINDS = (".csv", ".arrow")


def is_prediction_file(name: str) -> bool:
    return Path(name).suffix.lower() in KINDS and not Path(name).is_dir()


class SoftLabels:
    """Probabilities for the rows of a stream. Memory: 4 bytes for each image and class of each file, in each training
    process; worker processes that are forked share it."""

    def __init__(self, files: Sequence[str], sources: Sequence[Rows], classes: Sequence[str]):
        """Reads all files; each must have every class, and every row of `sources` that takes part in the training.

        Raises:
            UserError: naming the file and what is missing or wrong in it.
        """
        self._tables = []  # (probabilities float32 [N, C], its row for each row of each source, -1 for none)
        for file in files:
            ids, probabilities = read_predictions(Path(file), classes)
            self._tables.append((probabilities, [_places(file, ids, rows) for rows in sources]))

    def __len__(self) -> int:
        """The number of files."""
        return len(self._tables)

    def __call__(self, source: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Number of the data set and row in it, int64 [B] each -> probabilities float32 [B, files, C]."""
        soft = np.empty((len(row), len(self), self._tables[0][0].shape[1]), np.float32)
        for number, (probabilities, places) in enumerate(self._tables):
            for which, place in enumerate(places):
                own = source == which
                soft[own, number] = probabilities[place[row[own]]]
        return soft


def read_predictions(file: Path, classes: Sequence[str]) -> tuple[pa.Array, np.ndarray]:
    """(image ids, large_string [N], probabilities float32 [N, C]) of a prediction file, its columns in the order of
    `classes`; columns of other classes are passed over. Raises UserError.
    """
    try:
        table = _read_csv(file, classes) if file.suffix.lower() == ".csv" else _read_arrow(file, classes)
        ids = table.column("ImageID").cast(pa.large_string()).combine_chunks()
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
    if len(pc.unique(ids)) < len(ids):
        counted = pc.value_counts(ids)
        often = counted.filter(pc.greater(counted.field("counts"), 1))[0]["values"].as_py()
        raise UserError(f"{file}: image {often} comes more than once; keep one row of it")
    return ids, probabilities


def read_header(file: Path) -> list[str]:
    """The names of the columns of a CSV or Arrow file. Raises UserError."""
    if not is_prediction_file(str(file)):
        raise UserError(f"{file}: expected predictions in a .csv or .arrow file")
    try:
        if file.suffix.lower() == ".csv":
            with pa.csv.open_csv(file) as reader:  # only its header is of interest
                return reader.schema.names
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
            return reader.schema.names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as predictions: {str(error).splitlines()[0]}") from None


def aligned(file: str | Path, index: Index, classes: Sequence[str]) -> np.ndarray:
    """float32 [len(index), C]: the probabilities of a prediction file, in the order of the index and of `classes`.

    Raises:
        UserError: naming the first image of the split that the file does not have.
    """
    ids, probabilities = read_predictions(Path(file), classes)
    place = pc.fill_null(pc.index_in(index.batch.column("image_id"), value_set=ids), -1).to_numpy()
    missing = np.flatnonzero(place < 0)
    if len(missing):
        raise UserError(
            f"{file} has no row for {len(missing)} of the {len(index)} images of {index.path.stem}, such as "
            f"{index.image_id(missing[0])}; predict that split whole, or name another --split"
        )
    return probabilities[place]


def _read_csv(file: Path, classes: Sequence[str]) -> pa.Table:
    _check_columns(file, read_header(file), classes)
    kinds = {"ImageID": pa.large_string()} | {name: pa.float32() for name in classes}
    options = pa.csv.ConvertOptions(column_types=kinds, include_columns=list(kinds), strings_can_be_null=False)
    return pa.csv.read_csv(file, convert_options=options)


def _read_arrow(file: Path, classes: Sequence[str]) -> pa.Table:
    _check_columns(file, read_header(file), classes)
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        return reader.read_all().select(["ImageID", *classes])


def _check_columns(file: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    if "ImageID" not in names:
        raise UserError(
            f"{file}: no column ImageID, so these are no predictions; `mlc predict --split train` makes them"
        )
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(
            f"{file}: no column for {len(missing)} of the {len(classes)} classes, such as {missing[0]!r}"
            f"{did_you_mean(missing[0], names)}; predict with a model of the same classes"
        )
    twice = [name for name in ("ImageID", *classes) if names.count(name) > 1]
    if twice:
        raise UserError(f"{file}: two columns are called {twice[0]!r}")


def _places(file: str, ids: pa.Array, rows: Rows) -> np.ndarray:
    """int32 [rows of the index]: which row of the file each is, -1 for one that has none and takes no part."""
    found = pc.index_in(rows.index.batch.column("image_id"), value_set=ids)
    place = pc.fill_null(found, -1).to_numpy()
    taking_part = np.arange(len(place)) if rows.rows is None else np.unique(rows.rows)
    missing = taking_part[place[taking_part] < 0]
    if len(missing):
        raise UserError(
            f"{file} has no probabilities for {len(missing)} of {len(taking_part)} training images, such as "
            f"{rows.index.image_id(missing[0])}; `mlc predict --split {rows.index.path.stem}` makes them"
        )
    return place
