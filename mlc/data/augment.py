"""RandAugment, AutoAugment and 3-Augment on uint8 arrays: timm's policies at a fraction of Pillow's cost.

The policies themselves (which operations, probabilities, magnitudes, weights) are timm's objects, built by timm from
the same string; only the dice and the pixels (mlc/data/pixels.py) are ours. The dice come from `Draws`, so that an
augmented picture depends on (seed, position) and nothing else; the distribution is timm's. AugMix runs in timm itself;
what timm does not have is in mlc/data/policies.py.
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
from mlc.data.pixels import GEOMETRY, PIXELS, gaussian_blur
from mlc.data.policies import POLICIES
from shards.console import UserError

Augment = Callable[[np.ndarray, Draws], np.ndarray]


@lru_cache(maxsize=8)
def build_aa(policy: str, size: int, mean: tuple[float, ...]) -> Augment:
    """timm's policy for a string such as `rand-m9-mstd0.5-inc1`, `original`, `3a`, `augmix-m5-w4`, or ours of that
    name.

    Args:
        size: side of the pictures in pixels, for the absolute translations.
        mean: of the normalisation, 0 to 1; its colour fills what a picture moved away from.
    Returns:
        (RGB uint8 [size, size, 3], draws) -> the same shape. As in timm without `--train-interpolation`, every
        geometric operation draws bilinear or bicubic.
    Raises:
        UserError: a policy that timm cannot parse.
    """
    if policy in POLICIES:
        return partial(POLICIES[policy], fill=_fill(mean))
    try:
        made = _timms(policy, size, mean)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"--aa {policy}: timm does not know this policy ({error}); e.g. rand-m9-mstd0.5-inc1, or one of ours: "
            f"{', '.join(POLICIES)}; `--aa=` for none"
        ) from error
    if isinstance(made, auto_augment.RandAugment):
        return partial(_rand_augment, made)
    return partial(_auto_augment if isinstance(made, auto_augment.AutoAugment) else _by_timm, made)


def _timms(policy: str, size: int, mean: tuple[float, ...]):
    hparams = {"translate_const": int(size * 0.45), "img_mean": _fill(mean)}
    if policy.startswith("rand"):
        return auto_augment.rand_augment_transform(policy, hparams)
    if policy.startswith("augmix"):
        return auto_augment.augment_and_mix_transform(policy, {**hparams, "translate_pct": 0.3})
    return auto_augment.auto_augment_transform(policy, hparams)


def _fill(mean: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(min(255, round(255 * m)) for m in mean)


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
