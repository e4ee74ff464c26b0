"""Positions or rows -> batches, made whole in a worker: the main process does nothing per sample.

A sample that cannot be read costs that sample and not the run. In training its place is taken by the sample of the next
position of the stream that can be read: as pure a function of the position as the order itself, so it does not matter
which rank or worker met the damage. In evaluation it is marked as not valid.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from mlc.data.order import AUGMENT, Draws, locate
from mlc.data.reader import FolderReader, TarReader, check_shards
from mlc.data.transforms import EvalTransform, TrainTransform
from shards.console import UserError, listed
from shards.dataset import Dataset, Index, open_index
from shards.image import BadImage

Batch = dict[str, torch.Tensor]
TRIES = 1000  # positions looked at for a neighbour; fewer rows than that, all bad, are no data set


class TrainDataset:
    """Positions of the endless stream -> augmented samples.

    A batch's `bad` (int64, mostly empty) has the positions whose samples could not be used: those of the batch, and
    those passed over on the way to a neighbour. More than `max_bad` on one such way end it with a black image; the
    loop, which counts them, stops the run on every rank at the same step.
    """

    def __init__(
        self, index: Index, transform: TrainTransform, seed: int, *, max_bad: int = 10, check_crc: bool = True
    ):
        self.reader, self.transform, self.seed = TarReader(index, check_crc=check_crc), transform, seed
        self.max_bad = max_bad

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        position, bad = np.asarray(positions, np.int64), []
        rows = self._rows(position)
        image = []
        for place, p in enumerate(position.tolist()):
            pixels, rows[place] = self._sample(p, int(rows[place]), bad)
            image.append(pixels)
        return _batch(
            np.stack(image),
            rows,
            position=torch.from_numpy(position),
            target=torch.from_numpy(self.reader.index.targets(rows)),
            bad=torch.tensor(bad, dtype=torch.int64),
        )

    def problem(self, position: int) -> tuple[str, str]:
        """(shard:key, what is wrong) of one of `bad`, found out by reading it again."""
        row = int(self._rows(np.array([position]))[0])
        return _problem(self.reader, row, self.transform, Draws(self.seed, AUGMENT, position))

    def _rows(self, position: np.ndarray) -> np.ndarray:
        return locate(position, len(self.reader), self.seed)[1]

    def _sample(self, position: int, row: int, bad: list[int]) -> tuple[np.ndarray, int]:
        """(uint8 [H, W, 3], its row) for a position: its own sample, else the next readable one of the stream."""
        passed = set()
        for at in range(position, position + TRIES):
            if at > position:
                row = int(self._rows(np.array([at]))[0])
            try:
                return self.transform(self.reader.read(row), Draws(self.seed, AUGMENT, position)), row
            except BadImage:
                bad.append(at)
                passed.add(row)
                if len(passed) > self.max_bad:
                    return _blank(self.transform.size), row
        name, reason = self.problem(position)
        raise UserError(f"no image of the training split can be read, from {name}: {reason}; try `mlc verify`")


class EvalDataset:
    """Rows -> samples in a fixed shape; `valid` is False for padding (row -1) and for an image that is bad."""

    def __init__(self, reader: TarReader | FolderReader, transform: EvalTransform):
        self.reader, self.transform = reader, transform

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        rows = np.asarray(positions, np.int64)
        valid, image = rows >= 0, []
        for place, row in enumerate(rows.tolist()):
            try:
                image.append(self.transform(self.reader.read(row)) if row >= 0 else _blank(self.transform.size))
            except BadImage:
                valid[place] = False
                image.append(_blank(self.transform.size))
        return _batch(np.stack(image), rows, valid=torch.from_numpy(valid))

    def problem(self, row: int) -> tuple[str, str]:
        """(shard:key or file, what is wrong) of a row that is not valid, found out by reading it again."""
        return _problem(self.reader, row, self.transform, None)


class BadSamples:
    """The samples that could not be used so far, by name; the same on every process that is told the same."""

    def __init__(self, limit: int, known: Mapping[str, str] | None = None):
        self.limit, self.known = limit, dict(known or {})

    def __len__(self) -> int:
        return len(self.known)

    def add(self, found: Iterable[tuple[str, str]]) -> list[str]:
        """Takes (name, reason) pairs; a line for the log about each sample that was not known before.

        Raises:
            UserError: naming all of them, when there are more than `limit`.
        """
        new = {name: reason for name, reason in found if name not in self.known}
        self.known |= new
        if len(self) > self.limit:
            texts = [f"{name}: {reason}" for name, reason in self.known.items()]
            raise UserError(
                f"{len(self)} bad sample{'s' * (len(self) > 1)}, --max-bad-samples allows {self.limit}; "
                f"`mlc verify DIR` lists all damage, and with --repair it takes it out of the index\n{listed(texts)}"
            )
        return [f"bad sample {name}: {reason}; it is left out" for name, reason in new.items()]


def _problem(reader, row: int, transform, draws: Draws | None) -> tuple[str, str]:
    try:
        transform(reader.read(row), draws)
    except BadImage as error:
        return reader.name(row), str(error)
    return reader.name(row), "could not be read at first; read again, it is good"


def _blank(size: int) -> np.ndarray:
    return np.zeros((size, size, 3), np.uint8)


def _batch(image: np.ndarray, rows: np.ndarray, **more: torch.Tensor) -> Batch:
    """image [B, H, W, 3] -> the batch of DESIGN: `image` uint8 [B, 3, H, W], `row` int64 [B], `valid` bool [B]."""
    row = torch.from_numpy(rows)
    return {"image": torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), "row": row, "valid": row >= 0, **more}


def open_split(dataset: Dataset, split: str, *, labelled: bool = False) -> Index:
    """The index of a split that is not empty, whose tars are there and, where asked for, which has labels."""
    index = open_index(dataset, split)
    if not len(index):
        raise UserError(f"{dataset.root}: the split {split!r} is empty")
    if labelled and not index.has_labels:
        raise UserError(f"{dataset.root}: the split {split!r} has no labels")
    check_shards(dataset, split)
    return index
