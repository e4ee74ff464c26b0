"""What a pack will contain, settled before a byte is written: rows, classes, files, problems, and a hash over it all.

A pack that stops after an hour at row 90,000 and then again at row 91,000 is no use, so everything that can be wrong is
looked for first and shown together. The hash tells a second run of the same command whether its work is already done.
"""

import hashlib
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from shards.cells import survives
from shards.console import UserError, did_you_mean, listed, plural, progress, say
from shards.dataset import PACKER
from shards.duplicates import group_numbers
from shards.image_folder import ImageFolder, refuse_other_folder
from shards.json_text import to_json
from shards.pictures import Files, look_at_files
from shards.split import stratified_folds
from shards.table import PREDICTION_ID, Columns, Problems, Row, found_classes, read_classes, read_rows
from shards.tar import MAX_KEY
from shards.workers import spread

CHECK_CHUNK = 64  # images
LEAST_KIND = 12  # so many copies of one picture stay together however small the data set is
WORKER_CHUNKS = 8  # below that a second process costs more to start than it saves
PLANNED_FLAGS = (
    "val_fraction",
    "folds",
    "split_copies",
    "resize",
    "quality",
    "shard_size",
    "seed",
    "id_column",
    "labels_column",
    "caption_column",
    "weight_column",
    "label_separator",
)


@dataclass(frozen=True)
class File:
    """An image on disk, as it was when the pack was planned."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Plan:
    """Everything read from outside: rows per split, their files where they exist, and what is wrong
    so far. `columns` have a separator."""

    classes: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    rows: dict[str, list[Row]]
    files: dict[Row, File]
    problems: Problems
    columns: Columns
    hash: str


@dataclass(frozen=True)
class Checked:
    """What looking at the images found: what is `wrong` with some, and `copies` of one picture, by ImageID."""

    wrong: dict[str, str] = field(default_factory=dict)
    copies: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One row ready to be written; `columns` are its class columns, None where the split has no labels."""

    key: str
    row: Row
    file: File
    columns: tuple[int, ...] | None
    fold: int


def make_plan(args: Namespace) -> Plan:
    """Reads the tables and looks at every file's name, size and time, not yet at its content."""
    problems = Problems()
    tables = {"train": args.csv, "val": args.val_csv, "test": args.test_csv}
    columns = Columns(args.id_column, args.labels_column, args.caption_column, args.weight_column, args.label_separator)
    rows = {
        split: read_rows(Path(path), columns, problems, need_labels=split != "test")
        for split, path in tables.items()
        if path
    }
    if rows.get("test") and rows["test"][0].labels is not None:
        say(f"{args.test_csv} has a column {columns.labels}: the test split keeps its labels")
    classes, groups = _classes(args, rows["train"], problems)
    columns = replace(columns, separator=columns.separator or " ")
    refuse_names(classes, columns)
    flat = [row for split in rows.values() for row in split]
    _check_labels(flat, classes, problems)
    files = _files(flat, Path(args.images), problems, args.skip_bad)
    digest = _hash(args, [path for path in tables.values() if path], classes, groups, files)
    return Plan(classes, groups, rows, files, problems, columns, digest)


def _classes(args: Namespace, train: Sequence[Row], problems: Problems) -> tuple[tuple[str, ...], dict]:
    beside = Path(args.csv).parent / "classes.yaml"
    if not args.classes and beside.exists():
        say(f"classes from {beside}, beside the CSV (--classes names another)")
    if args.classes or beside.exists():
        return read_classes(Path(args.classes or beside))
    classes = found_classes(row.labels for row in train if not problems.has(row))
    if not classes:
        wrong = f"\n{listed(problems.lines())}" if problems else ""
        raise UserError(
            f"no good row of {args.csv} has a label; name the classes with --classes, or the column with "
            f"--labels-column{wrong}"
        )
    return classes, {}


def refuse_names(classes: Sequence[str], columns: Columns) -> None:
    """Raises UserError for a class that a submission or a prediction file could not name."""
    for name in classes:
        if name in (PREDICTION_ID, columns.labels, Columns.labels):
            raise UserError(f"class {name!r} is called like a column of predictions and submissions; rename it")
        if not survives(name, columns.separator):
            raise UserError(
                f"class {name!r} contains the label separator {columns.separator!r} or looks like a list, so "
                "that no submission can name it; choose another with --label-separator, or rename it"
            )


def _check_labels(rows: Iterable[Row], classes: Sequence[str], problems: Problems) -> None:
    known = set(classes)
    for row in rows:
        for label in row.labels or ():
            if label not in known:
                hint = did_you_mean(label, classes)
                problems.add(row.source, row.line, f"label {label!r} is none of the {len(classes)} classes{hint}")


def _files(rows: Sequence[Row], images: Path, problems: Problems, skip_bad: int) -> dict[Row, File]:
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder")
    folder = ImageFolder(images)
    by_name: dict[str, Row] = {}
    by_path: dict[Path, Row] = {}
    files, missing = {}, []
    for row in rows:
        if not row.image_id:
            continue
        name = repr(row.image_id)
        if (before := by_name.setdefault(row.image_id, row)) is not row:
            text = f"image {name} was already in {before.source} line {before.line}"
        elif _leaves(row.image_id):
            text = f"image {name} is outside of {images}; name it relative to it"
        elif (file := _file(folder.find(row.image_id))) is None:
            missing.append(row.image_id)
            text = f"image {name} is not in {images}"
        elif (before := by_path.setdefault(file.path, row)) is not row:
            text = f"image {name} is the same file as {before.image_id!r} in {before.source} line {before.line}"
        else:
            files[row] = file
            continue
        problems.add(row.source, row.line, text)
    if len(missing) > skip_bad:
        refuse_other_folder(images, missing, len(files))
    return files


def _leaves(image_id: str) -> bool:
    """Judged by the name alone: a folder of symbolic links is a usual way to keep images."""
    return image_id.startswith(("/", "\\")) or ".." in PurePosixPath(image_id.replace("\\", "/")).parts


def _file(path: Path | None) -> File | None:
    if path is None:
        return None
    stat = path.stat()
    return File(path, stat.st_size, stat.st_mtime_ns)


def _hash(args: Namespace, tables: Sequence[str], classes: Sequence[str], groups: dict, files: dict[Row, File]) -> str:
    flags = {name: getattr(args, name) for name in PLANNED_FLAGS}
    flags["label_separator"] = args.label_separator or " "
    tables = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in tables]
    has = [args.val_csv is not None, args.test_csv is not None]
    digest = hashlib.sha256(to_json([PACKER, flags, tables, has, classes, groups], sort_keys=True).encode())
    for row, file in files.items():
        digest.update(to_json([row.image_id, file.path.name, file.size, file.mtime_ns]).encode())
    return digest.hexdigest()


def check_images(plan: Plan, args: Namespace) -> Checked:
    """Decodes every image once; where training rows are to be split, it is also looked at which are near copies."""
    train = {row for row in plan.rows["train"] if args.val_fraction is not None or args.folds}
    train = set() if args.split_copies else train
    wrong: dict[str, str] = {}
    rows: list[Row] = []
    seen: list[Files] = []
    with progress("checking images", len(plan.files)) as advance:
        for fingerprints in (False, True):
            of = [row for row in plan.files if (row in train) == fingerprints]
            chunks = [of[start : start + CHECK_CHUNK] for start in range(0, len(of), CHECK_CHUNK)]
            paths = [[plan.files[row].path for row in chunk] for chunk in chunks]
            processes = min(args.workers, 1 + len(chunks) // WORKER_CHUNKS)
            looks = spread(partial(look_at_files, fingerprints=fingerprints), paths, processes)
            for chunk, found in zip(chunks, looks, strict=True):
                advance(len(chunk))
                wrong |= {row.image_id: text for row, text in zip(chunk, found.problem, strict=True) if text}
                if fingerprints:
                    rows += chunk
                    seen.append(found)
    return Checked(wrong, _copies(rows, Files.joined(seen)) if rows else [])


def _copies(rows: Sequence[Row], seen: Files) -> list[list[str]]:
    usable = np.array([not text for text in seen.problem])
    content = np.where(usable, seen.content, -1 - np.arange(len(rows)))  # what was not read is no copy of anything
    number = group_numbers(seen.hash, seen.tiny, content, usable)
    found: dict[int, list[str]] = {}
    for row, of in zip(rows, number.tolist(), strict=True):
        found.setdefault(of, []).append(row.image_id)
    return [members for members in found.values() if len(members) > 1]


def settle(plan: Plan, checked: Checked, args: Namespace) -> dict[str, list[Sample]]:
    """The samples of every split in the order of the CSV, bad rows left out.

    Raises UserError, with all that is wrong, where more rows are bad than --skip-bad allows.
    """
    problems = plan.problems
    for row in plan.files:
        if row.image_id in checked.wrong:
            problems.add(row.source, row.line, f"image {row.image_id!r}: {checked.wrong[row.image_id]}")
    bad = len(problems)
    if bad > args.skip_bad:
        raise UserError(
            f"{plural(bad, 'bad row')}, nothing is packed; mend them, or leave them out with "
            f"--skip-bad {bad}\n{listed(problems.lines())}"
        )
    if bad:
        say(f"left out {plural(bad, 'bad row')}\n{listed(problems.lines())}")
    good = {split: [row for row in rows if not problems.has(row)] for split, rows in plan.rows.items()}
    group_of = _kept_together(checked.copies, len(good["train"]), args)
    return _samples(_split(good, plan, args, group_of), plan, args, group_of)


def _kept_together(copies: Sequence[list[str]], rows: int, args: Namespace) -> dict[str, int]:
    """ImageID -> number of its group, for the groups of near copies that a split can keep together.

    Where a large part of the pictures look alike, as X-rays do, they are of one kind and no copies.
    """
    shares = [args.val_fraction, 1 - args.val_fraction] if args.val_fraction else []
    shares += [1 / args.folds] if args.folds else []
    most = max(LEAST_KIND, rows * min(shares, default=0) / 4)
    groups = [members for members in copies if len(members) <= most]
    if groups:
        say(
            f"{plural(sum(map(len, groups)), 'training image')} in {plural(len(groups), 'group')} of near copies: each "
            "group stays on one side of every split (--split-copies deals them out one by one)"
        )
    if len(groups) < len(copies):
        alike = sum(map(len, copies)) - sum(map(len, groups))
        say(f"{alike} training images look so much alike that they are of one kind and no copies: dealt out one by one")
    return {name: number for number, members in enumerate(groups) for name in members}


def _groups(rows: Sequence[Row], group_of: Mapping[str, int]) -> list[int]:
    """A number per row, that of its near copies or one of its own."""
    return [group_of.get(row.image_id, len(group_of) + place) for place, row in enumerate(rows)]


def _columns(row: Row, plan: Plan, position: dict[str, int]) -> tuple[int, ...] | None:
    return None if row.labels is None else tuple(sorted(position[label] for label in row.labels))


def _split(
    rows: dict[str, list[Row]], plan: Plan, args: Namespace, group_of: Mapping[str, int]
) -> dict[str, list[Row]]:
    """Cuts the validation split out of train where --val-fraction asks for it."""
    if args.val_fraction is None:
        return rows
    position = {name: column for column, name in enumerate(plan.classes)}
    labels = [_columns(row, plan, position) for row in rows["train"]]
    fractions = [1 - args.val_fraction, args.val_fraction]
    part = stratified_folds(labels, fractions, args.seed, _groups(rows["train"], group_of))
    train, val = ([row for row, of in zip(rows["train"], part, strict=True) if of == which] for which in (0, 1))
    return {"train": train, "val": val} | {split: kept for split, kept in rows.items() if split != "train"}


def _samples(
    rows: dict[str, list[Row]], plan: Plan, args: Namespace, group_of: Mapping[str, int]
) -> dict[str, list[Sample]]:
    for split, kept in rows.items():
        if not kept:
            raise UserError(f"the {split} split would be empty; give more rows or another --val-fraction")
    position = {name: column for column, name in enumerate(plan.classes)}
    columns = {split: [_columns(row, plan, position) for row in kept] for split, kept in rows.items()}
    folds = {split: [-1] * len(kept) for split, kept in rows.items()}
    if args.folds:
        if args.folds > len(rows["train"]):
            raise UserError(f"--folds {args.folds} is more than the {len(rows['train'])} samples of train")
        together = _groups(rows["train"], group_of)
        folds["train"] = stratified_folds(columns["train"], [1.0] * args.folds, args.seed, together).tolist()
    keys = Keys()
    return {
        split: [
            Sample(keys.make(row.image_id), row, plan.files[row], *rest)
            for row, *rest in zip(kept, columns[split], folds[split], strict=True)
        ]
        for split, kept in rows.items()
    }


class Keys:
    """WebDataset keys: the file's stem where that is plain and free, else with a suffix drawn from the ImageID."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def make(self, image_id: str) -> str:
        stem = PurePosixPath(image_id).stem
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:MAX_KEY]
        key, tries = plain, 0
        while not key or key in self._taken or (key == plain and plain != stem):
            digest = hashlib.sha256(f"{image_id}\0{tries}".encode(errors="surrogatepass")).hexdigest()[:10]
            key, tries = f"{plain[: MAX_KEY - 11]}-{digest}", tries + 1
        self._taken.add(key)
        return key
