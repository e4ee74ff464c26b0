"""One image of a batch: its crop, flips and augmentation in the workers; float only on the device, batched.

Every random choice comes from `Draws`, keyed by (seed, position), in a fixed order: crop, flips, colours,
augmentation.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from mlc.data.augment import build_aa
from mlc.data.decode import Box, decoded
from mlc.data.order import CUTOUT, ERASE, Draws, uniform
from mlc.data.policies import color_jitter
from mlc.parallel.memory import to_device
from shards.console import UserError

CROPS = ("rrc", "squish", "center", "pad", "if-needed:K")


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Crop, flips, colours, a policy; `crop` is one of `CROPS`, `rrc` timm's RandomResizedCropAndInterpolation."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str = ""
    crop: str = "rrc"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __call__(self, data: bytes, draws: Draws) -> np.ndarray:
        """Bytes of an image -> uint8 [size, size, 3]."""
        pad = self.crop == "pad"
        image = decoded(data, self.size, lambda size: self._box(size, draws), keep_aspect=pad)
        if pad:
            image = padded(image, self.size, self.mean)
        if draws.uniform() < self.hflip:
            image = cv2.flip(image, 1)
        if draws.uniform() < self.vflip:
            image = cv2.flip(image, 0)
        if self.color_jitter:
            image = color_jitter(image, draws, self.color_jitter)
        if self.aa:
            image = build_aa(self.aa, self.size, self.mean)(image, draws)
        return image

    def _box(self, size: tuple[int, int], draws: Draws) -> Box:
        if self.crop == "rrc":
            return random_box(size, self.scale, self.ratio, draws)
        if self.crop.startswith("if-needed"):
            return window(size, parse_crop(self.crop) * self.size, draws.uniform(), draws.uniform())
        return center_box(size, 1.0) if self.crop == "center" else whole(size)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """`crop`: the whole picture squeezed to a square (`squish`: no label is cut away), timm's centre crop (`center`),
    the middle of what is very long (`if-needed:2`) or all of it between borders (`pad`)."""

    size: int
    crop: str = "squish"
    crop_pct: float = 1.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __call__(self, data: bytes, draws: Draws | None = None) -> np.ndarray:
        """Bytes of an image -> uint8 [size, size, 3]."""
        pad = self.crop == "pad"
        image = decoded(data, self.size, self._box, antialias=True, keep_aspect=pad)
        return padded(image, self.size, self.mean) if pad else image

    def _box(self, size: tuple[int, int]) -> Box:
        if self.crop.startswith("if-needed"):
            return window(size, parse_crop(self.crop) * self.size, 0.5, 0.5)
        return center_box(size, self.crop_pct) if self.crop == "center" else whole(size)


def parse_crop(text: str) -> float:
    """`if-needed:K` -> K, the other names of `CROPS` -> 0. Raises UserError."""
    name, _, times = text.partition(":")
    if name == "if-needed" and times.replace(".", "", 1).isdecimal() and float(times) >= 1:
        return float(times)
    if text not in CROPS:
        raise UserError(
            f"crop {text!r}: use one of {', '.join(CROPS)}, with K from 1 on: sides are cut to at most K times the size"
        )
    return 0.0


def window(size: tuple[int, int], most: float, across: float, down: float) -> Box:
    """A window of at most `most` pixels a side, at shares `across` and `down` of the room it has; iMet's crop of
    pictures that squeezing would make unrecognisable."""
    width, height = min(size[0], round(most)), min(size[1], round(most))
    left, upper = round(across * (size[0] - width)), round(down * (size[1] - height))
    return (float(left), float(upper), float(left + width), float(upper + height))


def padded(image: np.ndarray, size: int, mean: Sequence[float]) -> np.ndarray:
    """[h, w, 3] in the middle of uint8 [size, size, 3]; around it the mean colour, which normalises to 0."""
    height, width = image.shape[:2]
    square = np.empty((size, size, 3), np.uint8)
    square[:] = np.rint(255 * np.asarray(mean))
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def whole(size: tuple[int, int]) -> Box:
    return (0.0, 0.0, float(size[0]), float(size[1]))


def center_box(size: tuple[int, int], crop_pct: float) -> Box:
    """The centre square of `crop_pct` of the short side: timm's resize-then-centre-crop without the extra resize."""
    side = min(size) * crop_pct
    left, upper = (size[0] - side) / 2, (size[1] - side) / 2
    return (left, upper, left + side, upper + side)


def random_box(size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], draws: Draws) -> Box:
    """Inception's crop as in timm and torchvision: area and aspect drawn ten times, else the largest centre crop."""
    width, height = size
    for _ in range(10):
        area = draws.uniform(*scale) * width * height
        aspect = math.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = draws.integer(width - w + 1), draws.integer(height - h + 1)
            return (float(left), float(upper), float(left + w), float(upper + h))
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, upper = (width - w) // 2, (height - h) // 2
    return (float(left), float(upper), float(left + w), float(upper + h))


# ---- on the device ---------------------------------------------------------------------------------------------------


def normalize(image: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, H, W], in any memory order, -> contiguous float32, (x / 255 - mean) / std per channel."""
    mean_t, std_t = (_per_channel(tuple(values), image.device) for values in (mean, std))
    return image.contiguous().float().div_(255).sub_(mean_t).div_(std_t)


@functools.lru_cache(maxsize=8)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Copied to the device once: each copy of a fresh tensor would wait for the device."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def inside(boxes: torch.Tensor, height: int, width: int, device: torch.device) -> torch.Tensor:
    """bool [B, 1, height, width] on the device: the pixels in boxes int64 [B, 4] top, left, bottom, right."""
    top, left, bottom, right = to_device(boxes, device).view(-1, 4, 1, 1, 1).unbind(1)
    y, x = torch.arange(height, device=device).view(-1, 1), torch.arange(width, device=device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def cut_out(image: torch.Tensor, position: torch.Tensor, *, side: float, seed: int) -> torch.Tensor:
    """Cutout (DeVries and Taylor 2017) in place on normalised [B, 3, H, W]: zeros, the mean colour, in a box of `side`
    times the image's sides around a uniform centre, so that a part of it may lie outside."""
    edges = []
    for axis, length in enumerate(image.shape[-2:]):
        size = int(side * length + 0.5)
        first = (uniform(seed, CUTOUT, position.numpy(), axis) * length).astype(np.int64) - size // 2
        edges += [first, first + size]
    top, bottom, left, right = edges
    boxes = torch.from_numpy(np.stack([top, left, bottom, right], 1))
    return image.masked_fill_(inside(boxes, *image.shape[-2:], image.device), 0.0)


def erase_box(height: int, width: int, draws: Draws) -> tuple[int, int, int, int] | None:
    """Top, left, height, width of timm's RandomErasing: area 2 % to 33 %, aspect 0.3 to 3.3, ten tries."""
    for _ in range(10):
        area = draws.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(draws.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return draws.integer(height - h + 1), draws.integer(width - w + 1), h, w
    return None


def erase(image: torch.Tensor, position: torch.Tensor, *, prob: float, mode: str, seed: int) -> torch.Tensor:
    """Random erasing (Zhong et al. 2017) in place on normalised [B, 3, H, W].

    mode: `const` fills the box with zeros, `rand` with one random colour, `pixel` with noise.
    """
    for b, p in enumerate(position.tolist()):
        draws = Draws(seed, ERASE, p)
        if draws.uniform() >= prob or (box := erase_box(*image.shape[-2:], draws)) is None:
            continue
        top, left, h, w = box
        shape = {"const": None, "rand": (image.shape[1], 1, 1), "pixel": (image.shape[1], h, w)}[mode]
        fill = 0.0
        if shape is not None:
            noise = torch.Generator().manual_seed(draws.bits() >> 1)
            fill = to_device(torch.randn(shape, generator=noise).to(image.dtype), image.device)
        image[b, :, top : top + h, left : left + w] = fill
    return image
