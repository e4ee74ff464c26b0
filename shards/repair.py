"""`mlc verify --repair`: after damage, the index says again what is really there; the tars are never written to.

A copy that broke off, a disk that turned a bit or a shard replaced behind the index's back need not cost the data set.
Shards with problems are read anew. Samples that cannot be trusted leave the index and are listed, with the reason, in
`quarantine.csv`. Everything is written under new names first; the new `dataset.json` is what makes it valid.
"""

import csv
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.console import UserError
from shards.dataset import SCHEMA, Dataset, Index, Shard, Split, open_index, write_dataset, write_index
from shards.files import replacing
from shards.image import BadImage, check_image, open_image
from shards.index import Sidecar, column_of, read_sidecar
from shards.pack import PLAN_NAME, write_companions
from shards.table import BOM
from shards.tar import Group, Member, file_sha256, scan, split_name

QUARANTINE = "quarantine.csv"


class Quarantined(NamedTuple):
    """A sample that stays out of the index; with key "", a shard that is accepted although its end is damaged."""

    split: str
    shard: str
    key: str
    image_id: str
    reason: str


def read_quarantine(root: Path) -> list[Quarantined]:
    """The rows of `quarantine.csv`, none where there is no such file. Raises UserError for a foreign one."""
    path = root / QUARANTINE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if tuple(header) != Quarantined._fields or any(len(row) != len(header) for row in rows):
        raise UserError(f"{path}: expected the columns {','.join(Quarantined._fields)}; move the file away")
    return [Quarantined(*row) for row in rows]


def _write_quarantine(root: Path, entries: Iterable[Quarantined]) -> None:
    with replacing(root / QUARANTINE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Quarantined._fields, *entries])


# ---- one tar, read as far as it goes ---------------------------------------------------------------------------------


@dataclass
class Survey:
    """What a tar holds: samples with an image, keys that are ambiguous and why, and what stopped the reading."""

    groups: dict[str, Group] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    end: str = ""


def survey(path: Path) -> Survey:
    """Like `shards.tar.groups`, but what is wrong with one sample does not hide the others."""
    found, current = Survey(), None
    try:
        for member in scan(path):
            parts = split_name(member.name)
            if parts is None:
                continue
            key, ext = parts
            group = found.groups.setdefault(key, Group(key))
            if key != current and group.members:
                found.bad[key] = "the files of the sample are not next to each other, or the key is there twice"
            elif ext in group.members:
                found.bad.setdefault(key, f"{member.name} is there twice")
            if member.problem:
                found.bad.setdefault(key, member.problem)
            group.members.setdefault(ext, member)
            current = key
    except UserError as error:
        found.end = str(error)
    for key, group in list(found.groups.items()):
        try:
            wanted = key not in found.bad and group.image()
        except UserError as error:
            found.bad[key], wanted = str(error), None
        if not wanted:
            del found.groups[key]
    return found


def image_problem(data: bytes, *, decode: bool) -> str:
    """What is wrong with the bytes of an image, "" where nothing is; the header is always read."""
    if not data:
        return "the image is empty"
    try:
        check_image(data) if decode else open_image(data)
    except BadImage as problem:
        return f"the image {problem}"
    return ""


def labels_differ(index: Index, row: int, sidecar: Sidecar, position: Mapping[str, int]) -> str:
    """How the texts of a sample differ from its row of the index, "" where they agree."""
    caption = index.caption(row).lstrip(BOM)  # an older index has what now is no part of a caption
    if (sidecar.image_id, sidecar.caption) != (index.image_id(row), caption):
        return "the index has another image_id or caption than the tar"
    columns = {column_of(label, position) for label in sidecar.labels or ()}
    return "" if columns == set(index.labels(row).tolist()) else "the index has other labels than the tar"


def keys_twice(keys: pa.Array) -> np.ndarray:
    """Rows, ascending, whose key an earlier row has already."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return np.empty(0, np.int64)
    counts = pc.value_counts(keys)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    seen, later = set(), []
    for row in np.flatnonzero(pc.is_in(keys, twice).to_numpy(zero_copy_only=False)):
        key = keys[int(row)].as_py()
        if key in seen:
            later.append(row)
        seen.add(key)
    return np.array(later, np.int64)


# ---- the repair ------------------------------------------------------------------------------------------------------


def repair(dataset: Dataset, problems: Sequence[Mapping[str, str]], *, decode: bool) -> list[Quarantined]:
    """Makes the indexes fit the tars again, given what `verify` found; returns what was quarantined for that.

    Args:
        problems: {"split", "shard", ...}: the shards to read anew; the rows of all others are kept as they are.
        decode: decode every image of those shards.
    Raises:
        UserError: the folder cannot be written to.
    """
    before = read_quarantine(dataset.root)
    splits, found, damaged = dict(dataset.splits), [], {(problem["split"], problem["shard"]) for problem in problems}
    try:
        for name in sorted({split for split, _ in damaged}):
            own = {shard for split, shard in damaged if split == name}
            splits[name], lost = _SplitRepair(dataset, name, before, decode).run(own)
            found += lost
        kept = [entry for entry in before if entry.key or (entry.split, entry.shard) not in damaged]
        _write_quarantine(dataset.root, dict.fromkeys(kept + found))
        after = replace(dataset, splits=splits)
        write_dataset(after)
        _tidy(dataset, after)
    except OSError as error:
        raise UserError(f"{dataset.root} cannot be repaired: {error.strerror} ({error.filename})") from error
    return found


def _tidy(before: Dataset, after: Dataset) -> None:
    """What rests on the old index goes or is written again."""
    for name, split in before.splits.items():
        if after.splits[name].index != split.index:
            (before.root / split.index).unlink(missing_ok=True)
    (before.root / PLAN_NAME).unlink(missing_ok=True)  # else a second `mlc pack` would think its work still done
    if (before.root / "_info.json").exists():
        write_companions(after)


class _SplitRepair:
    """The rows of one split, collected shard by shard."""

    def __init__(self, dataset: Dataset, name: str, before: Sequence[Quarantined], decode: bool):
        self.root, self.split, self.decode = dataset.root, dataset.split(name), decode
        self.position = {label: column for column, label in enumerate(dataset.classes)}
        self.known = {(entry.shard, entry.key): entry for entry in before if entry.split == name}
        try:
            self.old = open_index(dataset, name)
        except UserError:  # the index itself is the damage: everything comes from the tars
            self.old = None
        self.by_key: dict[str, int] = {}  # rows of the old index that come from damaged shards
        self.tables: list[pa.Table] = []
        self.shards: list[Shard] = []
        self.lost: list[Quarantined] = []

    def run(self, damaged: set[str]) -> tuple[Split, list[Quarantined]]:
        if self.old is not None:
            good = [number for number, shard in enumerate(self.split.shards) if shard.name not in damaged]
            self.by_key = {self.old.key(row): row for row in np.flatnonzero(~np.isin(self.old.shard, good))}
        for number, shard in enumerate(self.split.shards):
            if self.old is not None and shard.name not in damaged:
                rows = np.flatnonzero(self.old.shard == number)
                self._keep(pa.Table.from_batches([self.old.batch]).take(rows), shard)
            else:
                self._reread(number, shard)
        table = self._settled(pa.concat_tables([SCHEMA.empty_table(), *self.tables]).combine_chunks())
        self._lose_strays(table)
        counts = np.bincount(table.column("shard").to_numpy(), minlength=len(self.shards))
        shards = tuple(replace(shard, num_samples=int(n)) for shard, n in zip(self.shards, counts, strict=True))
        index = _next_name(self.split)
        write_index(self.root / index, {name: table.column(name).combine_chunks() for name in SCHEMA.names})
        return replace(self.split, index=index, num_samples=len(table), shards=shards), self.lost

    def _keep(self, table: pa.Table, shard: Shard) -> None:
        number = pa.array(np.full(len(table), len(self.shards), np.int32))
        self.tables.append(table.set_column(SCHEMA.get_field_index("shard"), SCHEMA.field("shard"), number))
        self.shards.append(shard)

    def _lose(self, shard: str, key: str, image_id: str, reason: str) -> None:
        if (shard, key) not in self.known:
            self.lost.append(Quarantined(self.split.name, shard, key, image_id, reason))

    def _reread(self, number: int, shard: Shard) -> None:
        path = self.root / shard.name
        rows = {} if self.old is None else {self.old.key(row): row for row in np.flatnonzero(self.old.shard == number)}
        if not path.is_file():
            for key, row in rows.items():
                self._lose(shard.name, key, self.old.image_id(row), "the shard is missing")
            return
        now = replace(shard, size=path.stat().st_size, sha256=file_sha256(path))
        found = survey(path)
        intact = now.sha256 == shard.sha256
        trusts_tar = intact or self._laid_out_anew(found, rows, shard.name)
        decode = self.decode or (trusts_tar and not intact)  # nobody has looked at these images yet
        self._keep(self._usable(path, found, shard, _Judge(self, rows, trusts_tar, decode)), now)
        for key, reason in found.bad.items():
            self._lose(shard.name, key, self.old.image_id(rows[key]) if key in rows else key, reason)
        for key, row in rows.items():
            if not intact and key not in found.groups and key not in found.bad:
                self._lose(shard.name, key, self.old.image_id(row), "no longer in the shard")
        if found.end:
            self.lost.append(Quarantined(self.split.name, shard.name, "", "", "damaged behind the last sample"))

    def _usable(self, path: Path, found: Survey, shard: Shard, judge: "_Judge") -> pa.Table:
        """The samples of a tar that belong into the index."""
        columns: dict[str, list] = {name: [] for name in SCHEMA.names}
        with open(path, "rb") as file:
            for group in found.groups.values():
                if group.key not in judge.rows and (shard.name, group.key) in self.known:
                    continue
                values, reason = judge.row(file, group)
                if reason:
                    self._lose(shard.name, group.key, values["image_id"], reason)
                    continue
                for name, value in values.items():
                    columns[name].append(value)
        return pa.table(columns, schema=SCHEMA)

    def _laid_out_anew(self, found: Survey, rows: Mapping[str, int], shard: str) -> bool:
        """True where the shard is not the indexed one with damage, but another that was put in its place."""
        for key, group in found.groups.items():
            ext, member = group.image()
            if key not in rows:
                if (shard, key) not in self.known:
                    return True
            elif (self.old.ext(rows[key]), int(self.old.offset[rows[key]]), int(self.old.size[rows[key]])) != (
                ext,
                member.offset,
                member.size,
            ):
                return True
        return False

    def _lose_strays(self, table: pa.Table) -> None:
        """Rows of the old index that name a shard there is not, unless another shard has turned out to hold them."""
        if self.old is None:
            return
        strays = np.flatnonzero((self.old.shard < 0) | (self.old.shard >= len(self.split.shards)))
        found = set(table.column("key").to_pylist()) if len(strays) else set()
        for row in strays:
            if (key := self.old.key(row)) not in found:
                self._lose("", key, self.old.image_id(row), "its shard is not in dataset.json")

    def _settled(self, table: pa.Table) -> pa.Table:
        """Without the rows that do not fit with the others: a key again, or no labels where others have some."""
        again = keys_twice(table.column("key").combine_chunks())
        none = pc.is_null(table.column("labels")).to_numpy()
        unlabelled = np.empty(0, np.int64) if none.all() else np.flatnonzero(none)
        keep = np.ones(len(table), bool)
        for rows, reason in (again, "another shard has the key as well"), (unlabelled, "no labels"):
            keep[rows] = False
            for row in table.take(rows).select(["shard", "key", "image_id"]).to_pylist():
                self._lose(self.shards[row["shard"]].name, row["key"], row["image_id"], reason)
        return table.filter(pa.array(keep))


@dataclass
class _Judge:
    """Decides about the samples of one shard; `rows` are those the old index has of it."""

    repair: _SplitRepair
    rows: Mapping[str, int]
    trusts_tar: bool
    decode: bool

    def row(self, file: BinaryIO, group: Group) -> tuple[dict, str]:
        """(columns of the index, why the sample cannot be used or "")."""
        old, row, before = self.repair.old, self.rows.get(group.key), self.repair.by_key.get(group.key)
        ext, member = group.image()
        data = _read(file, member)
        values = {
            "key": group.key,
            "image_id": group.key if before is None else old.image_id(before),
            "shard": 0,
            "offset": member.offset,
            "size": member.size,
            "ext": ext,
            "fold": -1 if before is None else int(old.fold[before]),
            "weight": 1.0 if before is None else float(old.weight[before]),
            "crc32": zlib.crc32(data),
        }
        if len(data) != member.size:
            return values, "the shard ends inside the image"
        if not self.trusts_tar and values["crc32"] != old.crc32[row]:
            return values, "the image's crc32 differs from the pack's"
        if reason := image_problem(data, decode=self.decode):
            return values, reason
        try:
            sidecar = read_sidecar(file, group)
        except UserError as error:
            return values, str(error)
        if not self.trusts_tar and (reason := labels_differ(old, row, sidecar, self.repair.position)):
            return values, reason
        columns = None if sidecar.labels is None else {column_of(x, self.repair.position) for x in sidecar.labels}
        if columns and None in columns:
            return values, f"a label is none of the {len(self.repair.position)} classes"
        texts = {
            "labels": None if columns is None else sorted(columns),
            "caption": sidecar.caption,
            "image_id": sidecar.image_id,
        }
        return values | texts, ""


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _next_name(split: Split) -> str:
    """train.arrow, train.r1.arrow, train.r2.arrow, ...: the old index stays valid until dataset.json names the new."""
    number = re.fullmatch(r".*\.r(\d+)\.arrow", split.index)
    return f"{split.name}.r{int(number[1]) + 1 if number else 1}.arrow"
