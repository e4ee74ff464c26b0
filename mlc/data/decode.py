"""Encoded bytes -> the pixels of one crop, at the cost of the JPEG decoder and little else.

Nearly every training image is a plain JPEG, so that case has a road of its own: libjpeg-turbo straight into an array,
at a half, quarter or eighth of the size where that is still enough and only the rows of the crop where the file has
restart markers (`mlc pack --resize` writes them), then the crop, then OpenCV's resize. Everything else (PNG, WebP,
CMYK, damaged files) goes through Pillow to the same crop and the same resize. The decoder and the filters were chosen
by measurement: docs/performance.md.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps

from shards.image import BadImage, open_image, to_rgb

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels of the upright image

# One image is too little work for threads, and in a worker they would only fight the other workers.
cv2.setNumThreads(0)


class Header(NamedTuple):
    """What has to be known of a JPEG before it is decoded: its stored size, and where its parts are in the file."""

    width: int
    height: int
    turn: int  # EXIF orientation
    unit: int  # pixel rows of a row of blocks
    frame: int  # offset of the frame header's marker
    scan: int  # offset of the compressed data
    restarts: bool  # whether every row of blocks ends with a restart marker


def decoded(
    data: bytes,
    size: int,
    choose: Callable[[tuple[int, int]], Box],
    *,
    antialias: bool = False,
    keep_aspect: bool = False,
) -> np.ndarray:
    """The box that `choose` picks, given the upright image's (width, height), as RGB uint8 [size, size, 3].

    keep_aspect: [h, w, 3] instead, the longer of them `size`.
    antialias: the filter of `resized`, and a JPEG is decoded at a fraction of its size only where that keeps twice the
    detail, which makes the picture Pillow's; without it, where it keeps enough. Raises BadImage.
    """
    try:
        pixels, box = _pixels(data, 2 * size if antialias else size, choose, max if keep_aspect else min)
        return resized(pixels, box, size, antialias=antialias, keep_aspect=keep_aspect)
    except BadImage:
        raise
    except Exception as error:  # foreign bytes make the decoders raise anything
        raise BadImage(f"does not decode: {error}") from error


def resized(
    pixels: np.ndarray, box: Box, size: int, *, antialias: bool = False, keep_aspect: bool = False
) -> np.ndarray:
    """The box of RGB uint8 [H, W, 3] as uint8 [size, size, 3]; the box's edges are rounded to whole pixels.

    keep_aspect: [h, w, 3] instead, the longer of them `size`.

    Without `antialias` the filter is the cheapest that lets nothing through the gaps: cubic for enlarging, two taps a
    side up to a shrinking by two. Beyond, and with it, Pillow's antialiased bicubic by torch's SIMD kernel, which
    differs from Pillow only in rounding and costs about three times as much.
    """
    left, upper, right, lower = _whole_pixels(box, pixels.shape[1], pixels.shape[0])
    cut = pixels[upper:lower, left:right]
    shrinking, height, width = max(cut.shape[:2]) / size, size, size
    if keep_aspect:
        height, width = (max(1, round(side / shrinking)) for side in cut.shape[:2])
    if shrinking > (1 if antialias else 2):
        planes = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1)[None]
        small = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())
    method = cv2.INTER_LINEAR if shrinking > 1.25 else cv2.INTER_CUBIC
    return cv2.resize(cut, (width, height), interpolation=method)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; untouched, and so not yet decoded, where it says nothing."""
    if _orientation(image) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _pixels(
    data: bytes, enough: int, choose: Callable[[tuple[int, int]], Box], side: Callable[[float, float], float]
) -> tuple[np.ndarray, Box]:
    """Upright RGB uint8 [H, W, 3], a fraction of the image's size if the box keeps `enough` pixels a side; the box.

    side: `min` or `max`, which of the box's sides counts.
    """
    if (header := _plain_jpeg(data)) is not None:
        box = choose((header.width, header.height) if header.turn < 5 else (header.height, header.width))
        try:
            return _fast(data, enough, header, box, side)
        except ValueError:  # damaged or unusual: Pillow finds out whether it can be read, and says what is wrong
            return _careful(data, enough, lambda _: box, side)
    return _careful(data, enough, choose, side)


def _fast(
    data: bytes, enough: int, header: Header, box: Box, side: Callable[[float, float], float]
) -> tuple[np.ndarray, Box]:
    fraction, height = _fraction(box, enough, side), header.height
    if (rows := _rows_of(header, box)) and (cut := _only_rows(data, header, *rows)) is not None:
        data, height = cut, (min(rows[1] * header.unit, height) - rows[0] * header.unit)
        box = (box[0], box[1] - rows[0] * header.unit, box[2], box[3] - rows[0] * header.unit)
    least = {"min_width": -(-header.width // fraction), "min_height": -(-height // fraction)} if fraction > 1 else {}
    return TURNED[header.turn](simplejpeg.decode_jpeg(data, "RGB", **least)), _shrunk(box, fraction)


def _careful(
    data: bytes, enough: int, choose: Callable[[tuple[int, int]], Box], side: Callable[[float, float], float]
) -> tuple[np.ndarray, Box]:
    image = upright(open_image(data))
    before, box = image.size, choose(image.size)
    fraction = _fraction(box, enough, side)
    image.draft(None, (before[0] // fraction, before[1] // fraction))  # a no-op on all but JPEG
    cut = _whole_pixels(box if image.size == before else _shrunk(box, fraction), *image.size)
    pixels = np.array(to_rgb(image.crop(cut)))
    return pixels, (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))


def _plain_jpeg(data: bytes) -> Header | None:
    """The header of a grey or RGB JPEG of a permitted size; else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("Gray", "YCbCr", "RGB") or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    frame, interval, metadata, at = 0, 0, False, 2
    while at + 4 <= len(data) and data[at] == 0xFF and (marker := data[at + 1]) != 0xDA:
        if marker in (0xC0, 0xC1, 0xC2):
            frame = at
        elif marker == 0xDD:
            interval = data[at + 4] << 8 | data[at + 5]
        elif marker == 0xE1:  # EXIF or XMP; without it Pillow, ten times as slow as this loop, need not be asked
            metadata = True
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    if not frame or data[at : at + 2] != b"\xff\xda":
        return None
    across, down = _block(data, frame)
    by_rows = data[frame + 1] != 0xC2 and interval == -(-width // across)
    turn = _orientation(open_image(data)) if metadata else 1
    return Header(width, height, turn, down, frame, at + 2 + (data[at + 2] << 8 | data[at + 3]), by_rows)


def _block(data: bytes, frame: int) -> tuple[int, int]:
    """(width, height) in pixels of what the scan is made of: 8 times the largest sampling factors, 8 for grey."""
    factors = [data[frame + 11 + 3 * i] for i in range(data[frame + 9])]
    return (8, 8) if len(factors) == 1 else (8 * max(f >> 4 for f in factors), 8 * max(f & 15 for f in factors))


def _rows_of(header: Header, box: Box) -> tuple[int, int] | None:
    """The rows of blocks that hold the box, from and to; None where that is nearly all of them or cannot be used."""
    if not header.restarts or header.turn != 1:
        return None
    first, last = int(box[1]) // header.unit, -(-math.ceil(box[3]) // header.unit)
    return (first, last) if (last - first) * header.unit < 0.85 * header.height else None


def _only_rows(data: bytes, header: Header, first: int, last: int) -> bytes | None:
    """A JPEG of some rows of blocks only; None where the restart markers are not those of the header's rows.

    Restart markers are the one place where a baseline JPEG can be cut without decoding: nothing is carried over them.
    """
    levels = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(levels[header.scan : -2] == 0xFF) + header.scan
    at = at[(levels[at + 1] & 0xF8) == 0xD0]
    rows = -(-header.height // header.unit)
    if len(at) != rows - 1:
        return None
    begin = int(at[first - 1]) + 2 if first else header.scan
    end = int(at[last - 1]) if last < rows else len(data) - 2
    body = bytearray(data[begin:end])
    if first % 8:  # the markers count to eight
        for i, marker in enumerate(at[first : last - 1]):
            body[marker - begin + 1] = 0xD0 + i % 8
    height = min(last * header.unit, header.height) - first * header.unit
    size = header.frame + 5
    return b"".join((data[:size], height.to_bytes(2, "big"), data[size + 2 : header.scan], body, b"\xff\xd9"))


def _orientation(image: Image.Image) -> int:
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in TURNED else 1


# What each EXIF orientation asks of an array [H, W, 3]; views, the pixels are copied with the crop.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def _fraction(box: Box, enough: int, side: Callable[[float, float], float] = min) -> int:
    """8, 4 or 2 where the box decoded at that fraction of its size still has `enough` pixels a side, else 1.

    libjpeg-turbo offers every eighth, but only these three have SIMD kernels: 5/8 takes longer than 8/8.
    """
    spare = side(box[2] - box[0], box[3] - box[1]) / enough
    return next((k for k in (8, 4, 2) if spare >= k), 1)


def _shrunk(box: Box, fraction: int) -> Box:
    return (box[0] / fraction, box[1] / fraction, box[2] / fraction, box[3] / fraction)


def _whole_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The box with its edges at the nearest pixels, inside the image and at least one pixel wide and high."""
    left, upper = min(round(box[0]), width - 1), min(round(box[1]), height - 1)
    return left, upper, max(left + 1, min(round(box[2]), width)), max(upper + 1, min(round(box[3]), height))
