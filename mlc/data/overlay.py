"""Other labels for samples that are packed already: `--data DIR --data pseudo:FILE` trains on them, and no image is
written twice.

The file is an index as `mlc pack` writes it, of some rows of one split, with labels of its own; where the tars are it
says in its metadata. Soft labels are one more column, a probability for each class.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlc.data.reader import check_shards
from shards.console import UserError
from shards.dataset import SCHEMA, Dataset, Index, load_dataset, open_index
from shards.files import check_download, disk_errors, whole
from shards.json_text import to_json

PREFIX = "pseudo:"
ABOUT = b"mlc overlay"  # key of the schema's metadata


class Overlay(Index):
    """The rows of an overlay as an index; `dataset` is the one whose tars they are in."""

    def __init__(self, path: Path, dataset: Dataset, split: str, num_rows: int):
        shards, classes = dataset.split(split).shards, len(dataset.classes)
        super().__init__(path, dataset.root, shards, num_rows, classes, dataset.url)
        self.dataset = dataset

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.path}"

    @property
    def fingerprint(self) -> str:
        """That of the data set, and 16 hex digits over the overlay: another choice or other labels are other data."""
        return f"{self.dataset.fingerprint}/{_digest(self.path)}"

    def _fits(self, schema: pa.Schema) -> bool:
        return schema in (SCHEMA, _soft_schema(self.num_classes))

    @cached_property
    def soft(self) -> np.ndarray | None:
        """float32 [len, C]: the probabilities; None where the labels are hard."""
        if "soft" not in self.batch.schema.names:
            return None
        return self.batch.column("soft").values.to_numpy(zero_copy_only=True).reshape(len(self), -1)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return super().targets(rows) if self.soft is None else self.soft[np.asarray(rows, np.int64)]


def _soft_schema(classes: int) -> pa.Schema:
    return SCHEMA.append(pa.field("soft", pa.list_(pa.float32(), classes)))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_overlay(
    path: Path, dataset: Dataset, split: str, rows: np.ndarray, labels: np.ndarray, soft: np.ndarray | None = None
) -> None:
    """Rows int64 [n] of a split with labels bool [n, C]; `soft`: probabilities float32 [n, C] to train on instead, the
    labels are then what samplers count."""
    index = open_index(dataset, split)
    chosen = pa.Table.from_batches([index.batch]).take(pa.array(rows)).combine_chunks()
    owner, column = np.nonzero(labels)
    starts = np.searchsorted(owner, np.arange(len(rows) + 1))
    lists = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), pa.array(column, pa.int32()))
    columns = {name: chosen.column(name).combine_chunks() for name in SCHEMA.names}
    columns |= {"labels": lists, "fold": pa.array(np.full(len(rows), -1), pa.int16())}
    schema = SCHEMA if soft is None else _soft_schema(len(dataset.classes))
    if soft is not None:
        values = pa.array(np.ascontiguousarray(soft, np.float32).reshape(-1))
        columns["soft"] = pa.FixedSizeListArray.from_arrays(values, len(dataset.classes))
    where = dataset.url or os.path.relpath(dataset.root, path.parent)
    about = {"data": where, "split": split, "fingerprint": dataset.fingerprint, "samples": len(rows)}
    schema = schema.with_metadata({ABOUT: to_json(about).encode()})
    batch = pa.record_batch([columns[name] for name in schema.names], schema=schema)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as building, pa.OSFile(str(building), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def is_overlay(text: str) -> bool:
    return text.startswith(PREFIX)


def open_overlay(text: str, known: Sequence[Dataset], *, cache_dir: str = "") -> Overlay:
    """`pseudo:FILE`, over the data set among `known` that it was made for, else over the one where that was then.

    Raises:
        UserError: no such file, or its data set is gone or another now.
    """
    path = Path(text.removeprefix(PREFIX))
    check_download(path, "--data")
    try:
        with pa.memory_map(str(path)) as mapped:
            about = json.loads((pa.ipc.open_file(mapped).schema.metadata or {})[ABOUT])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        reason = "it is no overlay" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"--data {text}: cannot be read ({reason}); `mlc pseudo` writes such files") from None
    dataset = next((found for found in known if found.fingerprint == about["fingerprint"]), None)
    if dataset is None:
        where = about["data"] if "://" in about["data"] else os.path.normpath(path.parent / about["data"])
        dataset = load_dataset(where, cache_dir=cache_dir)
        if dataset.fingerprint != about["fingerprint"]:
            raise UserError(
                f"--data {text} was made for the data set {about['fingerprint']}, and {where} is {dataset.fingerprint} "
                "now; predict that and make the pseudo-labels again"
            )
    open_index(dataset, about["split"])  # its tars and index must be there
    check_shards(dataset, about["split"])
    overlay = Overlay(path, dataset, about["split"], about["samples"])
    _ = overlay.batch  # a damaged file is reported here and not by a worker
    return overlay
