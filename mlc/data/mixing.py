"""Mixing of samples on the device. Partners are the positions 2k and 2k + 1 of the stream, for grids the positions 4k
to 4k + 3. They always share a micro-batch and all choices about them are drawn from their positions, so the mixed
samples of a global batch do not depend on world size, micro-batch or accumulation.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv

from mlc.config import Config
from mlc.data.order import MIX, uniform
from mlc.data.transforms import inside
from mlc.parallel.memory import to_device

# What is drawn for a pair, for a group of four and for a sample.
LAMBDA, WHETHER, SWITCH, DOWN, ACROSS, SPLICED, GRID, FIRST_CELL = range(8)
GRIDS = ((1, 2), (2, 1), (2, 2))  # rows, columns


def together(config: Config) -> int:
    """How many neighbours of the stream must share a micro-batch, in any stage of the run: 1, 2 (pairs) or 4."""
    mixes = ("mixup", "cutmix", "splicemix")
    used = {name for settings in (vars(config), *config.stages) for name in mixes if settings.get(name)}
    return 4 if "splicemix" in used else 2 if used else 1


@dataclass(frozen=True)
class Grid:
    """Samples `places` int64 [n] become grids of `shape` (rows, columns), cells from samples `sources` int64 [n, r c],
    row by row."""

    shape: tuple[int, int]
    places: torch.Tensor
    sources: torch.Tensor

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [n, 3, H, W]; each cell is a whole picture, made smaller."""
        (rows, columns), cells = self.shape, iter(to_device(self.sources.T, image.device))
        heights, widths = _shared(image.shape[2], rows), _shared(image.shape[3], columns)
        bands = ([_resized(image[next(cells)], height, width) for width in widths] for height in heights)
        return torch.cat([torch.cat(band, 3) for band in bands], 2)


def _shared(side: int, parts: int) -> list[int]:
    return [side // parts] * (parts - 1) + [side - side // parts * (parts - 1)]


def _resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Mix:
    """How the samples of a micro-batch are mixed; all of it on the CPU.

    lam: float32 [B], a sample's own share of its pair, equal for both partners; 1 where a pair is not mixed.
    boxes: int64 [B, 4] top, left, bottom, right of what comes from the partner; empty where the pair is blended.
    grids: the samples that are replaced by grids; their `lam` is 1.
    union: whether a mixed pair has all labels of both.
    """

    lam: torch.Tensor
    boxes: torch.Tensor
    grids: tuple[Grid, ...] = ()
    union: bool = False

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> the same shape, mixed."""
        device, mixed, cut = image.device, image, self._cut()
        own = np.where(cut, np.float32(1), self.lam.numpy())
        if (own < 1).any():
            own = to_device(torch.from_numpy(own), device).view(-1, 1, 1, 1)
            mixed = own * image + (1 - own) * swap_pairs(image)
        if cut.any():
            mixed = swap_pairs(image).where(inside(self.boxes, *image.shape[2:], device), mixed)
        for grid in self.grids:
            mixed = mixed.index_copy(0, to_device(grid.places, device), grid.image(image))
        return mixed

    def labels(self, target: torch.Tensor) -> torch.Tensor:
        """[B, C] in 0..1, labels or a teacher's probabilities -> the same shape: by share of the pair or the larger of
        both, the largest of a grid."""
        own, partner = to_device(self.lam, target.device).view(-1, 1), swap_pairs(target)
        if self.union:
            mixed = target.maximum(partner).where(own < 1, target)
        else:
            mixed = own * target + (1 - own) * partner
        for grid in self.grids:
            places, sources = (to_device(x, target.device) for x in (grid.places, grid.sources))
            mixed = mixed.index_copy(0, places, target[sources].amax(1))
        return mixed

    def shares(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(int64 [B, K], float32 [B, K]): of which samples of the micro-batch each one is made, and the share of each,
        1 in all; for what belongs to the images and is mixed like them, such as features of their captions. K is 2,
        with grids 4; the cells of a grid share alike."""
        own = torch.arange(len(self.lam))
        index, share = torch.stack([own, own ^ 1], 1), torch.stack([self.lam, 1 - self.lam], 1)
        if self.grids:
            index, share = torch.cat([index, own[:, None].expand(-1, 2)], 1), F.pad(share, (0, 2))
        for grid in self.grids:
            cells = grid.sources.shape[1]
            index[grid.places, :cells], share[grid.places] = grid.sources, 0.0
            share[grid.places, :cells] = 1 / cells
        device = device or self.lam.device
        return to_device(index, device), to_device(share, device)

    def charged(self) -> torch.Tensor:
        """int64 [B]: the sample of the micro-batch that a loss is laid to: the one whose place it is
        where it can be seen, else the one with the largest share (of a grid the first cell)."""
        index, share = (x.numpy() for x in self.shares())
        own = np.arange(len(index))
        seen = (share * (index == own[:, None])).sum(1) > 0
        return torch.from_numpy(np.where(seen, own, index[own, share.argmax(1)]))

    def described(self) -> list[tuple[str | None, list[int], float]]:
        """(how, from which samples of the micro-batch, own share) of each; None and no samples where it is whole."""
        found: list[tuple[str | None, list[int], float]] = [
            ("cutmix" if cut else "mixup", [place ^ 1], lam) if lam < 1 else (None, [], 1.0)
            for place, (cut, lam) in enumerate(zip(self._cut().tolist(), self.lam.tolist(), strict=True))
        ]
        for grid in self.grids:
            name = "splicemix {}x{}".format(*grid.shape)
            for place, sources in zip(grid.places.tolist(), grid.sources.tolist(), strict=True):
                found[place] = (name, sources, sources.count(place) / len(sources))
        return found

    def _cut(self) -> np.ndarray:
        """bool [B], in NumPy: a tensor that is asked for its value counts as waiting for a device."""
        return (self.boxes[:, 2] > self.boxes[:, 0]).numpy()


def draw_mix(position: torch.Tensor, config: Config, height: int, width: int) -> Mix:
    """What is mixed and how, for the samples at `position` int64 [B] of the stream, B a multiple of `together`.

    lambda ~ Beta(alpha, alpha) by the inverse of its distribution at a uniform of the pair (Zhang et al. 2017, mixup).
    cutmix (Yun et al. 2019) exchanges a box of 1 - lambda of the area around a uniform centre, cut at the border;
    lambda is then what is left of the own image. splicemix (Wang et al. 2023): with its probability, four samples are
    replaced by grids of two or four of them, each with its own grid and its own choice.
    """
    p, seed = position.numpy(), config.seed
    pair = p[np.arange(len(p)) & ~1] // 2  # by the first, in case a run goes on between two partners
    cut = np.full(len(p), config.cutmix > 0)
    if config.mixup and config.cutmix:
        cut = uniform(seed, MIX, pair, SWITCH) < config.mixup_switch_prob
    lam, level = np.ones(len(p)), uniform(seed, MIX, pair, LAMBDA)
    for alpha, chosen in ((config.mixup, ~cut), (config.cutmix, cut)):
        if alpha:
            lam[chosen] = betaincinv(alpha, alpha, level[chosen])
    lam[uniform(seed, MIX, pair, WHETHER) >= config.mixup_prob] = 1.0
    grids = ()
    if config.splicemix:
        spliced, grids = _draw_grids(p, config)
        lam[spliced] = 1.0
    boxes = np.zeros((len(p), 4), np.int64)
    if cut.any():
        centre = [uniform(seed, MIX, pair, axis)[cut] for axis in (DOWN, ACROSS)]
        boxes[cut], lam[cut] = cut_box(lam[cut], *centre, height, width)
    lam = torch.from_numpy(lam.astype(np.float32))
    return Mix(lam, torch.from_numpy(boxes), grids, config.mix_labels == "union")


def cut_box(
    lam: np.ndarray, down: np.ndarray, across: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n, 4] top, left, bottom, right, the true lambda [n]) of boxes of 1 - lambda [n] of the area around a
    centre, in shares [n] of the sides."""
    edges = []
    for side, centre in ((height, down), (width, across)):
        length = (side * np.sqrt(1 - lam)).astype(np.int64)
        first = (side * centre).astype(np.int64) - length // 2
        edges += [np.clip(first, 0, side), np.clip(first + length, 0, side)]
    top, bottom, left, right = edges
    return np.stack([top, left, bottom, right], 1), 1 - (bottom - top) * (right - left) / (height * width)


def _draw_grids(p: np.ndarray, config: Config) -> tuple[np.ndarray, tuple[Grid, ...]]:
    """(bool [B], which samples are replaced; by what)."""
    place = np.arange(len(p))
    first = place // 4 * 4
    spliced = uniform(config.seed, MIX, p[first] // 4, SPLICED) < config.splicemix
    kind = (uniform(config.seed, MIX, p, GRID) * len(GRIDS)).astype(np.int64)
    order = uniform(config.seed, MIX, p[:, None], FIRST_CELL + np.arange(4)).argsort(1)
    grids = []
    for number, shape in enumerate(GRIDS):
        chosen = np.flatnonzero(spliced & (kind == number))
        if len(chosen):
            sources = (first[:, None] + order)[chosen, : shape[0] * shape[1]]
            grids.append(Grid(shape, torch.from_numpy(chosen), torch.from_numpy(sources)))
    return spliced, tuple(grids)


def swap_pairs(x: torch.Tensor) -> torch.Tensor:
    """Each row's partner: rows 2k and 2k + 1 of [B, ...] exchanged; B is even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
