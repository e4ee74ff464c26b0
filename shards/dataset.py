"""The packed data set as the rest of the program sees it: `dataset.json` and one memory-mapped Arrow index per split.

A trainer that resumes in the middle of an epoch must jump to any sample at once, so every row knows the byte range of
its image. The index is one uncompressed record batch: opening it maps the file and reads its footer, whatever the
number of rows, and all worker processes share the same pages.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards import urls
from shards.cells import free_separator
from shards.console import UserError, did_you_mean
from shards.files import check_download, replacing
from shards.json_text import to_json
from shards.table import USUAL_COLUMNS, Columns

FORMAT = "mlc-shards"
VERSION = 1
PACKER = "mlc 0.1.0"
JSON_NAME = "dataset.json"
COUNTED = 1 << 22  # labels counted at a time

SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("image_id", pa.large_string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("ext", pa.string()),
        ("labels", pa.large_list(pa.int32())),
        ("caption", pa.large_string()),
        ("fold", pa.int16()),
        ("weight", pa.float32()),
        ("crc32", pa.uint32()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One tar: `name` is relative to the data set's folder, or absolute for tars indexed where they lie."""

    name: str
    num_samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: `index` is the name of its Arrow file, `shards` are in the order the index numbers them."""

    name: str
    index: str
    num_samples: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says. `classes` are in column order, `groups` maps a group to its class
    names, `columns` says how the tables that it was packed from name their columns and separate
    labels: submissions are written the same way.

    A data set behind a URL has that as its `url`; `root` is then the local folder its indexes are copied to.
    """

    root: Path
    classes: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    folds: int
    splits: Mapping[str, Split]
    url: str = ""
    columns: Columns = USUAL_COLUMNS

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the classes and the shards' sha256: equal for equal data, wherever it lies."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in sorted(self.splits.items())}
        text = to_json([self.classes, shards], ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def group_columns(self) -> dict[str, list[int]]:
        """The columns of each group's classes."""
        return {group: [self.classes.index(name) for name in names] for group, names in self.groups.items()}

    def split(self, name: str) -> Split:
        """Raises UserError, listing the splits there are, for an unknown name."""
        if name not in self.splits:
            names = list(self.splits)
            hint = did_you_mean(name, names)
            where = self.url or self.root
            raise UserError(f"{where} has no split {name!r}; it has: {', '.join(names) or 'none'}{hint}")
        return self.splits[name]


class Index:
    """The rows of one split, memory-mapped; columns of numbers are zero-copy numpy views of shape [len].

    Pickles as a path: every process maps the file again at its first access.
    """

    def __init__(self, path: Path, root: Path, shards: Sequence[Shard], num_rows: int, num_classes: int, url: str = ""):
        self.path = path
        self.num_classes = num_classes
        self.shards = tuple(shards)
        self.url = url
        self._root = root
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "num_classes", "shards", "url", "_root", "_num_rows")
        return {name: self.__dict__[name] for name in kept}

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """The whole index, columns as in SCHEMA; mapped at the first access."""
        check_download(self.path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            batch = reader.get_batch(0) if reader.num_record_batches == 1 else None
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing; pack or index the data set again") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is damaged ({error}); pack or index the data set again") from None
        if batch is None or not self._fits(batch.schema) or batch.num_rows != self._num_rows:
            raise UserError(
                f"{self.path} does not belong to the {JSON_NAME} beside it (other columns or another "
                f"number of rows than {self._num_rows}); pack or index the data set again"
            )
        return batch

    @property
    def name(self) -> str:
        """Where the data set is, for people."""
        return self.url or str(self.path.parent)

    def _fits(self, schema: pa.Schema) -> bool:
        return schema == SCHEMA

    def _numbers(self, column: str) -> np.ndarray:
        return self.batch.column(column).to_numpy(zero_copy_only=True)

    @cached_property
    def shard(self) -> np.ndarray:
        """int32 [len]: position in the split's list of shards."""
        return self._numbers("shard")

    @cached_property
    def offset(self) -> np.ndarray:
        """int64 [len]: first byte of the image inside its tar."""
        return self._numbers("offset")

    @cached_property
    def size(self) -> np.ndarray:
        """int64 [len]: bytes of the image."""
        return self._numbers("size")

    @cached_property
    def fold(self) -> np.ndarray:
        """int16 [len]: cross-validation fold, -1 where there is none."""
        return self._numbers("fold")

    @cached_property
    def weight(self) -> np.ndarray:
        """float32 [len]: sampling weight, 1.0 unless somebody set it."""
        return self._numbers("weight")

    @cached_property
    def crc32(self) -> np.ndarray:
        """uint32 [len]: zlib.crc32 of the image's bytes."""
        return self._numbers("crc32")

    @cached_property
    def _label_values(self) -> tuple[np.ndarray, np.ndarray]:
        """(starts [len + 1], columns [total]): the labels of row i are columns[starts[i]:starts[i + 1]]."""
        labels = self.batch.column("labels")
        return labels.offsets.to_numpy(zero_copy_only=True), labels.values.to_numpy(zero_copy_only=True)

    @property
    def has_labels(self) -> bool:
        """False for a split without labels, such as a competition's test set; an empty list is a label set."""
        return self.batch.column("labels").null_count == 0

    def key(self, row: int) -> str:
        return self.batch.column("key")[int(row)].as_py()

    def image_id(self, row: int) -> str:
        return self.batch.column("image_id")[int(row)].as_py()

    def caption(self, row: int) -> str:
        """ "" where the sample has none."""
        return self.batch.column("caption")[int(row)].as_py()

    def ext(self, row: int) -> str:
        """The image's kind, by content: jpg, png or webp."""
        return self.batch.column("ext")[int(row)].as_py()

    def labels(self, row: int) -> np.ndarray:
        """int32 [labels of the row]: class columns, ascending; empty where the split has no labels."""
        starts, columns = self._label_values
        return columns[starts[row] : starts[row + 1]]

    def labels_per_row(self) -> np.ndarray:
        """int64 [len]: how many labels every sample has."""
        return np.diff(self._label_values[0])

    def labels_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(class columns int32, position in `rows` int64), both [labels]: all labels of many rows."""
        starts, columns = self._label_values
        counts = starts[rows + 1] - starts[rows]
        owner = np.repeat(np.arange(len(rows)), counts)
        first = np.cumsum(counts) - counts
        return columns[np.arange(len(owner)) + np.repeat(starts[rows] - first, counts)], owner

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(rows), C]: multi-hot labels of the rows."""
        columns, owner = self.labels_of(np.asarray(rows, dtype=np.int64))
        targets = np.zeros((len(rows), self.num_classes), dtype=np.float32)
        targets[owner, columns] = 1.0
        return targets

    def class_counts(self) -> np.ndarray:
        """int64 [C]: samples per class."""
        columns, counts = self._label_values[1], np.zeros(self.num_classes, np.int64)
        for first in range(0, len(columns), COUNTED):  # in pieces, since bincount first makes every number int64
            counts += np.bincount(columns[first : first + COUNTED], minlength=self.num_classes)
        return counts

    def shard_path(self, shard: int) -> Path:
        return self._root / self.shards[shard].name

    def shard_url(self, shard: int) -> str:
        """Where a data set behind a URL has the shard; "" for local ones."""
        return f"{self.url}/{self.shards[shard].name}" if self.url else ""


def load_dataset(path: str | Path, *, cache_dir: str | Path = "") -> Dataset:
    """Reads `path/dataset.json`; `path` is a folder or its http(s), s3 or hf URL, see shards/urls.py.

    Raises:
        UserError: there is none, or one this version cannot read.
    """
    if urls.is_url(path):
        return _load_remote(urls.check_url(str(path)), Path(cache_dir or urls.cache_home()))
    root = Path(path)
    file = root / JSON_NAME
    check_download(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no data set at {root}: {file} is missing; `mlc pack` or `mlc index` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return _parse(root, file, text)


def _load_remote(url: str, cache: Path) -> Dataset:
    """`dataset.json` is read anew each time; the indexes are copied below `cache` when they are opened."""
    file = f"{url}/{JSON_NAME}"
    root = cache / "indexes" / hashlib.sha256(url.encode()).hexdigest()[:16]
    dataset = _parse(root, file, urls.read_file(file).decode("utf-8", errors="replace"))
    for split in dataset.splits.values():
        urls.check_names(url, [split.index, *(shard.name for shard in split.shards)])
    return replace(dataset, url=url)


def _parse(root: Path, file: Path | str, text: str) -> Dataset:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{file} is not a packed data set (its format is not {FORMAT!r}); `mlc pack` writes one")
    if data.get("version") != VERSION:
        raise UserError(
            f"{file} has format version {data.get('version')}, this program reads {VERSION}; "
            f"use the program that wrote it ({data.get('packer', 'unknown')}) or pack again"
        )
    try:
        return _dataset(root, data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is incomplete ({error}); pack or index the data set again") from None


def _dataset(root: Path, data: dict[str, Any]) -> Dataset:
    splits = {
        name: Split(
            name=name,
            index=split["index"],
            num_samples=split["num_samples"],
            shards=tuple(Shard(**shard) for shard in split["shards"]),
        )
        for name, split in data["splits"].items()
    }
    groups = {name: tuple(members) for name, members in data["groups"].items()}
    classes = tuple(data["classes"])
    columns = columns_of(data.get("columns"), classes, root / JSON_NAME)
    return Dataset(root, classes, groups, data["folds"], splits, columns=columns)


def columns_of(stored: Mapping[str, str] | None, classes: Sequence[str], source: Path | str) -> Columns:
    """What `dataset.json` or `config.json` says about tables. Where it says nothing (it is older, or
    of tars that were never a table), the usual names and a separator that no class contains. Raises
    UserError naming the source for what is no columns."""
    if stored is None:
        return Columns(separator=free_separator(classes))
    known = {field.name for field in fields(Columns)}
    if not isinstance(stored, dict) or not {*stored} <= known or not all(map(_is_name, stored.values())):
        raise UserError(f"{source}: columns must be names for {', '.join(sorted(known))}, not {stored}")
    return Columns(**{"separator": " ", **stored})


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def open_index(dataset: Dataset, split: str) -> Index:
    """Opens a split's index in constant time. Raises UserError for an unknown split or a damaged file."""
    info = dataset.split(split)
    path = dataset.root / info.index
    if dataset.url:
        path = urls.mirror(f"{dataset.url}/{info.index}", dataset.root)
    index = Index(path, dataset.root, info.shards, info.num_samples, len(dataset.classes), dataset.url)
    _ = index.batch  # a damaged file is reported here and not by a worker
    return index


def write_dataset(dataset: Dataset) -> None:
    """Writes `dataset.json`: the same content gives the same bytes, so it holds no time and no machine."""
    splits = {
        name: {
            "index": split.index,
            "num_samples": split.num_samples,
            "shards": [asdict(shard) for shard in split.shards],
        }
        for name, split in dataset.splits.items()
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "packer": PACKER,
        "classes": list(dataset.classes),
        "groups": {name: list(members) for name, members in dataset.groups.items()},
        "folds": dataset.folds,
        "columns": asdict(dataset.columns),
        "splits": splits,
    }
    write_json(dataset.root / JSON_NAME, content)


def write_index(path: Path, columns: Mapping[str, Sequence]) -> None:
    """Writes one split's Arrow file; `columns` has one sequence per name in SCHEMA, all of one length."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in SCHEMA]
    batch = pa.record_batch(arrays, schema=SCHEMA)
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` in one step, as readable UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
