"""Real multi-label sets out of installable packages: pictures that nobody drew for a benchmark, the same every time.

`emoji`: what four vendors draw for each emoji (npm: emoji-datasource-*), labelled with the commonest keywords of
emojilib; the caption is the short name, so it gives some labels away. Flags, families and skin tones are left out, and
a man, a woman and a person who do the same are one concept. `icons`: five icon themes of Debian, PNGs of 64 pixels or
the next size they have, labelled with their context (actions, apps, ...) and with the commonest words of their
freedesktop names; the caption is the name, so it gives those words away.

A hash of the concept (emoji, icon name) decides the split, so that no concept is in two; of exact copies of a picture
one is kept, and of near copies in different splits the one in train.csv, or else in val.csv. Each set is a folder of
train.csv, val.csv, test.csv and images/, as `mlc pack` reads it. Packages are kept below the data folder; npm, apt-get
and dpkg-deb are asked for them by name.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
from PIL import Image

from shards.console import UserError, few, run, say
from shards.duplicates import near_pairs
from shards.pictures import fingerprint

CACHE = Path.home() / ".cache" / "mlc-real"
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
SIZE = 64  # pixels: larger pictures are reduced to it, smaller ones kept
LEAST = 20  # concepts that a label needs
MOST = 60  # labels, the commonest
MARK = ".made-from-packages"  # what this script may replace

KEYWORDS = "emojilib@4.0.3"
VENDORS = {name: f"emoji-datasource-{name}@16.0.0" for name in ("apple", "facebook", "google", "twitter")}
# Variants of one picture: joiners, the sexes and the direction, which a concept does not have.
VARIANTS = {"200D", "FE0F", "2640", "2642", "27A1"}
PEOPLE = {"1F468", "1F469", "1F9D1"}

THEMES = {
    "oxygen-icon-theme": "oxygen",
    "faenza-icon-theme": "Faenza",
    "mate-icon-theme": "mate",
    "elementary-xfce-icon-theme": "elementary-xfce",
    "lxde-icon-theme": "nuoveXT2",
}
SAME = {"apps": "apps", "mimes": "mimetypes", "stock": "actions"}  # directories that themes name differently
CONTEXTS = {*SAME, "actions", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status"}


@dataclass(frozen=True)
class Picture:
    """`words` are what it may be labelled with, `concept` what must not be in two splits."""

    name: str
    concept: str
    words: frozenset[str]
    caption: str
    png: bytes


# ---- packages --------------------------------------------------------------------------------------------------------


def npm(package: str, folder: Path) -> Path:
    """The tarball of NAME@VERSION below `folder`, fetched where it is not there."""
    name, version = package.split("@")
    return _fetched(["npm", "pack", "--loglevel=error", "--fetch-retries=1", package], f"{name}-{version}.tgz", folder)


def apt(package: str, folder: Path) -> Path:
    """The .deb of a package of this system's release below `folder`, fetched where it is not there."""
    return _fetched(["apt-get", "download", "-q", package], f"{package}_*.deb", folder)


def _fetched(command: Sequence[str], pattern: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        say(*command)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            _fetch(command, partial, f"or put {pattern} into {folder} by hand")
            for file in Path(partial).glob(pattern):
                file.replace(folder / file.name)
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"'{' '.join(command)}' wrote no {pattern}; put it into {folder} by hand")
    return found[-1]


def _fetch(command: Sequence[str], folder: str, otherwise: str) -> None:
    """Raises UserError that ends in what to do `otherwise`."""
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} is not installed: install it, {otherwise}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = "; ".join(done.stderr.strip().splitlines()[:2]) or f"exit code {done.returncode}"
        raise UserError(
            f"'{' '.join(command)}' failed ({why}): make sure that the package registry can be reached from here "
            f"(for apt-get, after apt-get update), {otherwise}"
        )


@contextmanager
def opened(deb: Path) -> Iterator[tarfile.TarFile]:
    """The files of a .deb, to be read once from front to back."""
    if not shutil.which("dpkg-deb"):
        raise UserError(f"dpkg-deb is not installed, which {deb.name} is read with")
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        yield tar


# ---- emoji -----------------------------------------------------------------------------------------------------------


def emoji(folder: Path) -> list[Picture]:
    with tarfile.open(npm(KEYWORDS, folder)) as tar:
        keywords = json.load(tar.extractfile("package/dist/emoji-en-US.json"))
    pictures = []
    for vendor, package in VENDORS.items():
        with tarfile.open(npm(package, folder)) as tar:
            pictures += emoji_of(vendor, tar, keywords)
    return pictures


def emoji_of(vendor: str, tar: tarfile.TarFile, keywords: Mapping[str, Sequence[str]]) -> list[Picture]:
    """The pictures in one vendor's package, whose keywords stand under the emoji itself."""
    words = {_bare(sign): frozenset(filter(re.compile("[a-z]+").fullmatch, found)) for sign, found in keywords.items()}
    prefix = f"package/img/{vendor}/{SIZE}/"
    files = {member.name: member for member in tar.getmembers() if member.name.startswith(prefix)}
    pictures = []
    for entry in json.load(tar.extractfile("package/emoji.json")):
        file = files.get(prefix + entry["image"])
        if file is None or entry["category"] in ("Flags", "Component") or entry["subcategory"] == "family":
            continue
        codes = entry["unified"].split("-")
        sign = _bare("".join(chr(int(code, 16)) for code in codes))
        caption = re.sub("[_-]+", " ", entry["short_name"])
        name = f"{entry['unified'].lower()}-{vendor}.png"
        png = tar.extractfile(file).read()
        pictures.append(Picture(name, emoji_concept(codes), words.get(sign, frozenset()), caption, png))
    return pictures


def emoji_concept(codes: Sequence[str]) -> str:
    """One for all variants of a picture: 1F468-200D-1F3A8, a man who paints, is who paints."""
    codes = ["person" if code in PEOPLE else code for code in codes]
    return "-".join(code for code in codes if code not in VARIANTS)


def _bare(sign: str) -> str:
    return sign.replace("\ufe0f", "")


# ---- icons -----------------------------------------------------------------------------------------------------------


def icons(folder: Path) -> list[Picture]:
    pictures = []
    for package, theme in THEMES.items():
        with opened(apt(package, folder)) as tar:
            pictures += icons_of(theme, tar)
    return pictures


def icons_of(theme: str, tar: tarfile.TarFile) -> list[Picture]:
    """One picture for each icon name of the theme; a link is another name for a picture and left out."""
    sizes: dict[tuple[str, str], dict[int, bytes]] = defaultdict(dict)
    for member in tar:
        found = icon_at(member.name, theme) if member.isfile() else None
        if found is not None:
            context, size, name = found
            sizes[context, name][size] = tar.extractfile(member).read()
    pictures = []
    for (context, name), at in sorted(sizes.items()):
        words = [word for word in re.split("[^a-z]+", name) if len(word) > 1]
        png = at[min(at, key=lambda size: (size < SIZE, abs(size - SIZE)))]
        file = f"{theme.lower()}-{context}-{name}.png"
        pictures.append(Picture(file, name, frozenset([context, *words]), " ".join(words) or name, png))
    return pictures


def icon_at(path: str, theme: str) -> tuple[str, int, str] | None:
    """(context, pixels, name) of a PNG of 48 pixels or more; themes put the size before the context, or behind it."""
    folders, _, file = path.partition(f"/icons/{theme}/")[2].rpartition("/")
    context = next((part for part in folders.split("/") if part in CONTEXTS), None)
    size = next((int(part.split("x")[0]) for part in folders.split("/") if re.fullmatch(r"\d+(x\d+)?", part)), 0)
    if not context or size < 48 or not file.endswith(".png") or "symbolic" in file:
        return None
    return SAME.get(context, context), size, file.removesuffix(".png").lower()


# ---- a set out of pictures -------------------------------------------------------------------------------------------

SETS: dict[str, Callable[[Path], list[Picture]]] = {"emoji": emoji, "icons": icons}


def make(name: str, data_dir: Path, *, part: int = 1) -> Path:
    """The folder of the set, made anew from its packages; to try it, a `part`-th of the pictures and of the labels."""
    pictures = without_leaks(flattened(SETS[name](data_dir / "packages")[::part]))
    labels = commonest(pictures, LEAST // part, MOST // part)
    folder = data_dir / (name if part == 1 else f"{name}-quick")
    if folder.exists() and not (folder / MARK).exists():
        raise UserError(f"{folder} is not a data set of this script: choose another --data-dir")
    shutil.rmtree(folder, ignore_errors=True)
    write([picture for picture in pictures if picture.words & labels], labels, folder)
    return folder


def split_of(concept: str) -> str:
    place = int(hashlib.sha256(concept.encode()).hexdigest()[:16], 16) / 16**16
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return split


def flattened(pictures: Iterable[Picture]) -> list[Picture]:
    """On white and at most `SIZE` pixels, sorted by name; of equal pictures the first is kept."""
    kept: dict[bytes, Picture] = {}
    for picture in sorted(pictures, key=lambda picture: picture.name):
        with Image.open(io.BytesIO(picture.png)) as image:
            rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        rgb.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        rgb.save(file, "PNG")
        same = Picture(picture.name, picture.concept, picture.words, picture.caption, file.getvalue())
        kept.setdefault(hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest(), same)
    return list(kept.values())


def without_leaks(pictures: Sequence[Picture]) -> list[Picture]:
    """Of near copies in different splits, those in the smaller splits go: a theme may draw one thing for two names."""
    prints = []
    for picture in pictures:
        with Image.open(io.BytesIO(picture.png)) as image:
            prints.append(fingerprint(image.convert("RGB")))
    order = list(SHARES)
    gone = set()
    for i, j in near_pairs(np.array([code for code, _ in prints]), np.stack([tiny for _, tiny in prints])).tolist():
        one, other = order.index(split_of(pictures[i].concept)), order.index(split_of(pictures[j].concept))
        if one != other:
            gone.add(i if one > other else j)
    return [picture for i, picture in enumerate(pictures) if i not in gone]


def commonest(pictures: Iterable[Picture], least: int = LEAST, most: int = MOST) -> set[str]:
    """The words that at least `least` concepts have, the `most` commonest; equals in the order of the alphabet."""
    concepts = {(word, picture.concept) for picture in pictures for word in picture.words}
    counts = Counter(word for word, _ in concepts)
    ranked = sorted((word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word))
    return set(ranked[:most])


def write(pictures: Sequence[Picture], labels: set[str], folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / MARK).touch()
    rows: dict[str, list[list[str]]] = {split: [] for split in SHARES}
    for picture in pictures:
        (folder / "images" / picture.name).write_bytes(picture.png)
        row = [picture.name, " ".join(sorted(picture.words & labels)), picture.caption]
        rows[split_of(picture.concept)].append(row)
    for split, lines in rows.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["ImageID", "Labels", "Caption"], *lines])


# ---- looking at it ---------------------------------------------------------------------------------------------------


def read(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> str:
    """How many images, classes and labels per image there are, with the commonest and rarest of train.csv."""
    rows = {split: read(folder, split) for split in SHARES}
    every = [row for split in rows.values() for row in split]
    counts = Counter(label for row in every for label in row["Labels"].split())
    ranked = [f"{label} {count}" for label, count in counts.most_common()]
    sizes = ", ".join(f"{split} {len(found)}" for split, found in rows.items())
    return (
        f"{folder.name}: {len(every)} images ({sizes}), {len(counts)} classes, "
        f"{counts.total() / len(every):.2f} labels an image\n"
        f"  commonest: {few(ranked[:8])}\n  rarest: {few(ranked[-8:])}"
    )


def contact_sheet(folder: Path, split: str, out: Path, columns: int = 24, rows: int = 14) -> None:
    """Pictures of one split side by side, evenly chosen."""
    names = [row["ImageID"] for row in read(folder, split)]
    names = names[:: max(1, len(names) // (columns * rows))][: columns * rows]
    sheet = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 4)), "gray")
    for i, name in enumerate(names):
        with Image.open(folder / "images" / name) as image:
            sheet.paste(image, (i % columns * (SIZE + 4) + 2, i // columns * (SIZE + 4) + 2))
    sheet.save(out)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, default=CACHE, help="packages and data sets are kept here (default: %(default)s)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"{' or '.join(SETS)} (default: both)")
    parser.add_argument("--sheet", metavar="SPLIT", choices=SHARES, help="also write SET-SPLIT.png, a contact sheet")
    add_data_dir(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summaries to FILE")
    options = parser.parse_args(argv)
    found = {}
    for name in options.sets or SETS:
        if name not in SETS:
            raise UserError(f"there is no set {name!r}: choose {' or '.join(SETS)}")
        folder = make(name, options.data_dir)
        found[name] = summary(folder)
        print(found[name])
        if options.sheet:
            contact_sheet(folder, options.sheet, folder / f"{name}-{options.sheet}.png")
    common.write_json(options.json, sets=found)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
