"""Augmentation policies that timm does not have: TrivialAugment, which has nothing to tune, and the light ones of two
iMet winners, for pictures whose colours and shapes are what the labels are about.

`(image, draws, fill) -> image`: RGB uint8 [H, W, 3]; every choice comes from `Draws`; `fill` is the colour of what a
picture moved away from, and geometry is bilinear.
"""

from collections.abc import Callable
from itertools import permutations

import cv2
import numpy as np

from mlc.data.order import Draws
from mlc.data.pixels import (
    GEOMETRY,
    PIXELS,
    Fill,
    brightness,
    color,
    contrast,
    gamma,
    gaussian_noise,
    rotate,
    shift_scale_rotate,
)

LEVELS = 31
JITTER = tuple(permutations((brightness, contrast, color)))
_UP = np.linspace(0, 1, LEVELS)

# Operation: (its 31 magnitudes, whether the sign is drawn as well), as torchvision's TrivialAugmentWide has them.
TRIVIAL: dict[str, tuple[np.ndarray | None, bool]] = {
    "Identity": (None, False),
    "ShearX": (0.99 * _UP, True),
    "ShearY": (0.99 * _UP, True),
    "TranslateX": ((32 * np.arange(LEVELS)) // (LEVELS - 1), True),  # whole pixels
    "TranslateY": ((32 * np.arange(LEVELS)) // (LEVELS - 1), True),
    "Rotate": (135 * _UP, True),
    "Brightness": (0.99 * _UP, True),
    "Color": (0.99 * _UP, True),
    "Contrast": (0.99 * _UP, True),
    "Sharpness": (0.99 * _UP, True),
    "Posterize": (8 - np.rint(6 * _UP).astype(int), False),
    "Solarize": (255 * _UP[::-1], False),
    "AutoContrast": (None, False),
    "Equalize": (None, False),
}


def trivial(image: np.ndarray, draws: Draws, fill: Fill) -> np.ndarray:
    """TrivialAugment (Mueller and Hutter 2021), wide: one operation, each as likely, at one of 31 magnitudes."""
    name = list(TRIVIAL)[draws.integer(len(TRIVIAL))]
    magnitudes, signed = TRIVIAL[name]
    magnitude = 0.0 if magnitudes is None else magnitudes[draws.integer(LEVELS)].item()
    return at_magnitude(name, image, -magnitude if signed and draws.uniform() < 0.5 else magnitude, fill)


def at_magnitude(name: str, image: np.ndarray, magnitude: float, fill: Fill) -> np.ndarray:
    """An operation of TRIVIAL."""
    if name == "Identity":
        return image
    if name in GEOMETRY:
        magnitude = -magnitude if name.startswith("Translate") else magnitude  # ours says where a pixel comes from
        return GEOMETRY[name](image, magnitude, cv2.INTER_LINEAR, fill)
    if TRIVIAL[name][0] is None:
        return PIXELS[name](image)
    return PIXELS[name](image, 1 + magnitude if TRIVIAL[name][1] else magnitude)


def color_jitter(image: np.ndarray, draws: Draws, most: float) -> np.ndarray:
    """torchvision's ColorJitter(most, most, most): brightness, contrast and saturation by factors from 1 - most (at
    least 0) to 1 + most, in random order."""
    order = JITTER[draws.integer(len(JITTER))]
    for change in order:
        image = change(image, draws.uniform(max(0.0, 1 - most), 1 + most))
    return image


def imet_first(image: np.ndarray, draws: Draws, fill: Fill) -> np.ndarray:
    """The kinds of the first place of iMet 2019, in ranges of ours: each with probability 1/2, brightness or contrast
    by up to 20 %; shift by up to 6.25 %, scale by 10 % and rotation by 15 degrees; noise of 3 to 7 grey levels."""
    if draws.uniform() < 0.5:
        change = brightness if draws.uniform() < 0.5 else contrast
        image = change(image, draws.uniform(0.8, 1.2))
    if draws.uniform() < 0.5:
        right, down = draws.uniform(-1 / 16, 1 / 16), draws.uniform(-1 / 16, 1 / 16)
        scale, degrees = draws.uniform(0.9, 1.1), draws.uniform(-15, 15)
        image = shift_scale_rotate(image, right, down, scale, degrees, cv2.INTER_LINEAR, fill)
    if draws.uniform() < 0.5:
        image = gaussian_noise(image, draws.uniform(3, 7), draws.bits())
    return image


def imet_second(image: np.ndarray, draws: Draws, fill: Fill) -> np.ndarray:
    """The kinds of the second place of iMet 2019, in ranges of ours: each with probability 1/2, rotation by up to 15
    degrees, gamma of 0.8 to 1.25, brightness and contrast by up to 20 %."""
    if draws.uniform() < 0.5:
        image = rotate(image, draws.uniform(-15, 15), cv2.INTER_LINEAR, fill)
    if draws.uniform() < 0.5:
        image = gamma(image, 1.25 ** draws.uniform(-1, 1))
    if draws.uniform() < 0.5:
        image = brightness(image, draws.uniform(0.8, 1.2))
    if draws.uniform() < 0.5:
        image = contrast(image, draws.uniform(0.8, 1.2))
    return image


POLICIES: dict[str, Callable[[np.ndarray, Draws, Fill], np.ndarray]] = {
    "trivial": trivial,
    "imet-first": imet_first,
    "imet-second": imet_second,
}
