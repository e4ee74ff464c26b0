"""TrivialAugment against torchvision, operation by operation; the light policies against what they promise."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import InterpolationMode, TrivialAugmentWide, autoaugment, functional

from mlc.data import policies
from mlc.data.augment import build_aa
from mlc.data.order import AUGMENT, Draws
from mlc.data.pixels import gamma, gaussian_noise, shift_scale_rotate
from mlc.data.policies import LEVELS, POLICIES, TRIVIAL, at_magnitude

MEAN, FILL = (0.485, 0.456, 0.406), (124, 116, 104)
SPACE = TrivialAugmentWide()._augmentation_space(LEVELS)
# Turned, sheared and moved pictures differ by the filter at the old edge; the others by rounding.
EXACT = ("Identity", "TranslateX", "TranslateY", "Brightness", "Contrast", "Posterize", "Solarize", "Equalize")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.ascontiguousarray(load_sample_images().images[1][100:260, 200:360])


def test_operations_and_magnitudes_are_torchvisions():
    assert list(TRIVIAL) == list(SPACE)
    for name, (magnitudes, signed) in TRIVIAL.items():
        theirs, also_signed = SPACE[name]
        assert signed == also_signed and (magnitudes is None) == (theirs.ndim == 0)
        if magnitudes is not None:
            if name.startswith("Translate"):  # applied in whole pixels; one of its float32 is 15.999999
                theirs = (theirs + 1e-5).int()
            np.testing.assert_allclose(magnitudes, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRIVIAL)
def test_pixels_are_torchvisions(image, name):
    magnitudes, signed = TRIVIAL[name]
    chosen = [0.0] if magnitudes is None else [magnitudes[level].item() for level in (0, 7, 15, 22, 30)]
    for magnitude in [*chosen, *([-value for value in chosen] if signed else [])]:
        seen = at_magnitude(name, image, magnitude, FILL).astype(int)
        expected = autoaugment._apply_op(Image.fromarray(image), name, magnitude, InterpolationMode.BILINEAR, FILL)
        distance = np.abs(seen - np.asarray(expected).astype(int))
        if name in ("ShearX", "ShearY", "Rotate"):
            assert distance.mean() < 1.5 and (distance > 2).mean() < 5 / len(image), magnitude
        else:
            assert distance.max() <= (0 if name in EXACT else 2), magnitude


def test_operations_are_drawn_as_often_and_at_every_magnitude(image, monkeypatch):
    drawn = []
    monkeypatch.setattr(policies, "at_magnitude", lambda name, image, magnitude, fill: drawn.append((name, magnitude)))
    for position in range(20_000):
        build_aa("trivial", 160, MEAN)(image, Draws(0, AUGMENT, position))
    names = [name for name, _ in drawn]
    assert stats.chisquare([names.count(name) for name in TRIVIAL]).pvalue > 1e-4
    for name, (magnitudes, signed) in TRIVIAL.items():
        seen = {magnitude for own, magnitude in drawn if own == name}
        expected = {0.0} if magnitudes is None else {float(value) for value in magnitudes}
        assert seen == expected | ({-value for value in expected} if signed else set())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_draws_give_the_same_pixels(image, policy):
    kept, transform = image.copy(), build_aa(policy, 160, MEAN)
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1]
    views = [[transform(image, Draws(0, AUGMENT, p)) for p in range(40)] for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*views, strict=True)) and np.array_equal(image, kept)
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in views[0])
    assert len({view.tobytes() for view in views[0]}) > 20
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_the_light_policies_are_light():
    """A flat picture keeps its colour but for brightness and noise; an eighth and a sixteenth of all stay as they
    are."""
    flat = np.full((64, 64, 3), FILL, np.uint8)
    for policy, whole in (("imet-first", 1 / 8), ("imet-second", 1 / 16)):
        image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        transform, n = build_aa(policy, 64, MEAN), 2000
        same = sum(np.array_equal(transform(image, Draws(0, AUGMENT, p)), image) for p in range(n))
        assert stats.binomtest(same, n, whole).pvalue > 1e-4
        for p in range(50):
            change = transform(flat, Draws(1, AUGMENT, p)).mean((0, 1)) / FILL
            assert (change > 0.6).all() and (change < 1.5).all()


@pytest.mark.parametrize("right, down, scale, degrees", [(0.1, -0.05, 1.1, 20), (0, 0, 0.9, 0), (0.25, 0.5, 1, 0)])
def test_shift_scale_rotate_is_opencvs_matrix(image, right, down, scale, degrees):
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    matrix[:, 2] += right * width, down * height
    expected = cv2.warpAffine(image, matrix, (width, height), borderValue=FILL).astype(int)
    seen = shift_scale_rotate(image, right, down, scale, degrees, cv2.INTER_LINEAR, FILL).astype(int)
    assert np.abs(seen - expected).mean() < 0.1


def test_gamma_and_noise_have_their_moments():
    assert gamma(np.uint8([[[0, 64, 255]]]), 0.5).tolist() == [[[0, 128, 255]]]
    noisy = gaussian_noise(np.full((200, 200, 3), 128, np.uint8), 5.0, 7).astype(float) - 128
    assert abs(noisy.mean()) < 0.1 and abs(noisy.std() - 5) < 0.1
    assert not np.array_equal(gaussian_noise(np.zeros((8, 8, 3), np.uint8), 5.0, 8), noisy[:8, :8])


def test_the_names_are_in_the_message_about_an_unknown_one():
    from shards.console import UserError

    with pytest.raises(UserError, match="one of ours: trivial, imet-first, imet-second"):
        build_aa("triviall", 32, MEAN)


@pytest.mark.parametrize("most", [0.2, 1.5])
def test_color_jitter_is_torchvisions(image, most):
    """The same factors in the same order, within the rounding of three steps."""
    theirs = {"brightness": functional.adjust_brightness, "contrast": functional.adjust_contrast}
    theirs["color"] = functional.adjust_saturation
    orders = set()
    for place in range(40):
        draws = Draws(3, 1, place)
        order = policies.JITTER[draws.integer(6)]
        orders.add(order)
        expected = Image.fromarray(image)
        for change in order:
            factor = draws.uniform(max(0.0, 1 - most), 1 + most)
            assert max(0.0, 1 - most) <= factor <= 1 + most
            expected = theirs[change.__name__](expected, factor)
        found = policies.color_jitter(image, Draws(3, 1, place), most)
        assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).mean() < 1.5
    assert len(orders) == 6
