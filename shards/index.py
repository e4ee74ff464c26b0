"""`mlc index`: tars that somebody else wrote become a data set where they lie; nothing is rewritten or copied.

Any WebDataset will do whose samples are `KEY.jpg|jpeg|png|webp` with labels in `KEY.json` ("labels": names or columns)
or `KEY.cls`, and captions in `KEY.txt`. Every tar is read once, for its checksums.
"""

import glob
import json
import re
import zlib
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from shards.cells import nfc
from shards.console import Parser, UserError, did_you_mean, listed, plural, progress, say
from shards.dataset import JSON_NAME, Dataset, Shard, Split, columns_of, load_dataset, write_dataset, write_index
from shards.json_text import to_json
from shards.plan import refuse_names
from shards.table import BOM, found_classes, read_classes
from shards.tar import Group, Member, file_sha256, groups
from shards.workers import default_workers, spread

Label = str | int


@dataclass(frozen=True)
class Sidecar:
    """What a sample's small files say; labels are names or columns, None where nothing is said about them."""

    image_id: str
    labels: tuple[Label, ...] | None
    caption: str


@dataclass
class Scan:
    """One tar as read: `rows` are the index columns that do not depend on other tars."""

    path: Path
    size: int
    sha256: str
    rows: dict[str, list] = field(
        default_factory=lambda: {
            name: [] for name in ("key", "offset", "size", "ext", "crc32", "image_id", "labels", "caption")
        }
    )
    without_image: int = 0
    other_images: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mlc index", description="Index WebDataset tars that lie on disk; they are not rewritten.")
    parser.add_argument("urls", nargs="+", metavar="URL", help="tars: paths, globs or train-{000000..000012}.tar")
    parser.add_argument("--out", required=True, help="folder for dataset.json and the index; may hold other splits")
    parser.add_argument("--split", default="train", help="name of the split (train)")
    parser.add_argument("--classes", help="YAML with classes and groups (default: what --out has, else those found)")
    parser.add_argument("-j", "--workers", type=int, default=default_workers(), help="processes (all cores)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    root = Path(args.out).resolve()
    before = _existing(root, args.split)
    scans = _scan_all(expand(args.urls), args.workers)
    classes, groups_of = _classes(args.classes, before, scans)
    columns = before.columns if before else columns_of(None, classes, root)
    refuse_names(classes, columns)
    split = _write(root, args.split, scans, _columns(scans, classes))
    splits = {**(before.splits if before else {}), args.split: split}
    folds = before.folds if before else 0
    write_dataset(Dataset(root, classes, groups_of, folds, splits, columns=columns))
    if columns.separator != " ":
        say(f"class names have blanks in them: submissions separate labels by {columns.separator!r}")
    _summary(args, split, classes, scans)
    return 0


def expand(urls: Sequence[str]) -> list[Path]:
    """Braces and globs to files that exist, in the given order. Raises UserError for what is not there or not local."""
    paths: list[Path] = []
    for url in urls:
        if re.match(r"[a-z][a-z0-9+.-]+:", url):
            raise UserError(f"{url}: only tars on this machine's disks are indexed; copy them here first")
        try:
            patterns = list(braceexpand(url))
        except (UnbalancedBracesError, ValueError) as error:
            raise UserError(f"{url}: {error}") from None
        for pattern in patterns:
            names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
            if not names:
                raise UserError(f"{pattern}: no such file" + (f" (from {url})" if pattern != url else ""))
            paths += [Path(name).resolve() for name in names]
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the tars in it, such as '{path}/*.tar'")
        if paths.count(path) > 1:
            raise UserError(f"{path} is named twice")
    return paths


def _existing(root: Path, split: str) -> Dataset | None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise UserError(f"--split {split!r}: use letters, digits, - and _")
    if not (root / JSON_NAME).exists():
        return None
    dataset = load_dataset(root)
    if split in dataset.splits:
        raise UserError(f"{root} has a split {split!r} already; choose another --split or --out")
    return dataset


def _scan_all(paths: Sequence[Path], workers: int) -> list[Scan]:
    with progress("reading tars", len(paths)) as advance:
        scans = []
        for scan in spread(scan_tar, paths, workers):
            scans.append(scan)
            advance()
    first: dict[str, Path] = {}
    twice = []
    for scan in scans:
        for key in scan.rows["key"]:
            if first.setdefault(key, scan.path) != scan.path:
                twice.append(f"{key!r} is in {first[key]} and in {scan.path}")
    if twice:
        raise UserError(f"{len(twice)} keys are in two tars; a key must name one sample of a split\n{listed(twice)}")
    if not first:
        raise UserError(f"no sample with an image (jpg, jpeg, png, webp) in {', '.join(map(str, paths[:3]))}")
    return scans


def scan_tar(path: Path) -> Scan:
    """Reads one tar. Raises UserError, naming tar and sample, for what WebDataset readers would stumble over."""
    samples = list(groups(path))
    scan = Scan(path, path.stat().st_size, file_sha256(path))
    with open(path, "rb") as file:
        for group in samples:
            try:
                image, sidecar = group.image(), read_sidecar(file, group)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            others = group.other_images()
            scan.other_images += [member.name for member in others]
            if image is None:
                scan.without_image += not others  # else it counts as an image
                continue
            ext, member = image
            values = (
                group.key,
                member.offset,
                member.size,
                ext,
                zlib.crc32(_read(file, member)),
                sidecar.image_id,
                sidecar.labels,
                sidecar.caption,
            )
            for column, value in zip(scan.rows.values(), values, strict=True):
                column.append(value)
    return scan


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def read_sidecar(file: BinaryIO, group: Group) -> Sidecar:
    """Reads KEY.json, KEY.cls and KEY.txt of an open tar. Raises UserError for what cannot be understood."""
    texts = {}
    for ext in ("json", "cls", "txt"):
        if ext in group.members:
            try:
                texts[ext] = _read(file, group.members[ext]).decode("utf-8").lstrip(BOM)
            except UnicodeDecodeError:
                raise UserError(f"{group.members[ext].name} is not UTF-8 text") from None
    try:
        content = json.loads(texts.get("json", "{}"))
    except ValueError as error:
        raise UserError(f"{group.key}.json is not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    image_id, caption = content.get("image_id", group.key), content.get("caption")
    text = texts.get("txt", caption.lstrip(BOM) if isinstance(caption, str) else "")
    return Sidecar(str(image_id), _labels(group.key, content, texts.get("cls")), text)


def _labels(key: str, content: dict, cls: str | None) -> tuple[Label, ...] | None:
    if "labels" not in content:
        return None if cls is None else (int(cls) if cls.strip().isdecimal() else cls.strip(),)
    labels = content["labels"]
    if not isinstance(labels, list) or any(isinstance(x, bool) or not isinstance(x, str | int) for x in labels):
        raise UserError(
            f'{key}.json: "labels" must be a list of class names or of class columns, it is {to_json(labels)[:80]}'
        )
    if len(set(labels)) < len(labels):
        raise UserError(f'{key}.json: a label is twice in "labels": {to_json(labels)[:80]}')
    return tuple(labels)


def _classes(file: str | None, before: Dataset | None, scans: Iterable[Scan]) -> tuple[tuple[str, ...], dict]:
    """(classes, groups): of --classes, else of the data set that the split is added to, else those found."""
    if file:
        classes, groups_of = read_classes(Path(file))
        if before and (classes, groups_of) != (before.classes, before.groups):
            raise UserError(f"{file} has other classes or groups than {before.root}; choose another --out")
        return classes, groups_of
    if before:
        return before.classes, dict(before.groups)
    found = [labels for scan in scans for labels in scan.rows["labels"] if labels]
    kinds = {type(label) for labels in found for label in labels}
    if not kinds:
        raise UserError('no sample has labels (KEY.json with "labels", or KEY.cls); name the classes with --classes')
    if len(kinds) > 1:
        raise UserError("some samples name their classes and some number them; name the classes with --classes")
    if kinds == {int}:
        return tuple(str(column) for column in range(1 + max(max(labels) for labels in found))), {}
    return found_classes(found), {}


def _columns(scans: Sequence[Scan], classes: Sequence[str]) -> list[list[int] | None]:
    """Ascending class columns of every row. Raises UserError listing the rows that do not fit."""
    position = {name: column for column, name in enumerate(classes)}
    columns, wrong = [], []
    labelled = any(labels is not None for scan in scans for labels in scan.rows["labels"])
    for scan in scans:
        for key, labels in zip(scan.rows["key"], scan.rows["labels"], strict=True):
            if labelled and labels is None:
                wrong.append(
                    f"{scan.path.name} {key}: no labels, though other samples have some (an empty list will do)"
                )
            unknown = [label for label in labels or () if column_of(label, position) is None]
            wrong += [
                f"{scan.path.name} {key}: {label!r} is none of the {len(classes)} classes"
                f"{did_you_mean(str(label), classes)}"
                for label in unknown
            ]
            known = set(labels or ()) - set(unknown)
            columns.append(None if labels is None else sorted({column_of(label, position) for label in known}))
    if wrong:
        raise UserError(f"{len(wrong)} labels do not fit; nothing is written\n{listed(wrong)}")
    return columns


def column_of(label: Label, position: dict[str, int]) -> int | None:
    """A label's class column, None where there is no such class; a number is a column, not a name."""
    if isinstance(label, int):
        return label if 0 <= label < len(position) else None
    return position.get(label, position.get(nfc(label)))


def _write(root: Path, name: str, scans: Sequence[Scan], columns: Sequence[list[int] | None]) -> Split:
    joined = {column: [value for scan in scans for value in scan.rows[column]] for column in scans[0].rows}
    rows = len(columns)
    root.mkdir(parents=True, exist_ok=True)
    write_index(
        root / f"{name}.arrow",
        joined
        | {
            "shard": [number for number, scan in enumerate(scans) for _ in scan.rows["key"]],
            "labels": columns,
            "fold": [-1] * rows,
            "weight": [1.0] * rows,
        },
    )
    shards = tuple(
        Shard(
            str(scan.path.relative_to(root) if scan.path.is_relative_to(root) else scan.path),
            len(scan.rows["key"]),
            scan.size,
            scan.sha256,
        )
        for scan in scans
    )
    return Split(name, f"{name}.arrow", rows, shards)


def _summary(args: Namespace, split: Split, classes: Sequence[str], scans: Sequence[Scan]) -> None:
    """Samples and images that are left out are together the images of the tars."""
    without_image = sum(scan.without_image for scan in scans)
    others = [name for scan in scans for name in scan.other_images]
    if args.json:
        print(
            to_json(
                {
                    "out": args.out,
                    "split": split.name,
                    "samples": split.num_samples,
                    "shards": len(split.shards),
                    "classes": len(classes),
                    "without_image": without_image,
                    "images_left_out": len(others),
                }
            )
        )
        return
    skipped = f"; {without_image} samples without an image are left out" if without_image else ""
    say(
        f"{args.out}: {split.name} has {split.num_samples} samples in {len(split.shards)} tars, "
        f"{len(classes)} classes{skipped}"
    )
    if others:
        say(
            f"{plural(len(others), 'more image')} left out, such as {others[0]}: as for stock "
            "webdataset and timm, a sample's image is KEY.jpg, jpeg, png or webp, and KEY ends at "
            "the first dot"
        )
