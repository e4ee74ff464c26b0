"""`mlc stats`: what is in a data set, before a week of training on it: classes, groups, labels per image, captions.

With `--html` also what only eyes can judge: samples of every class, copies, and test pictures that are in train.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shards.captions import SWITCHES, switches
from shards.console import Parser
from shards.dataset import Dataset, Index, load_dataset, open_index
from shards.json_text import to_json
from shards.stats_captions import show as show_captions
from shards.stats_labels import show as show_labels
from shards.workers import default_workers


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mlc stats", description="Count classes, labels per image and caption lengths.")
    parser.add_argument("data", help="folder or URL of a packed or indexed data set")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html",
        metavar="OUT.html",
        type=Path,
        help="write one page that opens anywhere: charts, samples, near copies, leaks between splits",
    )
    parser.add_argument("--labels", action="store_true", help="instead: which labels go together, which never occur")
    parser.add_argument("--captions", action="store_true", help="instead: captions before and after --clean")
    parser.add_argument(
        "--clean",
        action="append",
        default=[],
        metavar="a,b,c",
        help=f"with --captions: what to clean, of {', '.join(SWITCHES)}",
    )
    parser.add_argument(
        "--most-images",
        type=_at_least_one,
        default=200_000,
        metavar="N",
        help="open at most this many images for the page, evenly spread (200000)",
    )
    parser.add_argument("-j", "--workers", type=_at_least_one, default=default_workers(), help="processes (all cores)")
    args = parser.parse_args(argv)
    dataset = load_dataset(args.data)
    names = [dataset.split(args.split).name] if args.split else list(dataset.splits)
    if args.clean and not args.captions:
        parser.error("--clean goes with --captions")
    if args.labels and (args.captions or args.html):
        parser.error("--labels prints tables; leave --captions and --html out")
    if args.labels:
        show_labels(args.data, dataset, names, as_json=args.json)
        return 0
    if args.captions and args.html:
        parser.error("--captions prints tables; the page of --html has captions of its own")
    if args.captions:
        show_captions(args.data, dataset, names, switches(args.clean), as_json=args.json)
        return 0
    if args.html:
        from shards import stats_html  # here, because drawing takes a second to load

        stats_html.check_target(args.html)
    found = {name: split_stats(dataset, name) for name in names}
    if args.html:
        stats_html.write_page(dataset, found, args.html, most=args.most_images, workers=args.workers)
    if args.json:
        print(
            to_json(
                {"data": args.data, "fingerprint": dataset.fingerprint, "folds": dataset.folds, "splits": found},
                ensure_ascii=False,
            )
        )
    elif not args.html:
        _show(args.data, dataset, found)
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def split_stats(dataset: Dataset, name: str) -> dict:
    """Counts of one split, ready for JSON; without `classes`, `groups` and labels where the split is not labelled."""
    split, index = dataset.split(name), open_index(dataset, name)
    found = {
        "samples": len(index),
        "shards": len(split.shards),
        "bytes": sum(shard.size for shard in split.shards),
        "captions": _captions(index),
    }
    if dataset.folds and len(index) and index.fold.max() >= 0:
        found["folds"] = np.bincount(index.fold[index.fold >= 0], minlength=dataset.folds).tolist()
    if index.has_labels:
        counts = dict(zip(dataset.classes, index.class_counts().tolist(), strict=True))
        found |= label_summary(index)
        found |= {
            "classes": counts,
            "groups": {group: sum(counts[name] for name in members) for group, members in dataset.groups.items()},
        }
    return found


def label_summary(index: Index) -> dict:
    """`labels_per_image` (mean), `without_labels` (samples) and `label_counts`: samples by their number of labels."""
    counts = np.bincount(index.labels_per_row()) if len(index) else np.zeros(1, dtype=np.int64)
    labels = float(counts @ np.arange(len(counts)))
    return {
        "labels_per_image": round(labels / max(1, len(index)), 4),
        "without_labels": int(counts[0]),
        "label_counts": counts.tolist(),
    }


def _captions(index: Index) -> dict:
    """Samples with a caption; characters of those captions."""
    lengths = pc.utf8_length(index.batch.column("caption")).to_numpy()
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return {"with_caption": 0}
    return {
        "with_caption": len(lengths),
        "characters_mean": round(float(lengths.mean()), 2),
        "characters_median": float(np.median(lengths)),
        "characters_max": int(lengths.max()),
    }


def _show(data: str, dataset: Dataset, found: dict[str, dict]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{escape(data)}: {len(dataset.classes)} classes, {len(dataset.groups)} groups, "
        f"fingerprint {dataset.fingerprint}",
        highlight=False,
    )
    splits = Table("", *found, title="splits", title_justify="left")
    for label, cells in overview(found):
        splits.add_row(label, *cells)
    console.print(splits)
    labelled = {name: split for name, split in found.items() if "classes" in split}
    if labelled:
        console.print(_class_table(dataset, labelled))


def overview(found: dict[str, dict]) -> list[tuple[str, list[str]]]:
    """(what, a cell per split): the table of splits, for a terminal and for the page."""
    splits = list(found.values())
    captions = [split["captions"] for split in splits]
    return [
        ("samples", [str(split["samples"]) for split in splits]),
        ("shards", [str(split["shards"]) for split in splits]),
        ("MB", [f"{split['bytes'] / 1e6:.1f}" for split in splits]),
        ("samples per fold", [" ".join(map(str, split.get("folds", "-"))) for split in splits]),
        ("labels per image", [f"{split['labels_per_image']:.2f}" if "classes" in split else "-" for split in splits]),
        ("images with 0, 1, 2, ... labels", [" ".join(map(str, split.get("label_counts", "-"))) for split in splits]),
        ("captions", [str(caption["with_caption"]) for caption in captions]),
        (
            "characters, median / most",
            [
                f"{caption['characters_median']:.0f} / {caption['characters_max']}" if caption["with_caption"] else "-"
                for caption in captions
            ],
        ),
    ]


def _class_table(dataset: Dataset, labelled: dict[str, dict]) -> Table:
    group_of = {name: group for group, members in dataset.groups.items() for name in members}
    table = Table("class", "group", *labelled, title="samples per class", title_justify="left")
    first = next(iter(labelled.values()))
    for name in sorted(dataset.classes, key=lambda name: -first["classes"][name]):
        cells = [
            f"{split['classes'][name]} ({split['classes'][name] / max(1, split['samples']):.1%})"
            for split in labelled.values()
        ]
        table.add_row(Text(name), Text(group_of.get(name, "")), *cells)
    for group in dataset.groups:
        cells = [str(split["groups"][group]) for split in labelled.values()]
        table.add_row(Text(f"all of {group}"), Text(group), *cells)
    return table
