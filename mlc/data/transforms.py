"""Encoded bytes -> uint8 pixels in the workers; float only on the device, where it is cheap and batched.

Every random choice comes from `Draws`, keyed by (seed, position). RandAugment and AutoAugment are timm's own policies;
they draw from Python's and numpy's global generators, which are seeded for that one image from the same key.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import auto_augment

from mlc.data.order import ERASE, Draws
from shards.console import UserError
from shards.image import BadImage, open_image, to_rgb

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels of the stored image


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flips and RandAugment; the geometry is timm's RandomResizedCropAndInterpolation."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    aa: str = ""
    crop: Literal["rrc", "squish", "center"] = "rrc"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)

    def __call__(self, data: bytes, draws: Draws) -> np.ndarray:
        """Bytes of an image -> uint8 [size, size, 3]."""
        image = decoded(data, self.size, lambda size: self._box(size, draws))
        if draws.uniform() < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draws.uniform() < self.vflip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.aa:
            image = _augmented(image, build_aa(self.aa, self.size, self.mean), draws)
        return np.asarray(image)

    def _box(self, size: tuple[int, int], draws: Draws) -> Box:
        if self.crop == "rrc":
            return random_box(size, self.scale, self.ratio, draws)
        return whole(size) if self.crop == "squish" else center_box(size, 1.0)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The whole picture squeezed to a square (`squish`: no label is cut away) or timm's centre crop (`center`)."""

    size: int
    crop: Literal["squish", "center"] = "squish"
    crop_pct: float = 1.0

    def __call__(self, data: bytes, draws: Draws | None = None) -> np.ndarray:
        """Bytes of an image -> uint8 [size, size, 3]."""
        return np.asarray(
            decoded(data, self.size, whole if self.crop == "squish" else lambda size: center_box(size, self.crop_pct))
        )


def decoded(data: bytes, size: int, choose: Callable[[tuple[int, int]], Box]) -> Image.Image:
    """RGB [size, size] of the box that `choose` picks, given the upright image's (width, height). Raises BadImage."""
    image = open_image(data)
    try:
        image = upright(image)
        return resized(image, choose(image.size), size)
    except Exception as error:  # foreign bytes make the decoders raise anything
        raise BadImage(f"does not decode: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; untouched, and so not yet decoded, where it says nothing."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def resized(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box of the image as RGB [size, size]; a JPEG is decoded at a fraction of its size where that is enough."""
    width, height = image.size
    enough = (math.ceil(width * size / (box[2] - box[0])), math.ceil(height * size / (box[3] - box[1])))
    image.draft("RGB", enough)
    across, down = image.width / width, image.height / height
    box = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
    return to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)


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


_policies: dict[tuple, Callable] = {}


def build_aa(policy: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """timm's policy for a string such as `rand-m9-mstd0.5-inc1`, `original`, `augmix-m5-w4`, `3a`; made once.

    Raises:
        UserError: a policy that timm cannot parse.
    """
    key = (policy, size, mean)
    if key not in _policies:
        try:
            _policies[key] = _parsed(policy, size, mean)
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"--aa {policy}: timm does not know this policy ({error}); e.g. rand-m9-mstd0.5-inc1"
            ) from error
    return _policies[key]


def _parsed(policy: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    hparams = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    if policy.startswith("rand"):
        return auto_augment.rand_augment_transform(policy, hparams)
    if policy.startswith("augmix"):
        return auto_augment.augment_and_mix_transform(policy, {**hparams, "translate_pct": 0.3})
    return auto_augment.auto_augment_transform(policy, hparams)


def _augmented(image: Image.Image, augment: Callable, draws: Draws) -> Image.Image:
    kept = random.getstate(), np.random.get_state()
    random.seed(draws.bits())
    np.random.seed(draws.bits() & 0xFFFFFFFF)
    try:
        return augment(image)
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


# ---- on the device ---------------------------------------------------------------------------------------------------


def normalize(image: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32, (x / 255 - mean) / std per channel."""
    mean_t = torch.tensor(mean, device=image.device).view(1, -1, 1, 1)
    std_t = torch.tensor(std, device=image.device).view(1, -1, 1, 1)
    return image.float().div_(255).sub_(mean_t).div_(std_t)


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
            fill = torch.randn(shape, generator=noise).to(image.device, image.dtype, non_blocking=True)
        image[b, :, top : top + h, left : left + w] = fill
    return image
