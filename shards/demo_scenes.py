"""What the demo data shows: scenes of handwritten digits in coloured ink over photographs, labels and captions.

A scene is drawn from the numbers of a `Shape` (which objects, how many, how often) and the material of a split,
painted, and described. Splits share neither a scan nor a piece of photograph. Every function takes the generator it
draws from.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_digits, load_sample_images

SPLITS = ("train", "val", "test")
SCAN_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
# Each photograph is cut into 4 x 3 tiles, numbered by rows; these (photograph, tile) are kept out of train. Chosen by
# eye, so that every split has sky, building, petals and leaves: a held-out tile of nothing but petals is another task.
HELD_OUT_TILES = {"val": ((0, 0), (0, 11), (1, 3), (1, 10)), "test": ((0, 2), (0, 4), (1, 2), (1, 8))}
PHOTOS = ("palace", "flower")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (205, 30, 35),
    "orange": (240, 120, 25),
    "yellow": (245, 215, 40),
    "green": (35, 150, 60),
    "blue": (35, 80, 205),
    "purple": (130, 45, 160),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, the last two exclusive
WRONG_WORDS, EMPTY_CAPTIONS = 0.12, 0.08


# ---- shapes: the numbers of the three competitions ----


class Kind(NamedTuple):
    """What an object can be: a digit in one of `inks`, how often it is drawn, and the labels it brings."""

    digit: int
    inks: tuple[str, ...]
    weight: float
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """The numbers of one competition."""

    kinds: tuple[Kind, ...]
    """Drawn without replacement within an image."""
    counts: tuple[float, ...]
    """Relative frequency of images with 1, 2, ... objects."""
    size: tuple[int, int] = (96, 96)
    """Width and height in pixels before stretching."""
    stretch: float = 1.3
    """One side, at random, is up to this many times longer; most images stay far below."""
    groups: dict[str, tuple[str, ...]] | None = None
    """Group -> its classes, in column order; None: one group of the kinds' labels."""
    scene_labels: bool = False
    """Also a label for photograph x inks, and one for every pair of digits."""

    @property
    def classes(self) -> list[str]:
        """Class names in column order."""
        named = self.groups.values() if self.groups else (kind.labels for kind in self.kinds)
        return list(dict.fromkeys(name for names in named for name in names))


def demo_shape() -> Shape:
    """18 labels in two groups; red in about 75 % of the images, nine in about 1 %."""
    digits = (0.12, 0.26, 0.19, 0.15, 0.07, 0.05, 0.035, 0.09, 0.02, 0.0045)
    inks = dict(zip(INKS, (0.52, 0.05, 0.08, 0.11, 0.16, 0.035, 0.025, 0.015), strict=True))
    kinds = tuple(
        Kind(digit, (ink,), digits[digit] * inks[ink], (str(digit), ink)) for digit, ink in product(range(10), INKS)
    )
    return Shape(
        kinds, counts=(0.28, 0.34, 0.24, 0.09, 0.05), groups={"digit": tuple(map(str, range(10))), "ink": tuple(INKS)}
    )


def comp5329_shape() -> Shape:
    """18 labels called 1..19 without 12, each a digit in warm or in cool ink; frequencies of the course's data."""
    # There label 1 has 22,797. Drawing without replacement lifts the others, so that it must weigh more than it counts.
    counts = {
        1: 49500,
        2: 1164,
        3: 4365,
        4: 1272,
        5: 1132,
        6: 1395,
        7: 1221,
        8: 2210,
        9: 1042,
        10: 1471,
        11: 604,
        13: 605,
        14: 252,
        15: 1934,
        16: 1099,
        17: 1430,
        18: 1525,
        19: 1020,
    }
    objects = product((("red", "orange", "yellow"), ("green", "blue", "purple")), range(1, 10))
    kinds = tuple(
        Kind(digit, inks, count, (str(label),))
        for (label, count), (inks, digit) in zip(counts.items(), objects, strict=True)
    )
    return Shape(kinds, counts=(19377, 6651, 2563, 978, 339, 81, 11), stretch=1.5)


def imet_shape() -> Shape:
    """319 labels in the groups culture (photograph x inks) and tag (digit x ink, pairs of digits); sides up to 1:8."""
    digits, inks = np.geomspace(1, 0.12, 10), dict(zip(INKS, np.geomspace(1, 0.08, 8), strict=True))
    kinds = tuple(
        Kind(digit, (ink,), digits[digit] * inks[ink], (f"tag::{digit}-{ink}",))
        for digit, ink in product(range(10), INKS)
    )
    culture = tuple(
        "-".join((f"culture::{photo}", *some)) for photo in PHOTOS for n in (1, 2, 3) for some in combinations(INKS, n)
    )
    pairs = tuple(f"tag::{a}+{b}" for a, b in combinations_with_replacement(range(10), 2))
    return Shape(
        kinds,
        counts=(0.42, 0.48, 0.1),
        size=(64, 64),
        stretch=8,
        scene_labels=True,
        groups={"culture": culture, "tag": tuple(kind.labels[0] for kind in kinds) + pairs},
    )


SHAPES = {"demo": demo_shape(), "comp5329": comp5329_shape(), "imet": imet_shape()}


# ---- material: which scans and which pieces of photograph a split may use ----


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans uint8 [1797, 8, 8] as opacity 0..255, and the digits they show, int [1797]."""
    data = load_digits()
    return (data.images * 255 / 16).round().astype(np.uint8), data.target


@cache
def _photos() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@cache
def scan_pool(split: str, digit: int) -> np.ndarray:
    """Rows of `load_digits` that show `digit` and belong to `split`, int [n].

    The pools are disjoint and do not depend on the seed: test images of one seed never show a scan that a model has
    seen in train images of another seed.
    """
    rows = np.random.default_rng(digit).permutation(np.flatnonzero(_scans()[1] == digit))
    edges = np.cumsum([round(SCAN_SHARES[name] * len(rows)) for name in SPLITS[:-1]])
    return np.split(rows, edges)[SPLITS.index(split)]


def photo_tiles(split: str) -> list[tuple[int, Box]]:
    """(photo, box in pixels) of the tiles that belong to `split`; no two splits share a pixel."""
    held = [tile for tiles in HELD_OUT_TILES.values() for tile in tiles]
    rest = [tile for tile in product(range(len(PHOTOS)), range(12)) if tile not in held]
    tiles = []
    for photo, tile in HELD_OUT_TILES.get(split, rest):
        width, height = _photos()[photo].width // 4, _photos()[photo].height // 3
        left, top = tile % 4 * width, tile // 4 * height
        tiles.append((photo, (left, top, left + width, top + height)))
    return tiles


# ---- one image ----


class Thing(NamedTuple):
    """One object of a scene. `height` is a share of the image's shorter side, `angle` is in degrees."""

    kind: Kind
    ink: str
    scan: int
    height: float
    angle: float


class Scene(NamedTuple):
    """All that decides an image but for the places of the objects. `size` is (width, height)."""

    size: tuple[int, int]
    photo: int
    tile: Box
    things: list[Thing]


def _weighted(rng: np.random.Generator, weights: Iterable[float], n: int = 1) -> np.ndarray:
    p = np.array(list(weights), float)
    return rng.choice(len(p), n, replace=False, p=p / p.sum())


def draw_scene(shape: Shape, size: tuple[int, int], split: str, rng: np.random.Generator) -> Scene:
    """A random scene from the material of `split`; the largest object is first."""
    longer = float(np.exp(np.log(shape.stretch) * rng.random() ** 3))
    across = rng.random() < 0.5
    size = (round(size[0] * longer), size[1]) if across else (size[0], round(size[1] * longer))
    tiles = photo_tiles(split)
    photo, tile = tiles[rng.integers(len(tiles))]
    n = int(_weighted(rng, shape.counts)[0]) + 1
    kinds = [shape.kinds[k] for k in _weighted(rng, (kind.weight for kind in shape.kinds), n)]
    largest = max(0.42, 0.76 - 0.08 * n)  # crowded scenes need smaller digits, or they hide each other
    heights = sorted(largest * rng.uniform(0.8, 1.0, n), reverse=True)
    things = [
        Thing(
            kind,
            kind.inks[rng.integers(len(kind.inks))],
            int(rng.choice(scan_pool(split, kind.digit))),
            height,
            float(rng.uniform(-20, 20)),
        )
        for kind, height in zip(kinds, heights, strict=True)
    ]
    return Scene(size, photo, tile, things)


def scene_labels(shape: Shape, scene: Scene) -> list[str]:
    """The true labels, in column order."""
    labels = {label for thing in scene.things for label in thing.kind.labels}
    if shape.scene_labels:
        digits = sorted(thing.kind.digit for thing in scene.things)
        labels |= {f"tag::{a}+{b}" for a, b in combinations(digits, 2)}
        inks = {thing.ink for thing in scene.things}
        labels.add("-".join((f"culture::{PHOTOS[scene.photo]}", *(ink for ink in INKS if ink in inks))))
    return [name for name in shape.classes if name in labels]


def background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A random cut of the scene's tile, mirrored half of the time, in a random brightness."""
    (left, top, right, bottom), (width, height) = scene.tile, scene.size
    zoom = min((right - left) / width, (bottom - top) / height) * rng.uniform(0.45, 1.0)
    x = int(left + rng.random() * (right - left - width * zoom))
    y = int(top + rng.random() * (bottom - top - height * zoom))
    # Cropped before it is resized: `resize(box=...)` reads beyond its box, into another split's tile.
    box = (x, y, x + max(1, int(width * zoom)), y + max(1, int(height * zoom)))
    cut = _photos()[scene.photo].crop(box).resize(scene.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(cut).enhance(rng.uniform(0.7, 1.1))


def glyph(thing: Thing, height: int) -> Image.Image:
    """The scan as a smooth opacity mask, `height` pixels high before it is turned, cut to its ink."""
    scan = Image.fromarray(_scans()[0][thing.scan])
    scan = scan.crop(scan.getbbox())
    mask = scan.resize((max(2, round(height * scan.width / scan.height)), height), Image.Resampling.BICUBIC)
    mask = mask.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    return mask.point(lambda a: min(255, max(0, round((a - 75) * 1.9))))  # the scans' grey rims would blur the strokes


def _overlap(a: Box, b: Box) -> float:
    """The common area as a share of the smaller box."""
    wide, high = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    return max(0, wide) * max(0, high) / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def worst_overlap(boxes: list[Box]) -> float:
    return max((_overlap(a, b) for a, b in combinations(boxes, 2)), default=0.0)


def arrange(size: tuple[int, int], extents: list[tuple[int, int]], rng: np.random.Generator) -> list[Box]:
    """Random boxes of these extents inside `size`, so that none hides another.

    Of 6 layouts the best, because one box in the middle can leave no good place to the others; in each a box takes
    the best of 20 random places.
    """
    layouts = []
    for _ in range(6 if len(extents) > 1 else 1):
        boxes: list[Box] = []
        for wide, high in extents:
            corners = rng.integers(0, np.subtract(size, (wide, high)) + 1, (20, 2)).tolist()
            tries = [(x, y, x + wide, y + high) for x, y in corners]
            boxes.append(min(tries, key=lambda box: max((_overlap(box, other) for other in boxes), default=0.0)))
        layouts.append(boxes)
    return min(layouts, key=worst_overlap)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB image of `scene.size`."""
    image = background(scene, rng)
    masks = [glyph(thing, round(thing.height * min(scene.size))) for thing in scene.things]
    boxes = arrange(scene.size, [mask.size for mask in masks], rng)
    for thing, mask, box in zip(scene.things, masks, boxes, strict=True):
        ink = np.array(INKS[thing.ink]) * rng.uniform(0.8, 1.05) + rng.normal(0, 10, 3)
        # A soft rim of the opposite lightness: white on sky and black on shadow stay readable.
        rim = (0, 0, 0) if ink.mean() > 100 else (255, 255, 255)
        pad = max(1, mask.height // 12)
        halo = Image.new("L", (mask.width + 2 * pad, mask.height + 2 * pad))
        halo.paste(mask, (pad, pad))
        halo = halo.filter(ImageFilter.GaussianBlur(pad)).point(lambda a: min(110, a))
        image.paste(rim, (box[0] - pad, box[1] - pad), halo)
        image.paste(tuple(int(c) for c in ink.clip(0, 255)), box[:2], mask)
    return image


# ---- what people say about it ----


def misread(thing: Thing, rng: np.random.Generator) -> tuple[str, str]:
    """(digit's word, ink), one of the two at times wrong."""
    word, ink = WORDS[thing.kind.digit], thing.ink
    if rng.random() < WRONG_WORDS:
        if rng.random() < 0.5:
            word = str(rng.choice([other for other in WORDS if other != word]))
        else:
            ink = str(rng.choice([other for other in INKS if other != ink]))
    return word, ink


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" and not words.startswith("one") else f"a {words}"


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Names some of the objects, each by digit, by ink or by both; empty for some images."""
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    seen = [misread(thing, rng) for thing in scene.things]
    first, (word, ink) = 1 + int(rng.binomial(len(seen) - 1, 0.4)), seen[rng.integers(len(seen))]
    alike = sum(other == ink for _, other in seen)
    style = rng.integers(5)
    if style == 0 and alike > 1:
        return f"{WORDS[alike]} {ink} digits, one of them {_a(word)}"
    if style == 1 and len(seen) > 1:
        return f"{WORDS[len(seen)]} numbers, {_a(f'{ink} {word}')} among them"
    said = [
        (_a(f"{ink} {word}"), _a(word), f"something {ink}")[rng.integers(3)]
        for word, ink in (seen[k] for k in rng.permutation(len(seen))[:first])
    ]
    told = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
    photo = _a(PHOTOS[scene.photo])
    return (told, f"{photo} with {told}", f"{told}, written over {photo}", f"I can see {told}", told)[style]


def spoil(shape: Shape, labels: list[str], rng: np.random.Generator) -> list[str]:
    """`labels` with one added, dropped or swapped; what comes in is drawn as often as the objects are."""
    how = rng.choice(["add", "drop", "swap"]) if len(labels) > 1 else "swap"
    wrong = set(labels)
    if how != "add":
        wrong.remove(str(rng.choice(labels)))
    if how != "drop":
        absent = [(name, kind.weight) for kind in shape.kinds for name in kind.labels if name not in labels]
        wrong.add(absent[_weighted(rng, (weight for _, weight in absent))[0]][0])
    return [name for name in shape.classes if name in wrong]
