"""Positions or rows -> batches, made whole in a worker: the main process does nothing per sample.

A sample that cannot be read costs that sample and not the run. In training its place is taken by the sample of the next
position of the stream that can be read: as pure a function of the position as the order itself, so it does not matter
which rank or worker met the damage. In evaluation it is marked as not valid.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mlc.data.captions import EvalCaptions, TrainCaptions
from mlc.data.features import Features
from mlc.data.order import AUGMENT, Draws
from mlc.data.reader import FolderReader, TarReader
from mlc.data.sampler import Sampler, plain
from mlc.data.soft_labels import SoftLabels
from mlc.data.transforms import EvalTransform, TrainTransform
from shards.console import UserError, listed, plural
from shards.dataset import Index
from shards.image import BadImage

Batch = dict[str, torch.Tensor]
PREFETCH = 4  # batches that each worker makes ahead
SHM_FIX = "give the container more /dev/shm (docker run --shm-size 8g), or try fewer --workers (0: none)"
TRIES = 1000  # positions looked at for a neighbour; fewer rows than that, all bad, are no data set


class TrainDataset:
    """Positions of the endless stream -> augmented samples.

    A batch's `bad` (int64, mostly empty) has the positions whose samples could not be used: those of the batch, and
    those passed over on the way to a neighbour. More than `max_bad` on one such way end it with a black image; the
    loop, which counts them, stops the run on every rank at the same step.
    """

    def __init__(
        self,
        sampler: Sampler,
        readers: Sequence[TarReader],
        transform: TrainTransform,
        seed: int,
        *,
        max_bad: int = 10,
        soft: SoftLabels | None = None,
        captions: TrainCaptions | None = None,
        features: Features | None = None,
        images: bool = True,
    ):
        """`readers`: one for each data set of the sampler; `soft`: adds its labels to the batch; `captions`: adds
        `tokens` and `token_mask`; `features`: adds those of the first data set, [B, D]; without `images` none is
        decoded, and the batch has no `image`."""
        self.sampler, self.readers, self.transform, self.seed = sampler, list(readers), transform, seed
        self.max_bad, self.soft, self.captions, self.images = max_bad, soft, captions, images
        self.features = features
        self._buffers = Buffers()

    @classmethod
    def of(
        cls, index: Index, transform: TrainTransform, seed: int, *, check_crc: bool = True, max_bad: int = 10
    ) -> "TrainDataset":
        """All rows of one split on a local disk, in plain shuffled order."""
        readers = [TarReader(index, check_crc=check_crc)]
        return cls(plain(index, seed), readers, transform, seed, max_bad=max_bad)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        position, bad = np.asarray(positions, np.int64), []
        source, rows = self.sampler.locate(position)
        image = self._images(position, source, rows, bad) if self.images else None
        seen = {"features": self._features(position, rows, bad)} if self.features else {}
        target = np.empty((len(rows), self.readers[0].index.num_classes), np.float32)
        for number, reader in enumerate(self.readers):
            own = source == number
            target[own] = reader.index.targets(rows[own])
        more = {"soft": torch.from_numpy(self.soft(source, rows))} if self.soft else {}
        more |= self.captions(position, source, rows) if self.captions else {}
        return _batch(
            image,
            rows,
            source=torch.from_numpy(source),
            position=torch.from_numpy(position),
            target=torch.from_numpy(target),
            bad=torch.tensor(bad, dtype=torch.int64),
            **seen,
            **more,
        )

    def _features(self, position: np.ndarray, rows: np.ndarray, bad: list[int]) -> torch.Tensor:
        """[B, D]; where a neighbour took a place, `rows` says so afterwards."""
        for place in np.flatnonzero(~self.features.known(rows)).tolist():
            p = int(position[place])
            ahead = self.sampler.locate(np.arange(p, p + TRIES))[1]
            known = self.features.known(ahead)
            if not known.any():
                raise UserError(f"{self.features.files[0].path} has features of no image of the training split")
            rows[place] = ahead[known.argmax()]
            bad.extend(range(p, p + int(known.argmax())))
        return torch.from_numpy(self.features(rows))

    def _images(self, position: np.ndarray, source: np.ndarray, rows: np.ndarray, bad: list[int]) -> torch.Tensor:
        """uint8 [B, H, W, 3]; where a neighbour took a place, `source` and `rows` say so afterwards."""
        for number, reader in enumerate(self.readers):
            reader.expect(rows[source == number].tolist())
        image = self._buffers.take(len(rows), self.transform.size)
        pixels = image.numpy()
        for place, p in enumerate(position.tolist()):
            pixels[place], source[place], rows[place] = self._sample(p, int(source[place]), int(rows[place]), bad)
        return image

    def problem(self, position: int) -> tuple[str, str]:
        """(shard:key, what is wrong) of one of `bad`, found out by reading it again."""
        source, row = self._locate(position)
        return _problem(self.readers[source], row, self.transform, Draws(self.seed, AUGMENT, position))

    def _locate(self, position: int) -> tuple[int, int]:
        source, row = self.sampler.locate(np.array([position]))
        return int(source[0]), int(row[0])

    def _sample(self, position: int, source: int, row: int, bad: list[int]) -> tuple[np.ndarray, int, int]:
        """(uint8 [H, W, 3], its data set, its row) for a position: its own sample, else the next readable one of the
        stream."""
        passed = set()
        for at in range(position, position + TRIES):
            if at > position:
                source, row = self._locate(at)
            try:
                pixels = self.transform(self.readers[source].read(row), Draws(self.seed, AUGMENT, position))
                return pixels, source, row
            except BadImage:
                bad.append(at)
                passed.add((source, row))
                if len(passed) > self.max_bad:
                    return _blank(self.transform.size), source, row
        name, reason = self.problem(position)
        raise UserError(f"no image of the training split can be read, from {name}: {reason}; try `mlc verify`")


class EvalDataset:
    """Rows -> samples in a fixed shape; `valid` is False for padding (row -1) and for an image that is bad."""

    def __init__(
        self,
        reader: TarReader | FolderReader,
        transform: EvalTransform,
        rows: np.ndarray | None = None,
        *,
        captions: EvalCaptions | None = None,
        features: Features | None = None,
        images: bool = True,
    ):
        """`rows` int64 [n], ascending: those that take part (default: all). `captions`: adds `tokens`, `token_mask` and
        `caption_weight`; `features`: adds them; without `images` none is decoded, and the batch has no `image`."""
        self.reader, self.transform, self.captions, self.images = reader, transform, captions, images
        self.features = features
        self.rows = np.arange(len(reader)) if rows is None else rows
        self._buffers = Buffers()

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        rows = np.asarray(positions, np.int64)
        valid = rows >= 0
        image = self._images(rows, valid) if self.images else None
        more = self.captions(rows) if self.captions else {}
        if self.features:
            valid &= self.features.known(rows)
            more |= {"features": torch.from_numpy(self.features(rows))}
        return _batch(image, rows, valid=torch.from_numpy(valid), **more)

    def _images(self, rows: np.ndarray, valid: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3]; `valid` says afterwards which of them could be read."""
        image = self._buffers.take(len(rows), self.transform.size)
        pixels = image.numpy()
        self.reader.expect(rows[valid].tolist())
        for place, row in enumerate(rows.tolist()):
            try:
                pixels[place] = self.transform(self.reader.read(row)) if row >= 0 else 0
            except BadImage:
                valid[place], pixels[place] = False, 0
        return image

    def problem(self, row: int) -> tuple[str, str]:
        """(shard:key or file, what is wrong) of a row that is not valid, found out by reading it again."""
        return _problem(self.reader, row, self.transform, None)


class Buffers:
    """Where a worker writes its images: shared memory that is used again and again.

    Fresh memory for each batch, which the kernel must first clear, would cost a fifth of the decoding. So a batch that
    a worker made stays as it is only until `PREFETCH` + 3 more of the same worker are made: whoever reads batches in
    order and keeps no more than three of them never sees that.
    """

    def __init__(self):
        self._made: list[torch.Tensor] = []
        self._turn = 0

    def __getstate__(self):
        return {"_made": [], "_turn": 0}

    def take(self, count: int, size: int) -> torch.Tensor:
        """uint8 [count, size, size, 3] with anything in it."""
        shape = (count, size, size, 3)
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        if not self._made or self._made[0].shape != shape:
            storages = (shared_memory(math.prod(shape)) for _ in range(PREFETCH + 3))
            self._made = [torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape) for storage in storages]
        self._turn = (self._turn + 1) % len(self._made)
        return self._made[self._turn]


def shared_memory(size: int) -> torch.UntypedStorage:
    """`size` bytes that another process can map when they are sent to it.

    Not from /dev/shm, of which a container has 64 MB unless it is told otherwise: two workers' buffers at 256 pixels
    are more than that. Linux has the same memory without a name, of which there is as much as there is memory.

    Raises:
        UserError: the system gives neither.
    """
    try:
        return _unnamed(size)
    except (AttributeError, OSError):  # another system, or one that forbids it
        pass
    try:
        return torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise UserError(f"{size / 1e6:.0f} MB of shared memory for a batch: {error}; {SHM_FIX}") from error


def _unnamed(size: int) -> torch.UntypedStorage:
    file = os.memfd_create("mlc")
    try:
        os.ftruncate(file, size)
        return torch.UntypedStorage._new_shared_fd_cpu(file, size)  # which keeps a descriptor of its own
    except RuntimeError as error:
        raise OSError(str(error)) from error
    finally:
        os.close(file)


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
                f"{plural(len(self), 'bad sample')}, --max-bad-samples allows {self.limit}; "
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


def _batch(image: torch.Tensor | None, rows: np.ndarray, **more: torch.Tensor) -> Batch:
    """image [B, H, W, 3] -> the batch of DESIGN: `image` uint8 [B, 3, H, W], `row` int64 [B], `valid` bool [B].

    The image keeps its memory order (channels last); whoever makes floats of it on the device turns it.
    """
    row = torch.from_numpy(rows)
    seen = {} if image is None else {"image": image.permute(0, 3, 1, 2)}
    return {**seen, "row": row, "valid": row >= 0, **more}
