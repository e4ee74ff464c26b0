"""`mlc demo-data OUT`: a competition in a minute, because nobody should need a download to see the whole road work.

Real handwriting (scikit-learn's 1,797 scans of digits) in eight inks lies at random places, scales and angles over
real photographs (scikit-learn's two sample images). What a competition has is here too: long-tailed labels, captions
that tell a part and sometimes lie, a few wrong labels in train, hidden test labels (`test_labels.csv` is the
organiser's copy). Train, val and test share neither a scan nor a piece of photograph; `val.csv` exists for that
reason: rows split off `train.csv` show scans that the rest of `train.csv` shows too.

Every image draws from a generator of its own, keyed by (seed, split, number): the number of workers changes nothing.
Written: train.csv, val.csv, test.csv, test_labels.csv, wrong_labels.csv, classes.yaml, images/, and demo.json last.
"""

import argparse
import csv
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from shards.console import Parser, UserError, progress, say
from shards.demo_scenes import SHAPES, SPLITS, Shape, draw_scene, render, scene_labels, spoil, write_caption
from shards.json_text import to_json
from shards.workers import default_workers, spread

GENERATION = 1  # raise it when the pictures change, so that an old folder is not taken for a new one
WRONG_LABELS = 0.04


class Row(NamedTuple):
    """What the CSV files say about one image."""

    name: str
    labels: str
    true_labels: str
    caption: str


# ---- the data set ----


def make_image(job: tuple[str, int, int], *, shape: str, size: tuple[int, int], seed: int, images: Path) -> Row:
    """Writes one JPEG. `job` is (split, number within the split, number within the data set)."""
    split, i, number = job
    rng = np.random.default_rng([seed, SPLITS.index(split), i])
    scene = draw_scene(SHAPES[shape], size, split, rng)
    labels = true = scene_labels(SHAPES[shape], scene)
    if split == "train" and rng.random() < WRONG_LABELS:
        labels = spoil(SHAPES[shape], true, rng)
    caption = write_caption(scene, rng)
    name = f"{number}.jpg"
    render(scene, rng).save(images / name, quality=90)
    return Row(name, " ".join(labels), " ".join(true), caption)


def split_sizes(samples: int) -> dict[str, int]:
    """`samples` is train and test together, a sixth of it test; val is a tenth on top."""
    return {"train": samples - samples // 6, "val": max(1, samples // 10), "test": samples // 6}


def _write_csv(path: Path, header: str, rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_tables(out: Path, shape: Shape, rows: dict[str, list[Row]]) -> None:
    """All the CSV files and classes.yaml."""
    train, val, test = (rows[split] for split in SPLITS)
    wrong = [row for row in train if row.labels != row.true_labels]
    _write_csv(out / "train.csv", "ImageID,Labels,Caption", ((row.name, row.labels, row.caption) for row in train))
    _write_csv(out / "val.csv", "ImageID,Labels,Caption", ((row.name, row.labels, row.caption) for row in val))
    _write_csv(out / "test.csv", "ImageID,Caption", ((row.name, row.caption) for row in test))
    _write_csv(out / "test_labels.csv", "ImageID,Labels", ((row.name, row.labels) for row in test))
    _write_csv(
        out / "wrong_labels.csv",
        "ImageID,Labels,TrueLabels",
        ((row.name, row.labels, row.true_labels) for row in wrong),
    )
    content = {"classes": shape.classes}
    if shape.groups:
        content["groups"] = {group: list(names) for group, names in shape.groups.items()}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)
    (out / "classes.yaml").write_text(text, encoding="utf-8", newline="\n")


def generate(out: Path, *, samples: int, seed: int, size: tuple[int, int], shape: str, workers: int) -> list[Row]:
    """Writes the whole data set into `out`; returns the rows of train."""
    images = out / "images"
    images.mkdir()
    splits = [(split, i) for split, n in split_sizes(samples).items() for i in range(n)]
    jobs = [(split, i, number) for number, (split, i) in enumerate(splits)]
    make = partial(make_image, shape=shape, size=size, seed=seed, images=images)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    with progress("images", len(jobs)) as advance:
        for (split, _, _), row in zip(jobs, spread(make, jobs, workers), strict=True):
            rows[split].append(row)
            advance()
    write_tables(out, SHAPES[shape], rows)
    return rows["train"]


def claim(out: Path, made_with: str) -> bool:
    """True when `out` already holds this very data set; otherwise clears an unfinished one and marks `out` as ours."""
    done, begun = out / "demo.json", out / "demo.unfinished.json"
    if done.exists():
        if done.read_text(encoding="utf-8") != made_with:
            raise UserError(
                f"{out} holds demo data made with other arguments (see {done.name} there); "
                "name another folder or delete this one"
            )
        return True
    if begun.exists():
        shutil.rmtree(out / "images", ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something that is not demo data; name an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    begun.write_text(made_with, encoding="utf-8", newline="\n")
    return False


def report(out: Path, shape: Shape, train: list[Row], total: int) -> None:
    seen = Counter(dict.fromkeys(shape.classes, 0))
    seen.update(label for row in train for label in row.labels.split())
    (most, often), (least, seldom) = seen.most_common()[0], seen.most_common()[-1]
    say(
        f"{total} images, {len(seen)} classes; in train {sum(seen.values()) / len(train):.2f} labels per image, "
        f"most frequent {most} ({often / len(train):.1%}), least frequent {least} ({seldom / len(train):.1%})"
    )
    say(f"demo data: {out}")


# ---- the verb ----


def _image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 96 or 96x72 (width x height, pixels)")
    width, height = int(sides[0]), int(sides[-1])
    if not 32 <= min(width, height) <= max(width, height) <= 2048:
        raise argparse.ArgumentTypeError(f"{text}: sides must be 32 to 2048 pixels, digits are unreadable below")
    return width, height


def _at_least(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return parse


def main(argv: list[str] | None = None) -> int | None:
    parser = Parser("mlc demo-data", description="Write a small competition: CSVs, JPEGs and classes.yaml.")
    parser.add_argument("out", type=Path, help="folder to write (new, empty, or left unfinished by this command)")
    parser.add_argument(
        "--samples",
        type=_at_least(6),
        default=6000,
        help="images in train and test together, a sixth is test; val.csv is a tenth on top (6000)",
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="another number, other images (0)")
    parser.add_argument("--size", type=_image_size, help="pixels, N or WxH, before stretching (96; imet: 64)")
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        default="demo",
        help="demo: 18 labels in two groups; comp5329: labels 1..19 without 12, label 1 dominant; "
        "imet: 319 labels in two groups, sides up to 1:8",
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=_at_least(1),
        default=default_workers(),
        help="processes; changes nothing but the time (all cores)",
    )
    args = parser.parse_args(argv)
    shape, size = SHAPES[args.shape], args.size or SHAPES[args.shape].size
    made_with = (
        to_json(
            {
                "samples": args.samples,
                "seed": args.seed,
                "size": list(size),
                "shape": args.shape,
                "generation": GENERATION,
            }
        )
        + "\n"
    )
    try:
        if claim(args.out, made_with):
            say(f"already there: {args.out}")
            return 0
        train = generate(
            args.out, samples=args.samples, seed=args.seed, size=size, shape=args.shape, workers=args.workers
        )
        os.replace(args.out / "demo.unfinished.json", args.out / "demo.json")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or args.out}: {error.strerror or error}") from error
    report(args.out, shape, train, sum(split_sizes(args.samples).values()))
    return 0
