"""What the tests of the format share: tiny raw data sets made on the spot, and packing them as a user would."""

import csv
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from shards import pack
from shards.console import run
from shards.dataset import Index, load_dataset, open_index


def picture(seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    """Noise: no two are alike, and a byte out of place shows."""
    noise = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_table(path: Path, header: list[str], rows: list, quoting: int = csv.QUOTE_MINIMAL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=quoting)
        writer.writerows([header, *rows])
    return path


def write_raw(folder: Path, samples: int = 12, test: int = 0, classes: int = 5, seed: int = 0) -> Path:
    """train.csv (some rows without a label or a caption), test.csv where wanted, and their images."""
    rng = np.random.RandomState(seed)
    (folder / "images").mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(samples)] + [f"t{i}.jpg" for i in range(test)]
    for number, name in enumerate(names):
        (folder / "images" / name).write_bytes(encoded(picture(seed * 1000 + number)))
    labels = [" ".join(map(str, np.flatnonzero(rng.rand(classes) < 0.4))) for _ in range(samples)]
    labels[0] = " ".join(map(str, range(classes)))
    write_table(
        folder / "train.csv",
        ["ImageID", "Labels", "Caption"],
        [[f"{i}.jpg", labels[i], f"caption {i}" if i % 3 else ""] for i in range(samples)],
    )
    if test:
        write_table(folder / "test.csv", ["ImageID", "Caption"], [[f"t{i}.jpg", f"test {i}"] for i in range(test)])
    return folder


def pack_raw(raw: Path, out: Path, *flags: str) -> int:
    """The exit code of `mlc pack`, one process unless told otherwise."""
    base = ["--csv", str(raw / "train.csv"), "--images", str(raw / "images"), "--out", str(out)]
    return run(pack.main, [*base, *([] if "-j" in flags else ["-j", "1"]), *map(str, flags)])


def opened(out: Path, split: str = "train") -> Index:
    return open_index(load_dataset(out), split)


def image_bytes(index: Index, row: int) -> bytes:
    """Through the index alone, as training reads."""
    with index.shard_path(int(index.shard[row])).open("rb") as file:
        file.seek(index.offset[row])
        return file.read(index.size[row])


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256, for every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
