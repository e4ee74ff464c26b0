import io
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from mlc.data import transforms
from mlc.data.order import AUGMENT, ERASE, Draws
from mlc.data.transforms import (
    EvalTransform,
    TrainTransform,
    cut_out,
    erase,
    erase_box,
    normalize,
    parse_crop,
    random_box,
)
from shards.console import UserError


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


# Drawn by the first release, seed 7: a change here changes what every running experiment sees after a resume.
GOLDEN = {
    (640, 480): [(28, 49, 454, 389), (336, 90, 605, 314), (247, 119, 559, 438)],
    (384, 288): [(17, 29, 273, 233), (202, 54, 363, 188), (149, 71, 336, 263)],
    (60, 1000): [(0, 460, 60, 540)] * 3,
}


@pytest.mark.parametrize("size", GOLDEN)
def test_crops_are_the_same_for_ever(size, monkeypatch):
    chosen = []

    def recording(data, side, choose, **_):
        chosen.append(choose(size))
        return np.zeros((side, side, 3), np.uint8)

    monkeypatch.setattr(transforms, "decoded", recording)
    for p in range(3):
        TrainTransform(size=8)(b"", Draws(7, AUGMENT, p))
    assert chosen == GOLDEN[size]


def test_draws_are_spent_on_crop_flips_and_augmentation_in_that_order(photo):
    """A flip is what the draw after the crop's says; switching the augmentation on changes neither."""
    data = encoded(photo, "PNG")
    for p in range(20):
        draws = Draws(0, AUGMENT, p)
        plain = TrainTransform(size=32, hflip=0, vflip=0)(data, Draws(0, AUGMENT, p))
        random_box(photo.size, (0.08, 1.0), (3 / 4, 4 / 3), draws)
        across, down = draws.uniform() < 0.5, draws.uniform() < 0.5
        flipped = plain[:: -1 if down else 1, :: -1 if across else 1]
        assert np.array_equal(TrainTransform(size=32, vflip=0.5)(data, Draws(0, AUGMENT, p)), flipped)
        augmented = TrainTransform(size=32, vflip=0.5, aa="rand-m9-mstd0.5-inc1")(data, Draws(0, AUGMENT, p))
        expected = transforms.build_aa("rand-m9-mstd0.5-inc1", 32, TrainTransform(size=32).mean)(flipped.copy(), draws)
        assert np.array_equal(augmented, expected)


def test_colours_change_after_the_flips(photo):
    data = encoded(photo, "PNG")
    for p in range(20):
        plain = TrainTransform(size=32)(data, Draws(0, AUGMENT, p))
        jittered = TrainTransform(size=32, color_jitter=0.4)(data, Draws(0, AUGMENT, p))
        draws = Draws(0, AUGMENT, p)
        random_box(photo.size, (0.08, 1.0), (3 / 4, 4 / 3), draws)
        draws.uniform(), draws.uniform()
        assert np.array_equal(jittered, transforms.color_jitter(plain, draws, 0.4)) and (jittered != plain).any()


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


@pytest.mark.parametrize("side", [0.0, 0.3, 0.5, 1.0])
def test_cutout_blanks_a_square_around_a_uniform_centre(side):
    count, height, width = 4000, 24, 40
    position = torch.arange(count)
    whole = cut_out(torch.ones(count, 3, height, width), position, side=side, seed=1)
    halves = [cut_out(torch.ones(len(p), 3, height, width), p, side=side, seed=1) for p in position.split(1000)]
    assert torch.equal(whole, torch.cat(halves))
    if not side:
        assert whole.min() == 1
        return
    blank = (whole == 0).all(1)
    assert torch.equal(blank, (whole == 0).any(1)) and blank.any((1, 2)).all()
    for axis, length in ((1, height), (2, width)):
        size = int(side * length + 0.5)
        where = blank.any(3 - axis).float()  # [count, length]: one run of pixels, as long as it should be or cut off
        first, last = where.argmax(1), length - 1 - where.flip(1).argmax(1)
        assert torch.equal(where.sum(1).long(), last - first + 1)
        inside = (first > 0) & (last < length - 1)
        assert (where[inside].sum(1) == size).all()
        centres = (first + size // 2)[first > 0]  # uniform on what does not touch the near border
        counts = np.bincount(centres, minlength=length)[size // 2 + 1 :]
        assert len(counts) == 0 or stats.chisquare(counts).pvalue > 1e-4


def test_normalize_is_torchvisions():
    from torchvision.transforms.v2 import functional

    image = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = functional.normalize(image.float() / 255, mean, std)
    for order in (torch.contiguous_format, torch.channels_last):
        seen = normalize(image.contiguous(memory_format=order), mean, std)
        torch.testing.assert_close(seen, expected)
        assert seen.is_contiguous()


def test_squish_keeps_the_whole_picture_and_center_the_middle(photo):
    whole = EvalTransform(size=40)(encoded(photo, "PNG"))
    middle = EvalTransform(size=40, crop="center", crop_pct=1.0)(encoded(photo, "PNG"))
    assert whole[0, 0, 0] < 5 and whole[0, -1, 0] > 250
    assert (
        38 < middle[0, 0, 0] < 50 and 205 < middle[0, -1, 0] < 217
    )  # the outer 20 of 120 columns are cut on each side


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("make", [TrainTransform, EvalTransform])
def test_pad_shows_the_whole_picture_between_borders(photo, make, kind):
    options = {"hflip": 0} if make is TrainTransform else {}
    image = make(size=60, crop="pad", mean=(1.0, 0.5, 0.0), **options)(encoded(photo, kind), Draws(0, AUGMENT, 1))
    assert image.shape == (60, 60, 3)
    assert (image[:10] == (255, 128, 0)).all() and (image[50:] == (255, 128, 0)).all()  # 120 x 80 -> 60 x 40
    picture = image[10:50].astype(int)
    ideal = np.asarray(photo.resize((60, 40), Image.Resampling.BOX)).astype(int)
    assert np.abs(picture - ideal).max() < 9


def test_pad_is_timms_border_mode(photo):
    timms = create_transform((3, 48, 48), crop_mode="border", crop_pct=1.0, interpolation="bicubic", normalize=False)
    mean = (0.485, 0.456, 0.406)
    expected = np.asarray(timms(photo)).transpose(1, 2, 0).astype(int)
    seen = EvalTransform(size=48, crop="pad", mean=mean)(encoded(photo, "PNG")).astype(int)
    assert np.abs(seen - expected).max() <= 2


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (64, 64), (30, 20), (500, 400)])
def test_if_needed_cuts_only_what_is_too_long(size):
    """iMet: 20,000 x 300 scans are unrecognisable when squeezed."""
    width, height = size
    spots = set()
    for p in range(30):
        transform, draws = TrainTransform(size=32, crop="if-needed:2"), Draws(0, AUGMENT, p)
        left, upper, right, lower = transform._box(size, draws)
        assert (right - left, lower - upper) == (min(width, 64), min(height, 64))
        assert left >= 0 and upper >= 0 and right <= width and lower <= height
        spots.add((left, upper))
    assert len(spots) == 1 if max(size) <= 64 else len(spots) > 15
    middle = EvalTransform(size=32, crop="if-needed:2")._box(size)
    assert abs(middle[0] + middle[2] - width) <= 1 and abs(middle[1] + middle[3] - height) <= 1


@pytest.mark.parametrize("text", ["if-needed", "if-needed:0.5", "if-needed:x", "random", ""])
def test_unknown_crops_are_refused(text):
    with pytest.raises(UserError, match="use one of rrc, squish, center, pad, if-needed:K"):
        parse_crop(text)


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
