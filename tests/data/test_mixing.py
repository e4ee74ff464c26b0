import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data import mixup as timms
from torchvision.transforms.v2 import functional

from mlc.config import Config
from mlc.data.batch import prepare
from mlc.data.mixing import GRIDS, Mix, cut_box, draw_mix, swap_pairs, together

MEAN = STD = (0.5, 0.5, 0.5)


def drawn(position, size=(32, 32), **settings) -> Mix:
    return draw_mix(position, Config(**settings), *size)


def pictures(count: int, height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, height, width, generator=generator)
    return image, (torch.rand(count, 5, generator=generator) > 0.6).float()


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_lambda_is_beta_distributed_and_shared_by_partners():
    lam = drawn(torch.arange(20_000), mixup=0.4, seed=3).lam
    assert torch.equal(lam[0::2], lam[1::2])
    assert stats.kstest(lam[0::2].numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-4


def test_boxes_have_a_beta_distributed_area_and_a_uniform_centre():
    side, position = 100_000, torch.arange(20_000)
    mix, lam = drawn(position, (side, side), cutmix=0.4, seed=3), drawn(position, mixup=0.4, seed=3).lam
    assert torch.equal(mix.lam[0::2], mix.lam[1::2]) and torch.equal(mix.boxes[0::2], mix.boxes[1::2])
    top, left, bottom, right = mix.boxes[0::2].T.numpy()
    inside = (top > 0) & (left > 0) & (bottom < side) & (right < side)
    np.testing.assert_allclose(mix.lam[0::2][inside], lam[0::2][inside], atol=1e-4)  # the lambdas mixup would draw
    small = inside & (bottom - top < side / 10) & (bottom > top)
    for middle in ((top + bottom)[small] / 2, (left + right)[small] / 2):
        middle = middle[(middle > side / 10) & (middle < side * 9 / 10)]
        assert stats.kstest(middle, stats.uniform(side / 10, side * 8 / 10).cdf).pvalue > 1e-4


def test_boxes_are_timms(monkeypatch):
    generator = np.random.default_rng(0)
    lam, down, across = generator.uniform(size=(3, 300))
    height, width = 37, 64
    boxes, true = cut_box(lam, down, across, height, width)
    for one, y, x, box, left in zip(lam, down, across, boxes, true, strict=True):
        centres = iter((int(y * height), int(x * width)))
        monkeypatch.setattr(timms.np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        (yl, yh, xl, xh), expected = timms.cutmix_bbox_and_lam((3, height, width), one)
        assert box.tolist() == [yl, xl, yh, xh] and left == pytest.approx(expected)


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_share_of_mixed_pairs(prob):
    lam = drawn(torch.arange(20_000), mixup=1.0, mixup_prob=prob, seed=0).lam
    assert abs((lam < 1).float().mean().item() - prob) < 0.02


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_share_of_cutmix(switch):
    found = drawn(torch.arange(20_000), mixup=1.0, cutmix=1.0, mixup_switch_prob=switch).described()
    assert abs(sum(how == "cutmix" for how, *_ in found) / len(found) - switch) < 0.03  # a box may be empty
    assert sum(how == "mixup" for how, *_ in found) == pytest.approx((1 - switch) * 20_000, abs=400)


def test_mixup_against_its_formula():
    image, target = pictures(6)
    lam = torch.tensor([0.3, 0.3, 1.0, 1.0, 0.8, 0.8])
    mix = Mix(lam, torch.zeros(6, 4, dtype=torch.int64))
    mixed, soft = mix.image(image), mix.labels(target)
    for own, partner in ((0, 1), (1, 0), (2, 3), (5, 4)):
        share = lam[own]
        torch.testing.assert_close(mixed[own], share * image[own] + (1 - share) * image[partner])
        torch.testing.assert_close(soft[own], share * target[own] + (1 - share) * target[partner])
    assert torch.equal(mixed[2], image[2])


@pytest.mark.parametrize("rule", ["convex", "union"])
def test_mixup_and_cutmix_against_loops(rule):
    image, target = pictures(40, 20, 30)
    mix = drawn(torch.arange(40), (20, 30), mixup=0.8, cutmix=1.0, mixup_prob=0.8, mix_labels=rule)
    mixed, soft, found = mix.image(image), mix.labels(target), mix.described()
    assert {how for how, *_ in found} == {None, "mixup", "cutmix"}
    for place, (how, partners, share) in enumerate(found):
        expected = image[place].clone()
        if how is None:
            assert share == 1 and torch.equal(mixed[place], expected) and torch.equal(soft[place], target[place])
            continue
        other = image[place ^ 1]
        assert partners == [place ^ 1]
        if how == "cutmix":
            top, left, bottom, right = mix.boxes[place].tolist()
            for y, x in itertools.product(range(top, bottom), range(left, right)):
                expected[:, y, x] = other[:, y, x]
            assert share == pytest.approx((expected == image[place]).float().mean().item(), abs=1e-6)
        else:
            expected = share * expected + (1 - share) * other
        torch.testing.assert_close(mixed[place], expected)
        own, others = target[place], target[place ^ 1]
        labels = torch.maximum(own, others) if rule == "union" else share * own + (1 - share) * others
        torch.testing.assert_close(soft[place], labels)


def test_swap_pairs():
    assert swap_pairs(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert np.array_equal(swap_pairs(swap_pairs(torch.arange(8))), np.arange(8))


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
def test_grids_against_loops(size):
    count = 64
    image, target = pictures(count, *size)
    mix = drawn(torch.arange(count), size, splicemix=0.6, mixup=0.5)
    mixed, soft, seen = mix.image(image), mix.labels(target), set()
    for place, (how, sources, share) in enumerate(mix.described()):
        if how in (None, "mixup"):
            continue
        seen.add(how)
        rows, columns = map(int, how.removeprefix("splicemix ").split("x"))
        assert len(set(sources)) == rows * columns == len(sources)
        assert {source // 4 for source in sources} == {place // 4}
        assert share == (place in sources) / len(sources)
        labels, cells = torch.zeros(5), iter(sources)
        for row, column in itertools.product(range(rows), range(columns)):
            source = next(cells)
            top, left = row * (size[0] // rows), column * (size[1] // columns)
            height = size[0] - top if row == rows - 1 else size[0] // rows
            width = size[1] - left if column == columns - 1 else size[1] // columns
            small = functional.resize(image[source], [height, width], antialias=True)
            torch.testing.assert_close(mixed[place][:, top : top + height, left : left + width], small)
            labels = torch.maximum(labels, target[source])
        assert torch.equal(soft[place], labels)
    assert seen == {f"splicemix {rows}x{columns}" for rows, columns in GRIDS}


def test_four_samples_share_their_fate_and_every_choice_comes():
    found = drawn(torch.arange(40_000), splicemix=0.3).described()
    spliced = np.array([how is not None for how, *_ in found]).reshape(-1, 4)
    assert (spliced == spliced[:, :1]).all() and abs(spliced.mean() - 0.3) < 0.02
    kinds = [how for how, *_ in found if how]
    assert stats.chisquare([kinds.count(kind) for kind in set(kinds)]).pvalue > 1e-4 and len(set(kinds)) == 3
    orders = [tuple(source % 4 for source in sources) for how, sources, _ in found if how == "splicemix 2x2"]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == len(orders) and stats.chisquare(counts).pvalue > 1e-4


# ---- any division of a batch -----------------------------------------------------------------------------------------

ALL = {"mixup": 0.4, "cutmix": 1.0, "splicemix": 0.5, "mixup_prob": 0.9}


@pytest.mark.parametrize(
    "settings, sizes",
    [({"mixup": 0.4}, (8, 4, 2)), ({"mixup": 0.4, "cutmix": 1.0}, (8, 4, 2)), (ALL, (16, 8, 4))],
)
def test_the_same_mixed_samples_in_any_division_and_again(settings, sizes):
    config, other = Config(**settings, cutout=0.3), Config(**settings, cutout=0.3, seed=43)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randint(256, (64, 3, 18, 18), dtype=torch.uint8, generator=generator),
        "target": torch.rand(64, 5, generator=generator),
        "position": torch.arange(4000, 4064),
    }

    def divided(size: int, config: Config):
        parts = [{name: tensor[first : first + size] for name, tensor in batch.items()} for first in range(0, 64, size)]
        found = [prepare(part, config, MEAN, STD, mixing=True) for part in parts]
        shares = torch.cat([mix.lam for *_, mix in found])
        return torch.cat([image for image, *_ in found]), torch.cat([target for _, target, _ in found]), shares

    whole = divided(64, config)
    for size in sizes:
        for expected, seen in zip(whole, divided(size, config), strict=True):
            torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert not torch.equal(whole[2], divided(64, other)[2])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 1),
        ({"mixup": 0.1}, 2),
        ({"cutmix": 1.0}, 2),
        (ALL, 4),
        ({"stages": [{"for": "1ep", "mixup": 0.4}, {"splicemix": 0.5}]}, 4),
    ],
)
def test_how_many_neighbours_stay_together(settings, expected):
    assert together(Config(**settings)) == expected


def test_nothing_is_mixed_where_it_is_off():
    batch = {"image": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "target": torch.zeros(3, 2)}
    batch["position"] = torch.arange(3)
    assert prepare(batch, Config(), MEAN, STD, mixing=True)[2] is None
    assert prepare(batch, Config(**ALL), MEAN, STD, mixing=False)[2] is None


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "splicemix": 0.6}])
def test_what_belongs_to_images_is_mixed_by_their_shares(settings):
    """The share of each source is that in the labels, which are the source's own here; grids have the largest there."""
    position = torch.arange(64)
    mix = drawn(position, mixup_prob=0.8, **settings)
    index, share = mix.shares()
    assert index.dtype == torch.int64 and index.shape == share.shape == (64, 4 if mix.grids else 2)
    torch.testing.assert_close(share.sum(1), torch.ones(64))
    found = torch.zeros(64, 64).scatter_add_(1, index, share)
    gridded = {place: grid.sources[n].tolist() for grid in mix.grids for n, place in enumerate(grid.places.tolist())}
    assert bool(gridded) == ("splicemix" in settings)
    labels = mix.labels(torch.eye(64))
    for n in range(64):
        if n in gridded:
            expected = torch.zeros(64)
            expected[gridded[n]] = 1 / len(gridded[n])
            torch.testing.assert_close(found[n], expected)
        else:
            torch.testing.assert_close(found[n], labels[n])
