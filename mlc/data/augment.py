"""RandAugment, AutoAugment and 3-Augment on uint8 arrays: timm's policies at a fraction of Pillow's cost.

The policies themselves (which operations, probabilities, magnitudes, weights) are timm's objects, built by timm from
the same string; only the dice and the pixels are ours. The dice come from `Draws`, so that an augmented picture depends
on (seed, position) and nothing else; the distribution is timm's. The pixels are timm's within rounding, except in
turned and sheared pictures: OpenCV's cubic is a little softer and its edge blends with the fill colour. AugMix runs in
timm itself.
"""

import math
import random
from collections.abc import Callable
from functools import lru_cache, partial

import cv2
import numpy as np
from PIL import Image
from timm.data import auto_augment

from mlc.data.order import Draws
from shards.console import UserError

Augment = Callable[[np.ndarray, Draws], np.ndarray]
Fill = tuple[int, ...]


@lru_cache(maxsize=8)
def build_aa(policy: str, size: int, mean: tuple[float, ...]) -> Augment:
    """timm's policy for a string such as `rand-m9-mstd0.5-inc1`, `original`, `3a`, `augmix-m5-w4`.

    Args:
        size: side of the pictures in pixels, for the absolute translations.
        mean: of the normalisation, 0 to 1; its colour fills what a picture moved away from.
    Returns:
        (RGB uint8 [size, size, 3], draws) -> the same shape. As in timm without `--train-interpolation`, every
        geometric operation draws bilinear or bicubic.
    Raises:
        UserError: a policy that timm cannot parse.
    """
    try:
        made = _timms(policy, size, mean)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"--aa {policy}: timm does not know this policy ({error}); e.g. rand-m9-mstd0.5-inc1"
        ) from error
    if isinstance(made, auto_augment.RandAugment):
        return partial(_rand_augment, made)
    return partial(_auto_augment if isinstance(made, auto_augment.AutoAugment) else _by_timm, made)


def _timms(policy: str, size: int, mean: tuple[float, ...]):
    hparams = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * m)) for m in mean)}
    if policy.startswith("rand"):
        return auto_augment.rand_augment_transform(policy, hparams)
    if policy.startswith("augmix"):
        return auto_augment.augment_and_mix_transform(policy, {**hparams, "translate_pct": 0.3})
    return auto_augment.auto_augment_transform(policy, hparams)


def _rand_augment(policy: auto_augment.RandAugment, image: np.ndarray, draws: Draws) -> np.ndarray:
    for op in _chosen(policy, draws):
        image = _applied(op, image, draws)
    return image


def _auto_augment(policy: auto_augment.AutoAugment, image: np.ndarray, draws: Draws) -> np.ndarray:
    for op in policy.policy[draws.integer(len(policy.policy))]:
        image = _applied(op, image, draws)
    return image


def _by_timm(augment: Callable[[Image.Image], Image.Image], image: np.ndarray, draws: Draws) -> np.ndarray:
    """timm draws from Python's and numpy's global generators: seeded for this one image, then put back."""
    kept = random.getstate(), np.random.get_state()
    random.seed(draws.bits())
    np.random.seed(draws.bits() & 0xFFFFFFFF)
    try:
        return np.array(augment(Image.fromarray(image)))
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


# ---- dice ------------------------------------------------------------------------------------------------------------


def _chosen(policy: auto_augment.RandAugment, draws: Draws) -> list[auto_augment.AugmentOp]:
    """The operations of one image: with replacement, or by weight and without, as numpy's `choice` does for timm."""
    ops, weights = list(policy.ops), policy.choice_weights
    if weights is None:
        return [ops[draws.integer(len(ops))] for _ in range(policy.num_layers)]
    weights, chosen = list(weights), []
    for _ in range(policy.num_layers):
        sums = np.cumsum(weights)
        i = min(int(np.searchsorted(sums, draws.uniform(0, sums[-1]), side="right")), len(ops) - 1)
        chosen.append(ops.pop(i))
        weights.pop(i)
    return chosen


def drawn(op: auto_augment.AugmentOp, draws: Draws) -> tuple[float, bool] | None:
    """(magnitude 0 to 10, whether a signed argument is negated) of an operation of timm's, None where it is skipped."""
    if op.prob < 1 and draws.uniform() > op.prob:
        return None
    level, std = op.magnitude, op.magnitude_std
    if std == math.inf:
        level = draws.uniform(0, level)
    elif std > 0:  # Box and Muller
        level += std * math.sqrt(-2 * math.log(1 - draws.uniform())) * math.cos(2 * math.pi * draws.uniform())
    return max(0.0, min(level, op.magnitude_max or 10)), draws.uniform() > 0.5


def _applied(op: auto_augment.AugmentOp, image: np.ndarray, draws: Draws) -> np.ndarray:
    if (drew := drawn(op, draws)) is None:
        return image
    level, negate = drew
    if op.name in GEOMETRY:
        method = cv2.INTER_CUBIC if draws.uniform() > 0.5 else cv2.INTER_LINEAR
        return GEOMETRY[op.name](image, argument(op, level, negate), method, op.hparams["img_mean"])
    if op.name == "GaussianBlurRand":
        return gaussian_blur(image, draws.uniform(0.1, 2.0 * argument(op, level, negate)))
    if op.name in ARGUMENTS:
        return PIXELS[op.name](image, argument(op, level, negate))
    return PIXELS[op.name](image)


def argument(op: auto_augment.AugmentOp, level: float, negate: bool) -> float:
    """What the operation is called with at a magnitude: degrees, a share of the side, pixels, bits, a threshold..."""
    return ARGUMENTS[op.name](level / 10, -1 if negate else 1, op.hparams)


# timm's LEVEL_TO_ARG with the coin out of the function: x = magnitude / 10, s = 1 or -1.
ARGUMENTS: dict[str, Callable[[float, int, dict], float]] = {
    "Rotate": lambda x, s, _: s * 30 * x,
    "ShearX": lambda x, s, _: s * 0.3 * x,
    "ShearY": lambda x, s, _: s * 0.3 * x,
    "TranslateX": lambda x, s, hparams: s * x * hparams["translate_const"],
    "TranslateY": lambda x, s, hparams: s * x * hparams["translate_const"],
    "TranslateXRel": lambda x, s, hparams: s * x * hparams.get("translate_pct", 0.45),
    "TranslateYRel": lambda x, s, hparams: s * x * hparams.get("translate_pct", 0.45),
    "Posterize": lambda x, *_: int(4 * x),
    "PosterizeIncreasing": lambda x, *_: 4 - int(4 * x),
    "PosterizeOriginal": lambda x, *_: 4 + int(4 * x),
    "Solarize": lambda x, *_: min(256, int(256 * x)),
    "SolarizeIncreasing": lambda x, *_: 256 - min(256, int(256 * x)),
    "SolarizeAdd": lambda x, *_: min(128, int(110 * x)),
    **{name: lambda x, *_: 0.1 + 1.8 * x for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    **{
        name + "Increasing": lambda x, s, _: max(0.1, 1 + s * 0.9 * x)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    },
    "Desaturate": lambda x, *_: 1 - min(1.0, 0.5 + 0.5 * x),
    "GaussianBlur": lambda x, *_: min(2.0, 0.1 + 1.9 * x),
    "GaussianBlurRand": lambda x, *_: min(1.0, x),
}


# ---- pixels: RGB uint8 [H, W, 3] to the same shape -------------------------------------------------------------------


def shear_x(image: np.ndarray, factor: float, method: int, fill: Fill) -> np.ndarray:
    return _affine(image, (1, factor, 0, 0, 1, 0), method, fill)


def shear_y(image: np.ndarray, factor: float, method: int, fill: Fill) -> np.ndarray:
    return _affine(image, (1, 0, 0, factor, 1, 0), method, fill)


def translate_x(image: np.ndarray, pixels: float, method: int, fill: Fill) -> np.ndarray:
    return _shifted(image, pixels, method, fill, axis=1)


def translate_y(image: np.ndarray, pixels: float, method: int, fill: Fill) -> np.ndarray:
    return _shifted(image, pixels, method, fill, axis=0)


def translate_x_rel(image: np.ndarray, share: float, method: int, fill: Fill) -> np.ndarray:
    return translate_x(image, share * image.shape[1], method, fill)


def translate_y_rel(image: np.ndarray, share: float, method: int, fill: Fill) -> np.ndarray:
    return translate_y(image, share * image.shape[0], method, fill)


def rotate(image: np.ndarray, degrees: float, method: int, fill: Fill) -> np.ndarray:
    """Counter-clockwise about the centre."""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), method, fill)


def _affine(image: np.ndarray, inverse: tuple[float, ...], method: int, fill: Fill) -> np.ndarray:
    """`inverse` (a, b, c, d, e, f) as in Pillow: the pixel at (x, y) comes from (ax + by + c, dx + ey + f)."""
    a, b, c, d, e, f = inverse
    # Pillow counts from the corner of the first pixel, OpenCV from its centre.
    matrix = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    height, width = image.shape[:2]
    flags = method | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


def _shifted(image: np.ndarray, pixels: float, method: int, fill: Fill, *, axis: int) -> np.ndarray:
    """The pixel at x comes from x + pixels along the axis: a filter of four taps, ten times faster than a warp."""
    whole = math.floor(pixels)
    t = pixels - whole
    if method == cv2.INTER_LINEAR:
        taps = np.array([0, 1 - t, t, 0])
    else:  # Keys' cubic with a = -1, as in Pillow's transform
        taps = np.array([-t * (1 - t) ** 2, 1 - 2 * t**2 + t**3, t * (1 + t - t**2), -(t**2) * (1 - t)])
    side = image.shape[axis]
    first, last = max(0, math.ceil(-pixels - 0.5)), min(side, math.ceil(side - pixels - 0.5))
    if first >= last:  # only with an `mmax` beyond 10
        return np.full_like(image, fill)
    source = slice(first + whole + 1, last + whole + 1)
    if axis:
        padded = cv2.copyMakeBorder(image, 0, 0, 1, 1, cv2.BORDER_REPLICATE)
        moved = cv2.filter2D(padded, -1, taps[None], anchor=(1, 0), borderType=cv2.BORDER_REPLICATE)[:, source]
        return cv2.copyMakeBorder(moved, 0, 0, first, side - last, cv2.BORDER_CONSTANT, value=fill)
    padded = cv2.copyMakeBorder(image, 1, 1, 0, 0, cv2.BORDER_REPLICATE)
    moved = cv2.filter2D(padded, -1, taps[:, None], anchor=(0, 1), borderType=cv2.BORDER_REPLICATE)[source]
    return cv2.copyMakeBorder(moved, first, side - last, 0, 0, cv2.BORDER_CONSTANT, value=fill)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0..255."""
    tables = []
    for channel in cv2.split(image):
        low, high = cv2.minMaxLoc(channel)[:2]
        scale = 255 / (high - low) if high > low else 1.0
        tables.append(_LEVELS * scale - (low * scale if high > low else 0.0))
    return _looked_up(image, np.stack(tables, -1))


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel's histogram made flat, by Pillow's integer formula."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        tables.append((step // 2 + counts.cumsum() - counts) // step if step else _LEVELS)
    return _looked_up(image, np.stack(tables, -1))


def invert(image: np.ndarray) -> np.ndarray:
    return cv2.bitwise_not(image)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    return _looked_up(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, add: int) -> np.ndarray:
    return _looked_up(image, np.where(_LEVELS < 128, _LEVELS + add, _LEVELS))


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    return _looked_up(image, _LEVELS & ~(2 ** (8 - bits) - 1)) if bits < 8 else image


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _looked_up(image, _LEVELS * factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _looked_up(image, mean + factor * (_LEVELS - mean))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, 0)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from Pillow's SMOOTH by `factor`; the outermost pixels stay as they are."""
    smooth = np.ones((3, 3)) / 13
    smooth[1, 1] = 5 / 13
    kernel = (1 - factor) * smooth
    kernel[1, 1] += factor
    out = cv2.filter2D(image, -1, kernel)
    out[0], out[-1], out[:, 0], out[:, -1] = image[0], image[-1], image[:, 0], image[:, -1]
    return out


def gaussian_blur(image: np.ndarray, radius: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)


_LEVELS = np.arange(256)


def _looked_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table` [256] or one per channel [256, 3]: what each level becomes, cut off below the point as Pillow does."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8).reshape(1, 256, -1))


GEOMETRY: dict[str, Callable[[np.ndarray, float, int, Fill], np.ndarray]] = {
    "Rotate": rotate,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "TranslateXRel": translate_x_rel,
    "TranslateYRel": translate_y_rel,
}

PIXELS: dict[str, Callable[..., np.ndarray]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
    "Solarize": solarize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "ColorIncreasing": color,
    "Contrast": contrast,
    "ContrastIncreasing": contrast,
    "Brightness": brightness,
    "BrightnessIncreasing": brightness,
    "Sharpness": sharpness,
    "SharpnessIncreasing": sharpness,
    "Desaturate": color,
    "GaussianBlur": gaussian_blur,
}
