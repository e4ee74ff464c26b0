"""Pictures of a packed data set, looked at in worker processes: their size, a perceptual hash, a thumbnail.

Everything a page about the data wants from an image costs one decode, so it is taken in one pass; JPEG is decoded at a
fraction of its size. A picture that does not decode is a finding, never the end of the pass.
"""

import io
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy.fft import dctn

from shards.console import UserError, progress
from shards.dataset import Index
from shards.image import BadImage, check_image, open_image, read_image, to_rgb
from shards.urls import read_range
from shards.workers import spread

CHUNK = 128  # images a task
SIDE = 32  # pixels: what the hash sees
TINY = 8  # pixels: what confirms that two pictures with near hashes are alike


class Task(NamedTuple):
    """Rows of one split for one worker; the index maps itself again there."""

    index: Index
    rows: np.ndarray


@dataclass(frozen=True)
class Survey:
    """N pictures of several splits, as they were found.

    `split` [N] counts in `names`; `row` [N] is the row in that split; `size` int32 [N, 2] is the upright width and
    height in pixels, (0, 0) where `problems` (split, row, text) tells why the picture is unusable; `hash` uint64 [N];
    `tiny` uint8 [N, 192] is the picture at 8 x 8 pixels; `content` int64 [N] is equal for equal bytes.
    """

    names: tuple[str, ...]
    split: np.ndarray
    row: np.ndarray
    size: np.ndarray
    hash: np.ndarray
    tiny: np.ndarray
    content: np.ndarray
    problems: list[tuple[str, int, str]]
    total: int

    def __len__(self) -> int:
        return len(self.row)


def survey(indexes: Mapping[str, Index], *, most: int, workers: int) -> Survey:
    """Looks at every picture, or at `most` of them evenly spread; equal bytes (crc32 and size) are decoded once."""
    total = sum(map(len, indexes.values()))
    share = min(1.0, most / max(1, total))
    rows = [_spaced(len(index), round(len(index) * share)) for index in indexes.values()]
    row = np.concatenate(rows)
    split = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    same = [
        index.crc32[part].astype(np.int64) << 32 ^ index.size[part]
        for index, part in zip(indexes.values(), rows, strict=True)
    ]
    _, first, content = np.unique(np.concatenate(same), return_index=True, return_inverse=True)
    tasks = [
        Task(index, row[chosen])
        for number, index in enumerate(indexes.values())
        for chosen in _chunks(np.sort(first[split[first] == number]))
    ]
    looked: list[Looked] = []
    with progress("looking at images", len(first)) as advance:
        for task, found in zip(tasks, spread(look, tasks, workers), strict=True):
            looked.append(found)
            advance(len(task.rows))
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))  # the tasks went through `first` in ascending order
    place = rank[content]
    problem = [text for found in looked for text in found.problem]
    names = tuple(indexes)
    return Survey(
        names=names,
        split=split,
        row=row,
        size=_joined([found.size for found in looked], (2,), np.int32)[place],
        hash=_joined([found.hash for found in looked], (), np.uint64)[place],
        tiny=_joined([found.tiny for found in looked], (3 * TINY * TINY,), np.uint8)[place],
        content=content,
        problems=[
            (names[split[i]], int(row[i]), problem[where]) for i, where in enumerate(place.tolist()) if problem[where]
        ],
        total=total,
    )


class Looked(NamedTuple):
    """One task's pictures, in the order of its rows; see `Survey`. `problem` is "" where there is none."""

    size: np.ndarray
    hash: np.ndarray
    tiny: np.ndarray
    problem: list[str]


def look(task: Task) -> Looked:
    """Size, hash and 8 x 8 copy of every row of the task."""
    found = Looked(
        np.zeros((len(task.rows), 2), np.int32),
        np.zeros(len(task.rows), np.uint64),
        np.zeros((len(task.rows), 3 * TINY * TINY), np.uint8),
        [""] * len(task.rows),
    )
    for place, data in stored(task.index, task.rows):
        try:
            size, image = decoded(data, 2 * SIDE)
        except BadImage as problem:
            found.problem[place] = str(problem)
            continue
        found.size[place] = size
        found.hash[place], found.tiny[place] = fingerprint(image)
    return found


class Files(NamedTuple):
    """Files that were decoded: what is wrong with each, "" where nothing is, and what
    `shards.duplicates.group_numbers` compares: `hash` uint64 [N], `tiny` uint8 [N, 192], `content` int64 [N]."""

    problem: list[str]
    hash: np.ndarray
    tiny: np.ndarray
    content: np.ndarray

    @classmethod
    def of(cls, count: int) -> "Files":
        tiny = np.zeros((count, 3 * TINY * TINY), np.uint8)
        return cls([""] * count, np.zeros(count, np.uint64), tiny, np.zeros(count, np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Files"]) -> "Files":
        problems = [text for part in parts for text in part.problem]
        hashes, tiny, content = (np.concatenate(column) for column in list(zip(*parts, strict=True))[1:])
        return cls(problems, hashes, tiny, content)


def look_at_files(paths: Sequence[Path], fingerprints: bool) -> Files:
    """Every file of `paths`, decoded whole; `fingerprints`: and what is compared, which is left at 0 otherwise."""
    found = Files.of(len(paths))
    for place, path in enumerate(paths):
        try:
            data = read_image(path)
            check_image(data)
            if fingerprints:
                found.hash[place], found.tiny[place] = fingerprint(decoded(data, 2 * SIDE)[1])
                found.content[place] = zlib.crc32(data) << 31 ^ len(data)
        except BadImage as problem:
            found.problem[place] = str(problem)
    return found


def fingerprint(image: Image.Image) -> tuple[np.uint64, np.ndarray]:
    """What `shards.duplicates.near_pairs` compares: the perceptual hash and the picture at 8 x 8, uint8 [192]."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return perceptual_hash(small), np.asarray(small.resize((TINY, TINY), Image.Resampling.BOX)).ravel()


def perceptual_hash(image: Image.Image) -> np.uint64:
    """pHash, 64 bits: which of the 8 x 8 lowest frequencies of the 32 x 32 grey picture are above their median.

    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), with the mean brightness (the
    first coefficient) left out. Bits that differ measure how different two pictures look.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return np.packbits(bits).view(np.uint64)[0]


def thumbnails(
    indexes: Mapping[str, Index],
    wanted: Iterable[tuple[str, int]],
    *,
    workers: int,
    size: tuple[int, int] = (144, 96),
) -> dict[tuple[str, int], bytes]:
    """(split, row) -> JPEG of at most `size` pixels, (width, height); pictures that are unusable are left out."""
    rows = {name: np.array(sorted({row for split, row in wanted if split == name}), np.int64) for name in indexes}
    tasks = [(name, Task(indexes[name], part)) for name in indexes for part in _chunks(rows[name])]
    found = {}
    for (name, task), made in zip(
        tasks, spread(partial(shrink, size=size), [task for _, task in tasks], workers), strict=True
    ):
        found |= {(name, int(row)): data for row, data in zip(task.rows, made, strict=True) if data}
    return found


def shrink(task: Task, size: tuple[int, int]) -> list[bytes]:
    """Thumbnails of the task's rows, b"" where the picture is unusable."""
    found = [b""] * len(task.rows)
    for place, data in stored(task.index, task.rows):
        try:
            _, image = decoded(data, max(size) * 4 // 3)
        except BadImage:
            continue
        image.thumbnail(size, Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=70, optimize=True)
        found[place] = out.getvalue()
    return found


def decoded(data: bytes, side: int) -> tuple[tuple[int, int], Image.Image]:
    """((width, height) upright, RGB picture): JPEG comes smaller where it stays above `side`. Raises BadImage."""
    image = open_image(data)
    width, height = image.size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: on its side
            image.draft(None, (side, side))
            upright = to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # foreign bytes make the decoders raise anything
        raise BadImage(f"does not decode: {error}") from None
    return ((height, width) if turned else (width, height)), upright


def stored(index: Index, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(place in `rows`, bytes of the image), shard by shard. Raises UserError where a shard cannot be read."""
    if index.url:
        for place, row in enumerate(rows.tolist()):
            start = int(index.offset[row])
            yield place, read_range(index.shard_url(int(index.shard[row])), start, start + int(index.size[row]))
        return
    for shard in np.unique(index.shard[rows]):
        path = index.shard_path(int(shard))
        try:
            with path.open("rb") as file:
                for place in np.flatnonzero(index.shard[rows] == shard):
                    file.seek(index.offset[rows[place]])
                    yield int(place), file.read(index.size[rows[place]])
        except OSError as error:
            raise UserError(f"shard {path} cannot be read ({error.strerror}); `mlc verify` says what else is") from None


def _joined(parts: list[np.ndarray], shape: tuple[int, ...], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), kind), *parts])


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def _spaced(length: int, count: int) -> np.ndarray:
    """`count` of `length` rows, evenly spread, ascending; all of them where there are not more."""
    return np.arange(length) if count >= length else np.linspace(0, length - 1, count).astype(np.int64)
