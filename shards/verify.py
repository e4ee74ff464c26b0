"""`mlc verify`: is every byte that training will read the byte that was packed?

A shard that a copy cut short, or a disk changed, otherwise shows as one odd loss somewhere in the third epoch. The tars
are compared with their sha256, the index with the tars' own headers, and every image, read as training reads it, with
its crc32.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.console import Parser, UserError, listed, plural, progress, say
from shards.dataset import Dataset, Index, Shard, load_dataset, open_index
from shards.index import read_sidecar
from shards.json_text import to_json
from shards.repair import QUARANTINE, image_problem, keys_twice, labels_differ, read_quarantine, repair, survey
from shards.tar import Group, file_sha256
from shards.urls import is_url, redact
from shards.workers import default_workers, spread

Report = Callable[[str, str], None]  # (key, what is wrong)


@dataclass(frozen=True)
class ShardCheck:
    """One shard to look at; `index` maps itself again in the worker, `quarantined` are keys ("": the tar's end)."""

    index: Index
    classes: tuple[str, ...]
    split: str
    number: int
    shard: Shard
    quarantined: frozenset[str]
    decode: bool


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mlc verify",
        description="Check every shard and sample against the checksums of the pack. "
        "Exit code 1 where something is wrong.",
    )
    parser.add_argument("data", help="folder of a packed or indexed data set")
    parser.add_argument("--decode", action="store_true", help="also decode every image, and not only its header")
    parser.add_argument(
        "--repair",
        action="store_true",
        help=f"make the index fit what is there: samples that are damaged or lost go into {QUARANTINE}; the tars stay "
        "as they are. Exit code 0 where that was done",
    )
    parser.add_argument("-j", "--workers", type=int, default=default_workers(), help="processes (all cores)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if is_url(args.data):
        raise UserError(f"{redact(args.data)}: verify reads every byte of the tars; run it where they lie")
    dataset = load_dataset(args.data)
    problems, samples = verify(dataset, decode=args.decode, workers=args.workers)
    lost = repair(dataset, problems, decode=args.decode) if args.repair and problems else []
    found = {
        "data": args.data,
        "shards": sum(len(split.shards) for split in dataset.splits.values()),
        "samples": samples,
        "problems": problems,
    }
    if args.repair:
        found["quarantined"] = [entry._asdict() for entry in lost if entry.key]
    if args.json:
        print(to_json(found, ensure_ascii=False))
    else:
        known = sum(bool(entry.key) for entry in read_quarantine(dataset.root))
        _say(found, known, decoded=args.decode)
    return 1 if problems and not args.repair else 0


def _say(found: dict, known: int, *, decoded: bool) -> None:
    problems, data = found["problems"], found["data"]
    if not problems:
        what = ", every image decodes" if decoded else ""
        more = f"; {known} are in {QUARANTINE}" if known else ""
        say(f"{data}: {found['samples']} samples in {found['shards']} shards are as they were packed{what}{more}")
        return
    texts = [": ".join(filter(None, (problem["shard"], problem["key"], problem["problem"]))) for problem in problems]
    say(f"{data}: {plural(len(problems), 'problem')}\n{listed(texts, limit=len(texts))}")
    if "quarantined" in found:
        lost = len(found["quarantined"])
        if any(problem["shard"].endswith(".arrow") for problem in problems):
            say("folds and sampling weights were in that index only: its samples have fold -1 and weight 1 now")
        say(f"repaired: the index fits the tars again; {plural(lost, 'sample')} left it for {QUARANTINE}")


def verify(dataset: Dataset, *, decode: bool, workers: int) -> tuple[list[dict[str, str]], int]:
    """(problems, samples looked at); a problem is {"split", "shard", "key", "problem"}, key "" for a whole shard.

    What `quarantine.csv` lists is known and no problem, as long as it is not in the index.
    """
    quarantined = defaultdict(set)
    for entry in read_quarantine(dataset.root):
        quarantined[entry.split, entry.shard].add(entry.key)
    problems, checks, samples = [], [], 0
    for name, split in dataset.splits.items():
        try:
            index = open_index(dataset, name)
        except UserError as error:
            problems.append({"split": name, "shard": split.index, "key": "", "problem": str(error)})
            continue
        samples += len(index)
        problems += _shard_counts(name, index, split.shards) + _keys_twice(name, index, split.shards)
        checks += [
            ShardCheck(index, dataset.classes, name, number, shard, frozenset(quarantined[name, shard.name]), decode)
            for number, shard in enumerate(split.shards)
        ]
    with progress("verifying shards", len(checks)) as advance:
        for found in spread(check_shard, checks, workers):
            problems += found
            advance()
    return problems, samples


def _shard_counts(name: str, index: Index, shards: tuple[Shard, ...]) -> list[dict[str, str]]:
    inside = (index.shard >= 0) & (index.shard < len(shards))
    counts = np.bincount(index.shard[inside], minlength=len(shards))
    texts = [
        (shard.name, f"the index has {count} samples of it, dataset.json says {shard.num_samples}")
        for shard, count in zip(shards, counts, strict=True)
        if count != shard.num_samples
    ]
    if not inside.all():
        texts.append((shards[-1].name if shards else "", "the index names shards that dataset.json does not have"))
    return [{"split": name, "shard": shard, "key": "", "problem": text} for shard, text in texts]


def _keys_twice(name: str, index: Index, shards: tuple[Shard, ...]) -> list[dict[str, str]]:
    names = [shard.name for shard in shards]
    return [
        {
            "split": name,
            "shard": names[number] if 0 <= (number := int(index.shard[row])) < len(names) else "",
            "key": index.key(row),
            "problem": "an earlier row of the index has the key as well",
        }
        for row in keys_twice(index.batch.column("key"))
    ]


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
    changed = bool(problems)
    rows = np.flatnonzero(task.index.shard == task.number)
    with open(path, "rb") as file:
        _check_members(task, path, file, rows, report, changed=changed)
        for row in rows:
            _check_image(task, row, file, size, report)
    return problems


def _check_members(
    task: ShardCheck, path: Path, file: BinaryIO, rows: np.ndarray, report: Report, *, changed: bool
) -> None:
    """The tar's own headers and texts against the index: the same samples at the same places, and none besides."""
    found = survey(path)
    if found.end and (changed or "" not in task.quarantined):
        report("", found.end)
    position = {name: column for column, name in enumerate(task.classes)}
    indexed = set()
    for row in rows:
        key = task.index.key(row)
        indexed.add(key)
        if key in found.bad:
            report(key, found.bad[key])
        elif key not in found.groups:
            report(key, "in the index, but the tar has no image of that key")
        else:
            _check_row(task, row, file, found.groups[key], position, report)
    for key in [*found.groups, *found.bad]:
        if key not in indexed and key not in task.quarantined:
            report(key, found.bad.get(key, "in the tar, but not in the index"))


def _check_row(
    task: ShardCheck, row: int, file: BinaryIO, group: Group, position: dict[str, int], report: Report
) -> None:
    ext, member = group.image()
    indexed = (task.index.ext(row), int(task.index.offset[row]), int(task.index.size[row]))
    if indexed != (ext, member.offset, member.size):
        report(group.key, f"the index says {indexed}, the tar {(ext, member.offset, member.size)} (ext, offset, size)")
    try:
        text = labels_differ(task.index, row, read_sidecar(file, group), position)
    except UserError as error:
        text = str(error)
    if text:
        report(group.key, text)


def _check_image(task: ShardCheck, row: int, file: BinaryIO, shard_size: int, report: Report) -> None:
    key, offset, size = task.index.key(row), int(task.index.offset[row]), int(task.index.size[row])
    if offset < 0 or size < 0 or offset + size > shard_size:
        report(key, "the image runs over the end of the shard")
        return
    file.seek(offset)
    data = file.read(size)
    if zlib.crc32(data) != task.index.crc32[row]:
        report(key, "the image's crc32 differs from the pack's")
    elif text := image_problem(data, decode=task.decode):
        report(key, text)
