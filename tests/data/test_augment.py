"""Against timm: every operation's pixels at fixed arguments, and the distribution of operations and arguments."""

import random
from collections import defaultdict

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import auto_augment

from mlc.data import augment
from mlc.data.augment import build_aa
from mlc.data.order import AUGMENT, Draws
from shards.console import UserError

MEAN, FILL = (0.485, 0.456, 0.406), (124, 116, 104)
GEOMETRIC = {
    "Rotate": (30, -17, 0),
    "ShearX": (0.3, -0.1),
    "ShearY": (0.3, -0.1),
    "TranslateX": (50.3, -20.7, 0.6, -0.4, 90, 400),
    "TranslateY": (50.3, -20.7, 0.6, -0.4, 90, -400),
    "TranslateXRel": (0.45, -0.1, 0.002),
    "TranslateYRel": (0.45, -0.1, 0.002),
}
PIXELWISE = {
    "AutoContrast": ((),),
    "Equalize": ((),),
    "Invert": ((),),
    "Posterize": ((0,), (1,), (4,), (8,)),
    "Solarize": ((0,), (26,), (128,), (256,)),
    "SolarizeAdd": ((0,), (99,), (110,)),
    "Color": ((0.1,), (1.0,), (1.9,)),
    "Contrast": ((0.1,), (1.9,)),
    "Brightness": ((0.1,), (1.9,)),
    "Sharpness": ((0.1,), (1.9,)),
    "GaussianBlur": ((0.1,), (0.5,), (1.0,), (2.0,)),
}
POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m7-n3-p0.7",
    "rand-m8-mstd101-inc1-t3a",
    "rand-m6-mstd1-n2-tweights",
    "rand-m20-mmax30-mstd3-inc1",
    "original-mstd0.5",
    "v0",
    "v0r",
    "3a",
]


@pytest.fixture(scope="module", params=["photo", "flat", "gray ramp"])
def image(request) -> np.ndarray:
    if request.param == "photo":
        return np.ascontiguousarray(load_sample_images().images[1][100:260, 200:360])
    if request.param == "flat":
        return np.full((40, 40, 3), 90, np.uint8)
    return np.repeat(np.linspace(40, 200, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_is_timms(image, name, method):
    """Within two grey levels, but for the line along the picture's old edge and the softness of OpenCV's cubic."""
    ours, theirs = {
        "bilinear": (cv2.INTER_LINEAR, Image.Resampling.BILINEAR),
        "bicubic": (cv2.INTER_CUBIC, Image.Resampling.BICUBIC),
    }[method]
    for value in GEOMETRIC[name]:
        seen = augment.GEOMETRY[name](image, value, ours, FILL).astype(int)
        op = auto_augment.NAME_TO_OP[name]
        expected = np.asarray(op(Image.fromarray(image), value, resample=theirs, fillcolor=FILL)).astype(int)
        distance = np.abs(seen - expected)
        if name.startswith("Translate"):
            assert distance.max() <= 1, value
        else:
            edge = 3 / image.shape[0]
            assert distance.mean() < 1.5 and (distance > 2).mean() < (edge if method == "bilinear" else 0.1), value


@pytest.mark.parametrize("name", PIXELWISE)
def test_pixels_are_timms(image, name):
    for arguments in PIXELWISE[name]:
        seen = augment.PIXELS[name](image, *arguments).astype(int)
        expected = np.asarray(auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments)).astype(int)
        distance = np.abs(seen - expected)
        if name == "GaussianBlur":  # Pillow approaches the bell by boxes
            assert distance.mean() < 0.8 and distance.max() <= 24, arguments
        else:
            assert distance.max() <= (2 if name in ("Color", "Sharpness") else 0), arguments


def test_desaturating_is_timms(image):
    for factor in (0.5, 0.8, 1.0):
        expected = auto_augment.desaturate(Image.fromarray(image), factor)
        seen = augment.PIXELS["Desaturate"](image, 1 - factor)
        assert np.abs(seen.astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("name", auto_augment.LEVEL_TO_ARG)
def test_magnitudes_mean_what_they_mean_to_timm(name):
    """Every operation timm knows, both outcomes of its coin; 30 tries miss one outcome with a chance of 2 ** -29."""
    if (function := auto_augment.LEVEL_TO_ARG[name]) is None:
        assert name not in augment.ARGUMENTS and name in augment.PIXELS
        return
    op = auto_augment.AugmentOp(name, hparams={"translate_const": 45, "img_mean": FILL})
    for level in (0, 0.3, 2.5, 5, 7.77, 9, 10):
        theirs = {function(level, op.hparams)[0] for _ in range(30)}
        if name == "Desaturate":
            theirs = {1 - share for share in theirs}
        ours = {augment.argument(op, level, negate) for negate in (False, True)}
        assert sorted(ours) == pytest.approx(sorted(theirs))


def our_draws(policy: str, n: int, monkeypatch) -> list[list[tuple]]:
    """[(name, argument, ...), ...] of each of n images, without the pixels."""
    seen: list[list[tuple]] = []

    def recorder(name):
        def record(image, *arguments):
            seen[-1].append((name, *arguments))
            return image

        return record

    for table in (augment.GEOMETRY, augment.PIXELS):
        for name in table:
            monkeypatch.setitem(table, name, recorder(name))
    monkeypatch.setattr(augment, "gaussian_blur", recorder("GaussianBlurRand"))
    image, transform = np.zeros((100, 100, 3), np.uint8), build_aa(policy, 100, MEAN)
    for position in range(n):
        seen.append([])
        transform(image, Draws(0, AUGMENT, position))
    return seen


def timms_draws(policy: str, n: int) -> list[list[tuple]]:
    made = augment._timms(policy, 100, MEAN)
    seen: list[list[tuple]] = []

    def recorder(name):
        def record(image, *arguments, resample, fillcolor):
            assert fillcolor == FILL
            if name == "GaussianBlurRand":
                arguments = (random.uniform(0.1, 2.0 * arguments[0]),)
            if name == "Desaturate":
                arguments = (min(1.0, max(0.0, 1 - arguments[0])),)
            geometric = (random.choice(resample),) if name in GEOMETRIC else ()
            seen[-1].append((name, *arguments, *geometric))
            return image

        return record

    for op in made.ops if isinstance(made, auto_augment.RandAugment) else [op for ops in made.policy for op in ops]:
        op.aug_fn = recorder(op.name)
    random.seed(0)
    np.random.seed(0)
    for _ in range(n):
        seen.append([])
        made(None)
    return seen


def same_counts(ours: list, theirs: list) -> float:
    """p value of a chi-square test that two lists of names come from one distribution; rare names are put together."""
    both = defaultdict(lambda: [0, 0])
    for side, names in enumerate((ours, theirs)):
        for name in names:
            both[name][side] += 1
    table = [counts for counts in both.values() if sum(counts) >= 20]
    rest = np.sum([counts for counts in both.values() if sum(counts) < 20], axis=0)
    table += [rest] if np.sum(rest) >= 20 else []
    return stats.chi2_contingency(np.transpose(table)).pvalue if len(table) > 1 else 1.0


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_arguments_are_distributed_as_timms(policy, monkeypatch):
    ours, theirs = our_draws(policy, 5000, monkeypatch), timms_draws(policy, 5000)
    assert same_counts([len(ops) for ops in ours], [len(ops) for ops in theirs]) > 1e-5
    assert same_counts([op[0] for ops in ours for op in ops], [op[0] for ops in theirs for op in ops]) > 1e-5
    assert (
        same_counts([" ".join(op[0] for op in ops) for ops in ours], [" ".join(op[0] for op in ops) for ops in theirs])
        > 1e-5
    )
    arguments = [defaultdict(list), defaultdict(list)]
    for side, images in enumerate((ours, theirs)):
        for name, *values in (op for ops in images for op in ops):
            if values:
                arguments[side][name].append(values[0])
    for name, values in arguments[0].items():
        if len(values) > 50:
            assert stats.ks_2samp(values, arguments[1][name]).pvalue > 1e-5, name


def test_geometry_draws_its_filter_and_has_the_fill_colour(monkeypatch):
    drawn = [op for ops in our_draws("rand-m9-inc1", 2000, monkeypatch) for op in ops if op[0] in GEOMETRIC]
    cubic = sum(op[2] == cv2.INTER_CUBIC for op in drawn)
    assert stats.binomtest(cubic, len(drawn)).pvalue > 1e-4 and {op[3] for op in drawn} == {FILL}


@pytest.mark.parametrize("policy", [*POLICIES, "augmix-m5-w4"])
def test_the_same_draws_give_the_same_pixels(policy):
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    kept, transform = image.copy(), build_aa(policy, 48, MEAN)
    views = [[transform(image, Draws(0, AUGMENT, p)) for p in range(30)] for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*views, strict=True)) and np.array_equal(image, kept)
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in views[0])
    assert len({view.tobytes() for view in views[0]}) > 3


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4"])
def test_global_generators_are_left_alone(policy):
    states = []
    for augmented in (False, True):
        random.seed(1)
        np.random.seed(1)
        if augmented:
            build_aa(policy, 32, MEAN)(np.zeros((32, 32, 3), np.uint8), Draws(0, AUGMENT, 5))
        states.append((random.random(), np.random.rand()))
    assert states[0] == states[1]


@pytest.mark.parametrize("policy", ["rand-x9", "nonsense", "3b", "augmix-q2"])
def test_an_unknown_policy_is_named(policy):
    with pytest.raises(UserError, match=f"--aa {policy}: .* e.g. rand-m9"):
        build_aa(policy, 32, MEAN)
