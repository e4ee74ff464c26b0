"""Rows -> batches: one `pread` per image straight from the index, no tar walking, no state.

A data set here answers `__getitems__(positions)` with a whole batch, so the workers collate and the main process does
nothing per sample. Files are opened lazily, once per process, which makes the objects cheap to send to a worker.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlc.data.order import AUGMENT, Draws, locate
from mlc.data.transforms import EvalTransform, TrainTransform
from shards.console import UserError
from shards.dataset import Dataset, Index, open_index
from shards.image import BadImage

Batch = dict[str, torch.Tensor]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OPEN_FILES = 128  # shards kept open per process


class TarReader:
    """Image bytes of the rows of one split."""

    def __init__(self, index: Index):
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self):
        return {"index": self.index, "_files": OrderedDict()}  # descriptors do not travel between processes

    def name(self, row: int) -> str:
        """For people: the shard and the key."""
        return f"{self.index.shard_path(int(self.index.shard[row])).name}:{self.index.key(row)}"

    def image_id(self, row: int) -> str:
        return self.index.image_id(row)

    def read(self, row: int) -> bytes:
        size = int(self.index.size[row])
        data = os.pread(self._open(int(self.index.shard[row])), size, int(self.index.offset[row]))
        if len(data) != size:
            raise UserError(
                f"{self.name(row)}: the shard ends inside this image; it is truncated (`mlc verify` lists the damage)"
            )
        return data

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            path = self.index.shard_path(shard)
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


class FolderReader:
    """Image bytes of the files below a folder, in the order of their names: data that nobody packed."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--images {folder}: no such folder")
        self.names = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not self.names:
            raise UserError(f"--images {folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    image_id = name

    def read(self, row: int) -> bytes:
        return (self.folder / self.names[row]).read_bytes()


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
