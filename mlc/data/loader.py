"""Which positions each rank reads, and the worker processes that read them.

Training: global batch s is positions [start, start + G). Micro-step m gives rank r the positions
[start + (m W + r) B, + B), so that the union over ranks and micro-steps is the same for every world size W,
micro-batch B and accumulation. Evaluation: rows in fixed blocks of B, block b to rank b mod W, so that a row always
meets the same neighbours.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from mlc.data.dataset import Batch, EvalDataset, TrainDataset
from shards.console import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: global_batch = world_size * batch_size * accumulation."""

    global_batch: int
    batch_size: int
    world_size: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.batch_size * self.world_size)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.world_size} process{'es' * (self.world_size > 1)} x "
            f"{self.batch_size} a device x {self.accumulation} accumulated"
        )


def plan_batches(global_batch: int | None, batch_size: int, world_size: int, *, pairs: bool) -> BatchPlan:
    """The division of a global batch; `pairs` when mixing needs an even number of samples on every device.

    Raises:
        UserError: naming --batch-size or --global-batch-size and values that fit.
    """
    at_once = batch_size * world_size
    global_batch = global_batch or at_once
    if global_batch % at_once:
        fits = [b for b in range(1, global_batch + 1) if global_batch % (b * world_size) == 0 and not (pairs and b % 2)]
        hint = f"--batch-size one of {', '.join(map(str, fits))}" if fits else f"a multiple of {world_size}"
        raise UserError(
            f"--global-batch-size {global_batch} is not a multiple of --batch-size {batch_size} x {world_size} "
            f"processes = {at_once}; use {hint}"
        )
    if pairs and batch_size % 2:
        raise UserError(
            f"--batch-size {batch_size} is odd, but mixing pairs samples on a device; use {batch_size + 1} or --mixup 0"
        )
    return BatchPlan(global_batch, batch_size, world_size)


def train_positions(samples_seen: int, total: int, plan: BatchPlan, rank: int) -> Iterator[range]:
    """Positions of each micro-batch of one rank, from `samples_seen` until at least `total` samples are read."""
    for start in range(samples_seen, total, plan.global_batch):
        for micro in range(plan.accumulation):
            first = start + (micro * plan.world_size + rank) * plan.batch_size
            yield range(first, first + plan.batch_size)


def eval_blocks(n: int, batch_size: int, world_size: int, rank: int) -> Iterator[list[int]]:
    """Rows of each block of one rank, padded with -1; every rank gets the same number of blocks."""
    blocks = -(-n // batch_size)
    for block in range(rank, -(-blocks // world_size) * world_size, world_size):
        first = block * batch_size
        yield [row if row < n else -1 for row in range(first, first + batch_size)]


def load(dataset: TrainDataset | EvalDataset, positions: Iterator, *, workers: int, device: torch.device) -> DataLoader:
    """Batches of `positions`, in order, made by `workers` processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_already_a_batch,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )


def _already_a_batch(batch: Batch) -> Batch:
    return batch


class Waiting:
    """Iterates over batches, moves them to the device, and adds up the seconds the caller had to wait for data."""

    def __init__(self, batches, device: torch.device):
        self._batches, self._device, self.seconds = iter(batches), device, 0.0

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            batch = next(self._batches)
        except UserError as error:  # a worker's comes wrapped in its traceback
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        self.seconds += time.perf_counter() - begin
        return batch

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
