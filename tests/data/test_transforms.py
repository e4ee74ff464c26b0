import io
import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from mlc.data import transforms
from mlc.data.order import AUGMENT, ERASE, Draws
from mlc.data.transforms import EvalTransform, TrainTransform, erase, erase_box, normalize, random_box, upright
from shards.image import open_image


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth picture whose red grows to the right and green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, 120), np.linspace(0, 255, 80))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], -1).astype(np.uint8))


def test_the_same_position_gives_the_same_pixels(photo):
    transform = TrainTransform(size=32, aa="rand-m9-mstd0.5-inc1", vflip=0.5)
    data = encoded(photo)
    views = [transform(data, Draws(0, AUGMENT, 5)) for _ in range(2)]
    others = [transform(data, Draws(0, AUGMENT, p)) for p in range(6, 12)]
    assert np.array_equal(*views) and not any(np.array_equal(views[0], other) for other in others)
    assert views[0].shape == (32, 32, 3) and views[0].dtype == np.uint8


def test_global_generators_are_left_alone(photo):
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    TrainTransform(size=32, aa="rand-m9-mstd0.5-inc1")(encoded(photo), Draws(0, AUGMENT, 5))
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("size", [(500, 300), (300, 500), (1000, 60), (60, 1000)])
def test_crops_are_distributed_as_timms(size):
    """Kolmogorov-Smirnov on area and left edge of 3,000 crops each, also of very long images."""
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([random_box(size, scale, ratio, Draws(0, AUGMENT, p)) for p in range(3000)])
    image = Image.new("L", size)
    theirs = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(3000)]
    )  # top, left, h, w
    area = (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1])
    assert stats.ks_2samp(area, theirs[:, 2] * theirs[:, 3]).pvalue > 1e-4
    assert stats.ks_2samp(ours[:, 0], theirs[:, 1]).pvalue > 1e-4
    assert ours.min() >= 0 and (ours[:, 2] <= size[0]).all() and (ours[:, 3] <= size[1]).all()


def test_erase_boxes_are_distributed_as_timms():
    ours = [erase_box(64, 64, Draws(0, ERASE, p)) for p in range(3000)]
    areas = []
    with patch("torch.empty", side_effect=lambda *a, **k: torch.zeros(*a, **k)):
        for _ in range(1500):
            image = torch.ones(1, 64, 64)
            RandomErasing(probability=1, mode="const", device="cpu")(image)
            areas.append(int((image == 0).sum()))
    assert stats.ks_2samp([h * w for _, _, h, w in ours], areas).pvalue > 1e-4


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_depends_on_the_position_alone(mode):
    position = torch.arange(100, 116)
    whole = erase(torch.ones(16, 3, 24, 24), position, prob=0.5, mode=mode, seed=1)
    parts = torch.cat([erase(torch.ones(4, 3, 24, 24), p, prob=0.5, mode=mode, seed=1) for p in position.split(4)])
    assert torch.equal(whole, parts)
    touched = (whole != 1).flatten(1).any(1)
    assert 2 <= touched.sum() <= 14
    if mode == "const":
        assert set(whole.unique().tolist()) == {0.0, 1.0}


def test_normalize_is_torchvisions():
    from torchvision.transforms.v2 import functional

    image = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(normalize(image, mean, std), functional.normalize(image.float() / 255, mean, std))


def test_squish_keeps_the_whole_picture_and_center_the_middle(photo):
    whole = EvalTransform(size=40)(encoded(photo, "PNG"))
    middle = EvalTransform(size=40, crop="center", crop_pct=1.0)(encoded(photo, "PNG"))
    assert whole[0, 0, 0] < 5 and whole[0, -1, 0] > 250
    assert (
        38 < middle[0, 0, 0] < 50 and 205 < middle[0, -1, 0] < 217
    )  # the outer 20 of 120 columns are cut on each side


def test_draft_decoding_stays_close_to_the_full_decode():
    """A large JPEG is decoded at a fraction of its size: the same picture within a few grey levels."""
    x = np.linspace(0, 6, 960)
    smooth = (127 + 120 * np.sin(x)[None, :] * np.cos(x)[:720, None]).astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([smooth] * 3, -1)), quality=95)
    fast = EvalTransform(size=48)(data).astype(int)
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((48, 48), Image.Resampling.BICUBIC)).astype(
        int
    )
    assert np.abs(fast - full).mean() < 2


def test_exif_orientation_is_obeyed(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = upright(open_image(encoded(photo, exif=exif)))
    assert turned.size == (80, 120)
    reference = EvalTransform(size=24)(encoded(photo.transpose(Image.Transpose.ROTATE_270), quality=95)).astype(int)
    seen = EvalTransform(size=24)(encoded(photo, exif=exif, quality=95)).astype(int)
    assert np.abs(seen - reference).mean() < 3


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
    ],
)
def test_every_kind_of_image_becomes_rgb(photo, mode, kind):
    image = photo.convert("L").convert("I").convert("I;16") if mode == "I;16" else photo.convert(mode)
    pixels = TrainTransform(size=16)(encoded(image, kind), Draws(0, AUGMENT, 0))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8


def test_transparent_pixels_are_white():
    pixels = EvalTransform(size=8)(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"))
    assert (pixels == 255).all()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m5-w4"])
def test_timms_policies_run(photo, policy):
    transforms._policies.clear()
    assert TrainTransform(size=24, aa=policy)(encoded(photo), Draws(0, AUGMENT, 1)).shape == (24, 24, 3)
