"""What augmentation does to pixels: RGB uint8 [H, W, 3] to the same shape, by OpenCV at a fraction of Pillow's cost.

The names and arguments are timm's; its pixels too, within rounding, except in turned and sheared pictures: OpenCV's
cubic is a little softer and its edge blends with the fill colour.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

Fill = tuple[int, ...]


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
    return shift_scale_rotate(image, 0, 0, 1, degrees, method, fill)


def shift_scale_rotate(
    image: np.ndarray, right: float, down: float, scale: float, degrees: float, method: int, fill: Fill
) -> np.ndarray:
    """Turned counter-clockwise and made larger by `scale` about the centre, then moved by shares of the sides."""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    to_x, to_y = x + right * image.shape[1], y + down * image.shape[0]  # where the centre goes
    inverse = (cos, -sin, x - cos * to_x + sin * to_y, sin, cos, y - sin * to_x - cos * to_y)
    return _affine(image, inverse, method, fill)


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


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """255 (x / 255)^exponent: below 1 lighter, above darker."""
    return _looked_up(image, np.rint(255 * (_LEVELS / 255) ** exponent))


def gaussian_noise(image: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Another normal number of `sigma` grey levels to each value of each channel."""
    noise = np.random.default_rng(seed).standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image + sigma * noise), 0, 255).astype(np.uint8)


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
