"""Positions or rows -> batches, made whole in a worker: the main process does nothing per sample."""

from collections.abc import Sequence

import numpy as np
import torch

from mlc.data.order import AUGMENT, Draws, locate
from mlc.data.reader import FolderReader, TarReader
from mlc.data.transforms import EvalTransform, TrainTransform
from shards.console import UserError
from shards.dataset import Dataset, Index, open_index
from shards.image import BadImage

Batch = dict[str, torch.Tensor]


def decode(reader: TarReader | FolderReader, row: int, transform, draws: Draws | None) -> np.ndarray:
    """One image as uint8 [H, W, 3]; what is wrong with a file is said with its name."""
    try:
        return transform(reader.read(row), draws)
    except BadImage as error:
        raise UserError(f"{reader.name(row)}: {error}") from error


class TrainDataset:
    """Positions of the endless stream -> augmented samples."""

    def __init__(self, index: Index, transform: TrainTransform, seed: int):
        self.reader, self.transform, self.seed = TarReader(index), transform, seed

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        position = np.asarray(positions, np.int64)
        _, rows = locate(position, len(self.reader), self.seed)
        image = np.stack(
            [
                decode(self.reader, int(row), self.transform, Draws(self.seed, AUGMENT, int(p)))
                for p, row in zip(position, rows, strict=True)
            ]
        )
        return _batch(
            image, rows, position=torch.from_numpy(position), target=torch.from_numpy(self.reader.index.targets(rows))
        )


class EvalDataset:
    """Rows -> samples in a fixed shape; row -1 is padding, with `valid` False."""

    def __init__(self, reader: TarReader | FolderReader, transform: EvalTransform):
        self.reader, self.transform = reader, transform

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        rows = np.asarray(positions, np.int64)
        size = self.transform.size
        blank = np.zeros((size, size, 3), np.uint8)
        image = np.stack([decode(self.reader, int(row), self.transform, None) if row >= 0 else blank for row in rows])
        return _batch(image, rows)


def _batch(image: np.ndarray, rows: np.ndarray, **more: torch.Tensor) -> Batch:
    """image [B, H, W, 3] -> the batch of DESIGN: `image` uint8 [B, 3, H, W], `row` int64 [B], `valid` bool [B]."""
    row = torch.from_numpy(rows)
    return {"image": torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), "row": row, "valid": row >= 0, **more}


def open_split(dataset: Dataset, split: str, *, labelled: bool = False) -> Index:
    """The index of a split that is not empty and, where asked for, has labels."""
    index = open_index(dataset, split)
    if not len(index):
        raise UserError(f"{dataset.root}: the split {split!r} is empty")
    if labelled and not index.has_labels:
        raise UserError(f"{dataset.root}: the split {split!r} has no labels")
    return index
