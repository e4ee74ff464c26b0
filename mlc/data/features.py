"""Frozen features on disk: what encoders made of each sample, once and for all (`mlc features`). A head on them trains
in minutes, without an image decoded or a caption tokenised.

An Arrow IPC file with the columns `key`, `image_id`, `split` and `features` (a list of one length; null where the image
is bad), one record batch a split. Its metadata says what data and which encoders it was made from, so that a file never
meets other data, nor a head the features of another encoder. It is mapped, not read: workers share its pages.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from shards.console import UserError, did_you_mean
from shards.dataset import Dataset, Index
from shards.files import check_download, whole
from shards.json_text import to_json

_META = b"mlc-features"
_AGAIN = "`mlc features` makes it"
_ONLY_TOLD = ("name", "tta")  # what may differ between the features of training and prediction


def write_features(
    path: Path,
    splits: Mapping[str, tuple[Index, np.ndarray, np.ndarray]],
    *,
    data: str,
    encoders: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the file, whole or not at all; the same content gives the same bytes.

    splits: {name: (its index, features float16 or float32 [N, D] of all of its rows, whether a row has any, bool [N])}.
    data: the data set's fingerprint.
    encoders: what each is, its number of `features` among it; in the order of the columns.
    """
    digest = hashlib.sha256()
    for _, values, seen in splits.values():
        digest.update(values.data)
        digest.update(seen.data)
    told = {"data": data, "encoders": list(encoders), "splits": list(splits), "sha256": digest.hexdigest()}
    first = next(iter(splits.values()))[1]
    schema = pa.schema(
        [
            ("key", pa.large_string()),
            ("image_id", pa.large_string()),
            ("split", pa.string()),
            ("features", pa.list_(pa.from_numpy_dtype(first.dtype), first.shape[1])),
        ],
        {_META: to_json(told).encode()},
    )
    with (
        whole(path, pa.ArrowException) as building,
        pa.OSFile(str(building), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for name, (index, values, seen) in splits.items():
            flat = pa.array(values.reshape(-1))
            own = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("features").type, mask=pa.array(~seen))
            named = [index.batch.column(column) for column in ("key", "image_id")]
            writer.write_batch(pa.record_batch([*named, pa.array([name] * len(index)), own], schema=schema))


class FeatureFile:
    """What a file says, and the features of its splits; pickles as a path."""

    def __init__(self, path: str | Path):
        """Raises UserError for a file that `write_features` did not write."""
        self.path = Path(path)
        check_download(self.path, "--features")
        try:
            told = json.loads((self._reader.schema.metadata or {})[_META])
            self.data, self.splits, self.sha256 = told["data"], told["splits"], told["sha256"]
            self.encoders: list[dict[str, Any]] = told["encoders"]
            self.dtype = self._reader.schema.field("features").type.value_type.to_pandas_dtype()
        except (pa.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, pa.ArrowException | OSError) else "other metadata"
            raise UserError(f"{path} is no file of features ({reason}); {_AGAIN}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(str(self.path)))

    @property
    def sizes(self) -> list[int]:
        """How many of the columns each encoder made."""
        return [encoder["features"] for encoder in self.encoders]

    def split(self, name: str) -> pa.RecordBatch:
        """The rows of a split. Raises UserError, naming those there are."""
        if name not in self.splits:
            raise UserError(
                f"{self.path} has no split {name!r}; it has: {', '.join(self.splits)}"
                f"{did_you_mean(name, self.splits)}; `mlc features --split {','.join([*self.splits, name])}` makes all"
            )
        return self._reader.get_batch(self.splits.index(name))

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(features [N, D] of a split, not copied, whether a row has any, bool [N])."""
        column = self.split(name).column("features")
        values = column.values.to_numpy(zero_copy_only=True).reshape(len(column), -1)
        return values, ~column.is_null().to_numpy(zero_copy_only=False)


class Features:
    """Those of the rows of one split, from one file or, side by side, from several."""

    def __init__(
        self, names: Sequence[str], dataset: Dataset, split: str, index: Index, rows: np.ndarray | None = None
    ):
        """`rows` int64 [n]: those that must have features, bad images excepted (default: all).

        Raises:
            UserError: a file that is none, of other data, or without the split or one of the rows.
        """
        self.files = [FeatureFile(name) for name in names]
        for file in self.files:
            _refuse_other_data(file, dataset)
        self._split = split
        self._places = [_places(file, split, index, rows) for file in self.files]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_values"}

    @cached_property
    def _values(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [file.values(self._split) for file in self.files]

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """What each part of the features was made by, left to right."""
        return [encoder for file in self.files for encoder in file.encoders]

    @property
    def fingerprint(self) -> str:
        """16 hex digits: equal for equal features."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()[:16]

    def known(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B] -> bool [B]: whether the image of a row could be read; False for -1."""
        found = rows >= 0
        for (_, seen), places in zip(self._values, self._places, strict=True):
            found = found & seen[places[rows]]
        return found

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B] -> [B, D]; anything in rows that are not `known`."""
        parts = [values[places[rows]] for (values, _), places in zip(self._values, self._places, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)

    def described(self) -> dict[str, Any]:
        """For the `config.json` of exported weights."""
        return {"features": self.encoders}

    def random(self, size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """For a trial of the memory."""
        return {"features": torch.randn(size, sum(encoder["features"] for encoder in self.encoders), device=device)}

    def statistics(self, rows: np.ndarray, at_once: int = 8192) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) float32 [D] over the rows, int64 [N]. What an encoder was given nothing for, all
        of its features being zero, does not count; 1 is the deviation of what never changes."""
        total = squares = count = 0.0
        edges = np.cumsum([encoder["features"] for encoder in self.encoders])[:-1]
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            x = self(some[self.known(some)]).astype(np.float64)
            there = [np.broadcast_to(part.any(1, keepdims=True), part.shape) for part in np.split(x, edges, axis=1)]
            there = np.concatenate(there, 1)
            total, squares, count = total + x.sum(0), squares + (x * x).sum(0), count + there.sum(0)
        mean = total / np.maximum(count, 1)
        std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
        return mean.astype(np.float32), np.where(std > 1e-6, std, 1).astype(np.float32)


def refuse_other_encoders(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises UserError where the features `now` are not of the encoders that a head was trained on, naming what
    differs first."""
    if len(then) != len(now):
        raise UserError(f"--features {name}: of {len(now)} encoders, and the run was trained on {len(then)}")
    for number, (a, b) in enumerate(zip(then, now, strict=True), 1):
        for key in dict.fromkeys([*a, *b]):
            if key not in _ONLY_TOLD and a.get(key) != b.get(key):
                raise UserError(
                    f"--features {name}: encoder {number} ({b['name']}) has another {key} than the one that the run "
                    f"was trained on ({a['name']}): {b.get(key)}, not {a.get(key)}; make the file with that one"
                )


def _refuse_other_data(file: FeatureFile, dataset: Dataset) -> None:
    if file.data != dataset.fingerprint:
        where = dataset.url or dataset.root
        raise UserError(
            f"{file.path} was made from other data: fingerprint {file.data}, {where} has {dataset.fingerprint}; "
            f"make it again with `mlc features --data {where}`"
        )


def _places(file: FeatureFile, split: str, index: Index, rows: np.ndarray | None) -> np.ndarray:
    """int32 [rows of the index]: which row of the file's split each is; 0 for one that takes no part."""
    own, keys = file.split(split).column("key"), index.batch.column("key")
    if own.equals(keys):
        return np.arange(len(keys), dtype=np.int32)
    found = pc.fill_null(pc.index_in(keys, value_set=own), -1).to_numpy()
    taking_part = np.arange(len(found)) if rows is None else np.unique(rows)
    missing = taking_part[found[taking_part] < 0]
    if len(missing):
        raise UserError(
            f"{file.path} has no features for {len(missing)} of {len(taking_part)} samples of the split {split!r}, "
            f"such as {index.key(missing[0])}; make it again with `mlc features --split {split}`"
        )
    return np.maximum(found, 0).astype(np.int32)
