"""What `mlc pack --resize S --quality Q` costs and gains: bytes, reading speed, and what the model sees.

640 x 480 photographs, stored as they are, as smaller JPEGs, and as raw pixels (uint8, without a codec). For each:
kilobytes a picture; microseconds a picture from bytes to a random 256 x 256 crop, in one process; and how far the whole
picture at 256 x 256, as evaluation sees it, is from that of the original, as PSNR.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import common
import cv2
import numpy as np
import torch
from loader import SIZE, big_pictures
from PIL import Image

from mlc.data.decode import resized
from mlc.data.order import AUGMENT, Draws
from mlc.data.transforms import EvalTransform, TrainTransform, random_box
from shards.image import open_image, packed_bytes, to_rgb

Stored = bytes | np.ndarray
CHOICES = [(None, 0), *((side, quality) for side in (256, 288, 352) for quality in (85, 92, 95))]


@dataclass(frozen=True)
class Kind:
    name: str
    stored: list[Stored]
    bytes: float


def kinds(pictures: list[bytes]) -> list[Kind]:
    found = []
    for side, quality in CHOICES:
        stored = [packed_bytes(p, resize=side, quality=quality)[0] if side else p for p in pictures]
        name = f"short side {side}, quality {quality}" if side else "as it is, 640 x 480, quality 90"
        found.append(Kind(name, stored, float(np.mean([len(s) for s in stored]))))
    raw = [_raw(p, 288) for p in pictures]
    return [*found, Kind("short side 288, raw pixels", raw, float(np.mean([pixels.nbytes for pixels in raw])))]


def _raw(picture: bytes, short: int) -> np.ndarray:
    image = to_rgb(open_image(picture))
    scale = short / min(image.size)
    return np.array(image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS))


def crop(stored: Stored, position: int) -> np.ndarray:
    draws = Draws(0, AUGMENT, position)
    if isinstance(stored, bytes):
        return TrainTransform(size=SIZE)(stored, draws)
    size = (stored.shape[1], stored.shape[0])
    image = resized(stored, random_box(size, (0.08, 1.0), (3 / 4, 4 / 3), draws), SIZE)
    return cv2.flip(image, 1) if draws.uniform() < 0.5 else image


def whole(stored: Stored) -> np.ndarray:
    if isinstance(stored, bytes):
        return EvalTransform(size=SIZE)(stored)
    return resized(stored, (0, 0, stored.shape[1], stored.shape[0]), SIZE, antialias=True)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB of two uint8 pictures."""
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def microseconds(function: Callable[[Stored, int], object], stored: list[Stored]) -> float:
    begin = time.perf_counter()
    for position, one in enumerate(stored):
        function(one, position)
    return (time.perf_counter() - begin) / len(stored) * 1e6


def main() -> int:
    args = common.arguments(__doc__, rounds=7).parse_args()
    count, rounds = (16, 1) if args.quick else (256, args.rounds)
    torch.set_num_threads(1)
    chosen = kinds(big_pictures(count))
    times = common.interleaved({kind.name: partial(microseconds, crop, kind.stored) for kind in chosen}, rounds)
    views = [whole(stored) for stored in chosen[0].stored]
    rows, content = [], {}
    for kind in chosen:
        same = kind is chosen[0]
        loss = [] if same else [psnr(whole(stored), view) for stored, view in zip(kind.stored, views, strict=True)]
        took = median(times[kind.name])
        rows.append(
            [
                kind.name,
                f"{kind.bytes / 1000:.0f}",
                f"{took:.0f}",
                f"{common.spread(times[kind.name]):.0%}",
                f"{median(times[chosen[0].name]) / took:.2f} x",
                "" if same else f"{np.mean(loss):.1f}",
            ]
        )
        content[kind.name] = {"bytes": kind.bytes, "microseconds": times[kind.name], "psnr": loss}
    print(f"{common.machine()}; {count} pictures, {common.rounds_said(rounds)}\n")
    print(common.table(["stored", "kB", "us a crop", "spread", "faster", "PSNR at 256, dB"], rows))
    common.write_json(
        args.json, kinds=content, versions=common.versions("simplejpeg", "pillow", "opencv-python-headless")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
