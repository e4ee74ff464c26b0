"""`mlc verify`: is every byte that training will read the byte that was packed?

A shard that a copy cut short, or a disk changed, otherwise shows as one odd loss somewhere in the third epoch. The tars
are compared with their sha256, the index with the tars' own headers, and every image, read as training reads it, with
its crc32.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.console import Parser, UserError, listed, progress, say
from shards.dataset import Dataset, Index, Shard, load_dataset, open_index
from shards.image import BadImage, check_image
from shards.index import column_of, read_sidecar
from shards.tar import Group, file_sha256, groups
from shards.workers import default_workers, spread

Report = Callable[[str, str], None]  # (key, what is wrong)


@dataclass(frozen=True)
class ShardCheck:
    """One shard to look at; `index` maps itself again in the worker."""

    index: Index
    classes: tuple[str, ...]
    split: str
    number: int
    shard: Shard
    decode: bool


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mlc verify",
        description="Check every shard and sample against the checksums of the pack. "
        "Exit code 1 where something is wrong.",
    )
    parser.add_argument("data", help="folder of a packed or indexed data set")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument("-j", "--workers", type=int, default=default_workers(), help="processes (all cores)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    dataset = load_dataset(Path(args.data))
    problems, samples = verify(dataset, decode=args.decode, workers=args.workers)
    shards = sum(len(split.shards) for split in dataset.splits.values())
    if args.json:
        print(
            json.dumps(
                {"data": args.data, "shards": shards, "samples": samples, "problems": problems}, ensure_ascii=False
            )
        )
    elif problems:
        texts = [": ".join(filter(None, (found["shard"], found["key"], found["problem"]))) for found in problems]
        say(f"{args.data}: {len(problems)} problem{'s' * (len(texts) > 1)}\n{listed(texts, limit=len(texts))}")
    else:
        decoded = ", every image decodes" if args.decode else ""
        say(f"{args.data}: {samples} samples in {shards} shards are as they were packed{decoded}")
    return 1 if problems else 0


def verify(dataset: Dataset, *, decode: bool, workers: int) -> tuple[list[dict[str, str]], int]:
    """(problems, samples looked at); a problem is {"split", "shard", "key", "problem"}, key "" for a whole shard."""
    problems, checks, samples = [], [], 0
    for name, split in dataset.splits.items():
        try:
            index = open_index(dataset, name)
        except UserError as error:
            problems.append({"split": name, "shard": split.index, "key": "", "problem": str(error)})
            continue
        samples += len(index)
        problems += _shard_counts(name, index, split.shards)
        checks += [
            ShardCheck(index, dataset.classes, name, number, shard, decode) for number, shard in enumerate(split.shards)
        ]
    with progress("verifying shards", len(checks)) as advance:
        for found in spread(check_shard, checks, workers):
            problems += found
            advance()
    return problems, samples


def _shard_counts(name: str, index: Index, shards: tuple[Shard, ...]) -> list[dict[str, str]]:
    counts = np.bincount(index.shard, minlength=len(shards))
    texts = [
        (shard.name, f"the index has {count} samples of it, dataset.json says {shard.num_samples}")
        for shard, count in zip(shards, counts, strict=False)
        if count != shard.num_samples
    ]
    if len(counts) > len(shards):
        texts.append((shards[-1].name if shards else "", "the index names shards that dataset.json does not have"))
    return [{"split": name, "shard": shard, "key": "", "problem": text} for shard, text in texts]


def check_shard(task: ShardCheck) -> list[dict[str, str]]:
    """Everything wrong with one shard, its samples in the order of the index."""
    problems: list[dict[str, str]] = []

    def report(key: str, text: str) -> None:
        problems.append({"split": task.split, "shard": task.shard.name, "key": key, "problem": text})

    path = task.index.shard_path(task.number)
    if not path.is_file():
        report("", "the file is missing")
        return problems
    size = path.stat().st_size
    if size != task.shard.size:
        report("", f"{size} bytes, packed with {task.shard.size}")
    elif file_sha256(path) != task.shard.sha256:
        report("", "sha256 differs from the pack's")
    rows = np.flatnonzero(task.index.shard == task.number)
    with open(path, "rb") as file:
        _check_members(task, path, file, rows, report)
        for row in rows:
            _check_image(task, row, file, size, report)
    return problems


def _check_members(task: ShardCheck, path: Path, file: BinaryIO, rows: np.ndarray, report: Report) -> None:
    """The tar's own headers and texts against the index: the same samples at the same places, and none besides."""
    try:
        samples = {group.key: group for group in groups(path) if group.image()}
    except UserError as error:
        report("", str(error))
        return
    position = {name: column for column, name in enumerate(task.classes)}
    for row in rows:
        key = task.index.key(row)
        group = samples.pop(key, None)
        if group is None:
            report(key, "in the index, but the tar has no image of that key")
            continue
        ext, member = group.image()
        indexed = (task.index.ext(row), int(task.index.offset[row]), int(task.index.size[row]))
        if indexed != (ext, member.offset, member.size):
            report(key, f"the index says {indexed}, the tar {(ext, member.offset, member.size)} (ext, offset, size)")
        _check_texts(task, row, file, group, position, report)
    for key in samples:
        report(key, "in the tar, but not in the index")


def _check_texts(
    task: ShardCheck, row: int, file: BinaryIO, group: Group, position: dict[str, int], report: Report
) -> None:
    index = task.index
    try:
        sidecar = read_sidecar(file, group)
    except UserError as error:
        report(group.key, str(error))
        return
    columns = {column_of(label, position) for label in sidecar.labels or ()}
    if (sidecar.image_id, sidecar.caption) != (index.image_id(row), index.caption(row)):
        report(group.key, "the index has another image_id or caption than the tar")
    if columns != set(index.labels(row).tolist()):
        report(group.key, "the index has other labels than the tar")


def _check_image(task: ShardCheck, row: int, file: BinaryIO, shard_size: int, report: Report) -> None:
    key, offset, size = task.index.key(row), int(task.index.offset[row]), int(task.index.size[row])
    if offset < 0 or size < 0 or offset + size > shard_size:
        report(key, "the image runs over the end of the shard")
        return
    file.seek(offset)
    data = file.read(size)
    if zlib.crc32(data) != task.index.crc32[row]:
        report(key, "the image's crc32 differs from the pack's")
    elif task.decode:
        try:
            check_image(data)
        except BadImage as problem:
            report(key, f"the image {problem}")
