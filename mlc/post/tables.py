"""Numbers about each image, from any of four kinds of file."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mlc.data.prediction_files import rows_of
from shards.console import UserError
from shards.dataset import Index
from shards.files import check_download

NAMES = ("ImageID", "image_id", "key")


def by_image(files: list[Path], index: Index, flag: str, id_column: str = "ImageID") -> np.ndarray | None:
    """float32 [n, D]: the numbers of each image, from one file or several side by side; None without a file.
    id_column: what the tables of the data set call the image.

    Raises:
        UserError: a file that cannot be read, or lacks an image of the split.
    """
    tables = []
    for file in files:
        check_download(file, flag)
        try:
            names, kind, values = _read_numbers(file, (*NAMES, id_column))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{flag} {file} cannot be read: {str(error).splitlines()[0]}") from None
        wanted = index.batch.column("key" if kind == "key" else "image_id")
        what, fix = f"images of {index.path.stem}", "it must have a row for each"
        found = values[rows_of(f"{flag} {file}", pa.array(names, pa.large_string()), wanted, what, fix)]
        wrong = ~np.isfinite(found)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"{flag} {file}: image {wanted[int(row)].as_py()}, number {column + 1}: "
                f"{found[row, column]:g} ({wrong.sum()} values are not finite)"
            )
        tables.append(found)
    return np.concatenate(tables, axis=1) if tables else None


def _read_numbers(file: Path, ids: Sequence[str]) -> tuple[list[str], str, np.ndarray]:
    """(names, their column, float32 [n, D]) of a CSV, Arrow, Parquet or .npz file: a column of names (one of `ids`),
    and all columns of numbers or of lists of numbers; where a list is missing its numbers are 0."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            kind = _names_of(list(arrays), ids)
            tables = [np.asarray(arrays[name], np.float32) for name in arrays if name not in ids]
            return arrays[kind].astype(str).tolist(), kind, _side_by_side(tables)
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
        kind = _names_of(list(rows[0]) if rows else [], ids)
        tables = [np.array([row[name] for row in rows], np.float32) for name in rows[0] if name not in ids]
        return [row[kind] for row in rows], kind, _side_by_side(tables)
    if file.suffix == ".parquet":
        table = parquet.read_table(file)
    else:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
    kind = _names_of(table.column_names, ids)
    tables = [found for name in table.column_names if (found := _numbers(table.column(name))) is not None]
    return table.column(kind).to_pylist(), kind, _side_by_side(tables)


def _names_of(columns: list[str], ids: Sequence[str]) -> str:
    return next((name for name in ids if name in columns), None) or _fail(f"none of the columns {', '.join(ids)}")


def _fail(text: str):
    raise ValueError(text)


def _numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """float32 [n] or [n, D]; None for a column of something else."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_numpy().astype(np.float32)
    if not pa.types.is_nested(column.type) or not hasattr(column.type, "value_type"):
        return None
    lists = column.combine_chunks()
    there = lists.is_valid().to_numpy(zero_copy_only=False)
    flat = lists.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    table = np.zeros((len(lists), len(flat) // max(1, there.sum())), np.float32)
    table[there] = flat.reshape(there.sum(), -1)
    return table


def _side_by_side(tables: list[np.ndarray]) -> np.ndarray:
    if not tables:
        raise ValueError("no numbers in it")
    return np.concatenate([table.reshape(len(table), -1) for table in tables], axis=1)
