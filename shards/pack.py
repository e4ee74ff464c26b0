"""`mlc pack`: a CSV and a folder of images become shards with an index, or nothing at all.

The data set is built in OUT.partial and takes its name in one rename, so OUT is either absent, the old pack or the new
one. A run that was killed leaves its finished shards there, and the same command takes them up again.
"""

import argparse
import errno
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from shards import owner
from shards.console import Parser, UserError, finite, progress, say
from shards.dataset import (
    JSON_NAME,
    Dataset,
    Shard,
    Split,
    load_dataset,
    open_index,
    write_dataset,
    write_index,
    write_json,
)
from shards.files import replacing
from shards.image import pack_file
from shards.json_text import to_json
from shards.plan import Checked, Plan, Sample, check_images, make_plan, settle
from shards.stats import label_summary
from shards.table import Columns
from shards.tar import groups, write_tar
from shards.workers import default_workers, spread

SHARD_BYTES = 1_000_000_000
WORKER_BYTES = 100_000_000  # below that a second process costs more to start than it saves
PLAN_NAME = ".plan"
EXTRA_FILES = (JSON_NAME, PLAN_NAME, "_info.json", "sizes.json", "quarantine.csv")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write; `part` is the note, written last, that it is finished."""

    tar: Path
    part: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    resize: int | None
    quality: int


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    args = parse(argv)
    out = Path(args.out).resolve()
    partial = out.with_name(out.name + ".partial")
    plan = make_plan(args)
    _restore(out, partial)
    if _is_packed(out, plan.hash, overwrite=args.overwrite):
        say(f"already packed: {args.out}")
        _remember(out, plan.columns)
        if _noted(partial, plan.hash) is not None:  # killed after the last rename
            shutil.rmtree(partial, ignore_errors=True)
    else:
        _may_replace(out, overwrite=args.overwrite)
        checked = _noted(partial, plan.hash) or check_images(plan, args)
        samples = settle(plan, checked, args)
        with _building(partial, plan.hash, checked):
            build(partial, plan, samples, args)
            _publish(partial, out)
    _summary(load_dataset(out), args, time.perf_counter() - started)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mlc pack", description="A CSV and a folder of images -> WebDataset shards with an index.")
    add = parser.add_argument
    add("--csv", required=True, help="training rows: columns ImageID, Labels and, if wanted, Caption")
    add("--images", required=True, help="folder the ImageIDs are files of")
    add("--out", required=True, help="folder to write; it appears when it is complete")
    add("--test-csv", help="rows without labels")
    add("--val-csv", help="validation rows")
    add("--val-fraction", type=finite, help="share of the training rows to validate on, stratified by label")
    add("--folds", type=_whole(2), default=0, help="also deal the training rows into K stratified folds")
    add(
        "--split-copies",
        action="store_true",
        help="let --val-fraction and --folds deal out near copies of a picture one by one (they stay together)",
    )
    add("--classes", help="YAML with classes and groups (default: classes.yaml beside the CSV, else the labels found)")
    add("--resize", type=_whole(1), help="shrink images to this short side in pixels and store them as JPEG")
    add("--quality", type=_whole(1, 100), default=92, help="JPEG quality of shrunk images")
    add(
        "--shard-size",
        type=_whole(1),
        default=10_000,
        help="samples per shard (10000); a shard also ends at 1 GB of images unless they are shrunk",
    )
    add("--skip-bad", type=_whole(0), default=0, help="leave out up to N bad rows instead of stopping")
    add("--id-column", default="ImageID", help="name of the column (ImageID)")
    add("--labels-column", default="Labels", help="name of the column (Labels)")
    add("--caption-column", default="Caption", help="name of the column (Caption)")
    add("--weight-column", default="Weight", help="numbers for `--sampler weights:weight` of train.py (Weight)")
    add("--label-separator", help="what stands between labels (any white space); lists ['a', 'b'] need none")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the split and the folds")
    add("-j", "--workers", type=_whole(1), default=default_workers(), help="processes (all cores)")
    add("--overwrite", action="store_true", help="replace another pack at OUT, once the new one is complete")
    add("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    if args.val_csv and args.val_fraction is not None:
        parser.error("--val-csv and --val-fraction exclude each other; choose one")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error("--val-fraction must lie between 0 and 1, such as 0.1")
    if args.label_separator == "":
        parser.error("--label-separator must not be empty")
    return args


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parsed(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() else least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}")
        return value

    return parsed


def _is_packed(out: Path, plan: str, *, overwrite: bool) -> bool:
    """True where OUT is the finished pack of this very plan. Raises UserError where it was, and shards are gone."""
    if not (out / PLAN_NAME).is_file() or (out / PLAN_NAME).read_text() != plan:
        return False
    for split in load_dataset(out).splits.values():
        for shard in split.shards:
            path = out / shard.name
            if not path.is_file() or path.stat().st_size != shard.size:
                if overwrite:
                    return False
                raise UserError(
                    f"{path} is missing or has another size than when it was packed; pack again with --overwrite"
                )
    return True


def _remember(out: Path, columns: Columns) -> None:
    """A pack from before `dataset.json` knew them gets its columns."""
    dataset = load_dataset(out)
    if dataset.columns != columns:
        write_dataset(replace(dataset, columns=columns))


def _may_replace(out: Path, *, overwrite: bool) -> None:
    if out.is_mount():
        raise UserError(f"{out} is a mount point, which no rename can replace; name a folder in it: {out}/shards")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / JSON_NAME).is_file():
        raise UserError(f"{out} exists and is not a packed data set; choose another --out")
    if not overwrite:
        raise UserError(
            f"{out} holds another pack (other rows, images or flags); choose another --out, or replace it "
            "with --overwrite"
        )
    old = load_dataset(out)
    own = {
        *EXTRA_FILES,
        *(split.index for split in old.splits.values()),
        *(shard.name for split in old.splits.values() for shard in split.shards),
    }
    foreign = sorted(path.name for path in out.iterdir() if path.name not in own)
    if foreign:
        raise UserError(
            f"{out} also holds what mlc pack did not write ({', '.join(foreign[:5])}); move that away "
            "before --overwrite"
        )


def _noted(partial: Path, plan: str) -> Checked | None:
    """What a killed run of the same plan found in the images, None where there was no such run."""
    try:
        note = json.loads((partial / "plan.json").read_text(encoding="utf-8"))
        return Checked(note["bad_images"], note["copies"]) if note["plan"] == plan else None
    except (OSError, ValueError, KeyError):
        return None


def _restore(out: Path, partial: Path) -> None:
    """A run killed between the two renames of a replacement leaves the old pack in OUT.partial: put it back."""
    if not out.exists() and (partial / "replaced").is_dir():
        (partial / "replaced").rename(out)


@contextmanager
def _building(partial: Path, plan: str, checked: Checked) -> Iterator[None]:
    """OUT.partial, locked, with what a killed run of the same plan has left there; of another plan nothing is kept."""
    if partial.exists() and any(partial.iterdir()) and not (partial / "lock").exists():
        raise UserError(f"{partial} is in the way and not from mlc pack; move it away")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "lock").touch()
        lock = owner.take(partial / "lock")
    except owner.Held as held:
        raise UserError(f"another mlc pack is writing {partial}: {held}; wait for it or stop it; {held.fix}") from None
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}") from None
    with closing(lock), _clear_disk_errors(partial):
        if _noted(partial, plan) is None:
            for name in ("pack", "parts"):
                shutil.rmtree(partial / name, ignore_errors=True)
            write_json(partial / "plan.json", {"plan": plan, "bad_images": checked.wrong, "copies": checked.copies})
        for name in ("pack", "parts"):
            (partial / name).mkdir(exist_ok=True)
        yield


@contextmanager
def _clear_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {path} is full; make room and run the same command again: finished shards are kept"
        ) from None


def build(partial: Path, plan: Plan, samples: dict[str, list[Sample]], args: argparse.Namespace) -> None:
    """Writes the whole data set into `partial/pack`; shards with a note in `partial/parts` are there already."""
    tasks = {
        split: [
            ShardTask(
                partial / "pack" / f"{split}-{number:06d}.tar",
                partial / "parts" / f"{split}-{number:06d}.json",
                tuple(chunk),
                plan.classes,
                args.resize,
                args.quality,
            )
            for number, chunk in enumerate(_chunks(rows, args.shard_size, not args.resize))
        ]
        for split, rows in samples.items()
    }
    flat = [task for of_split in tasks.values() for task in of_split]
    todo = [task for task in flat if not task.part.exists()]
    if len(todo) < len(flat):
        say(f"{len(flat) - len(todo)} of {len(flat)} shards are there from an earlier run")
    source_bytes = sum(sample.file.size for task in todo for sample in task.samples)
    with progress("writing shards", len(todo)) as advance:
        for _ in spread(write_shard, todo, min(args.workers, 1 + source_bytes // WORKER_BYTES)):
            advance()
    splits = {split: _write_split(partial / "pack", split, of_split) for split, of_split in tasks.items()}
    dataset = Dataset(partial / "pack", plan.classes, plan.groups, args.folds, splits, columns=plan.columns)
    write_companions(dataset)
    (dataset.root / PLAN_NAME).write_text(plan.hash)
    write_dataset(dataset)
    known = {*EXTRA_FILES, *(split.index for split in splits.values()), *(task.tar.name for task in flat)}
    for path in dataset.root.iterdir():
        if path.name not in known:
            path.unlink()  # half a file of a run that was killed


def _chunks(samples: Sequence[Sample], limit: int, by_bytes: bool) -> Iterator[list[Sample]]:
    chunk, size = [], 0
    for sample in samples:
        if len(chunk) == limit or (by_bytes and chunk and size + sample.file.size > SHARD_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(sample)
        size += sample.file.size
    yield chunk


def write_shard(task: ShardTask) -> None:
    """Writes one tar and then the note about it; a shard without its note is written again."""
    crcs, exts = [], []

    def members() -> Iterator[dict[str, bytes | str]]:
        for sample in task.samples:
            data, ext = pack_file(sample.file.path, resize=task.resize, quality=task.quality)
            crcs.append(zlib.crc32(data))
            exts.append(ext)
            yield {"__key__": sample.key, ext: data, "json": _sidecar(sample, task.classes), "txt": sample.row.caption}

    with _clear_disk_errors(task.tar), replacing(task.tar) as temporary:
        with open(temporary, "wb") as file:
            size, sha256 = write_tar(file, members())
        images = [(group.key, group.image()[1]) for group in groups(temporary)]
        assert [key for key, _ in images] == [sample.key for sample in task.samples]
    with _clear_disk_errors(task.part):
        write_json(
            task.part,
            {
                "size": size,
                "sha256": sha256,
                "crc32": crcs,
                "ext": exts,
                "offset": [image.offset for _, image in images],
                "bytes": [image.size for _, image in images],
            },
        )


def _sidecar(sample: Sample, classes: Sequence[str]) -> str:
    content: dict = {"image_id": sample.row.image_id}
    if sample.columns is not None:
        # `label` is for readers of one class per image: timm takes it through _info.json and passes over -1
        content |= {
            "labels": [classes[column] for column in sample.columns],
            "columns": list(sample.columns),
            "label": sample.columns[0] if sample.columns else -1,
        }
    return to_json(content, ensure_ascii=False)


def _write_split(folder: Path, split: str, tasks: Sequence[ShardTask]) -> Split:
    samples = [sample for task in tasks for sample in task.samples]
    parts = [json.loads(task.part.read_text(encoding="utf-8")) for task in tasks]
    joined = {name: [value for part in parts for value in part[name]] for name in ("offset", "bytes", "ext", "crc32")}
    write_index(
        folder / f"{split}.arrow",
        {
            "key": [sample.key for sample in samples],
            "image_id": [sample.row.image_id for sample in samples],
            "shard": [number for number, task in enumerate(tasks) for _ in task.samples],
            "offset": joined["offset"],
            "size": joined["bytes"],
            "ext": joined["ext"],
            "crc32": joined["crc32"],
            "labels": [sample.columns for sample in samples],
            "caption": [sample.row.caption for sample in samples],
            "fold": [sample.fold for sample in samples],
            "weight": [sample.row.weight for sample in samples],
        },
    )
    shards = tuple(
        Shard(task.tar.name, len(task.samples), part["size"], part["sha256"])
        for task, part in zip(tasks, parts, strict=True)
    )
    return Split(split, f"{split}.arrow", len(samples), shards)


def write_companions(dataset: Dataset) -> None:
    """`_info.json` is what timm's reader looks for, `sizes.json` what open_clip looks for."""
    info = {
        split.name: {
            "name": split.name,
            "num_samples": split.num_samples,
            "alt_label": "label",
            "filenames": [shard.name for shard in split.shards],
            "shard_lengths": [shard.num_samples for shard in split.shards],
        }
        for split in dataset.splits.values()
    }
    write_json(dataset.root / "_info.json", {"splits": info})
    write_json(
        dataset.root / "sizes.json",
        {shard.name: shard.num_samples for split in dataset.splits.values() for shard in split.shards},
    )


def _publish(partial: Path, out: Path) -> None:
    if out.exists():
        out.rename(partial / "replaced")
    (partial / "pack").rename(out)
    shutil.rmtree(partial, ignore_errors=True)  # what a network file system keeps for a moment is dropped next time


def _summary(dataset: Dataset, args: argparse.Namespace, seconds: float) -> None:
    splits = {}
    for name, split in dataset.splits.items():
        index = open_index(dataset, name)
        splits[name] = {
            "samples": len(index),
            "shards": len(split.shards),
            "bytes": sum(shard.size for shard in split.shards),
        }
        if index.has_labels:
            splits[name] |= label_summary(index)
    if args.json:
        print(
            to_json(
                {
                    "out": args.out,
                    "fingerprint": dataset.fingerprint,
                    "classes": len(dataset.classes),
                    "groups": {name: len(members) for name, members in dataset.groups.items()},
                    "folds": dataset.folds,
                    "splits": splits,
                    "seconds": round(seconds, 2),
                }
            )
        )
        return
    folds = f", {dataset.folds} folds" if dataset.folds else ""
    say(f"{args.out}: {len(dataset.classes)} classes{folds}, {seconds:.1f} s")
    for name, split in splits.items():
        shards = f"{split['shards']} shard{'s' if split['shards'] > 1 else ''}"
        labels = (
            f", {split['labels_per_image']:.2f} labels per image, {split['without_labels']} without any"
            if "labels_per_image" in split
            else ", not labelled"
        )
        say(f"  {name:<5} {split['samples']} samples in {shards}, {split['bytes'] / 1e6:.1f} MB{labels}")
