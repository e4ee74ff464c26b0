"""Which positions each rank reads, and the worker processes that read them.

Training: global batch s is positions [start, start + G). Micro-step m gives rank r the positions
[start + (m W + r) B, + B), so that the union over ranks and micro-steps is the same for every world size W,
micro-batch B and accumulation. Evaluation: rows in fixed blocks of B, block b to rank b mod W, so that a row always
meets the same neighbours.
"""

import ctypes
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from mlc.data.dataset import PREFETCH, SHM_FIX, Batch, EvalDataset, TrainDataset
from mlc.parallel.memory import to_device
from shards.console import UserError, plural
from shards.workers import free_shm, need_locks

ON_THE_HOST = ("position", "source", "bad")  # what only the host asks for; asking the device would wait for it
WORKER = "DataLoader worker"
_ENDED = re.compile(rf"{WORKER} (\(pid|ended)")  # so begin PyTorch's messages, and ours, when one has ended
_MIXING = {2: "mixing pairs samples on a device", 4: "splicemix takes four samples of a device"}
_PDEATHSIG = 1  # <sys/prctl.h>


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
            f"global batch {self.global_batch} = {plural(self.world_size, 'process', 'processes')} x "
            f"{self.batch_size} a device x {self.accumulation} accumulated"
        )


def batch_sizes(global_batch: int, world_size: int, *, together: int) -> list[int]:
    """The micro-batches, ascending, that divide a global batch among so many devices, all multiples of `together`.

    Raises:
        UserError: there is none.
    """
    share, rest = divmod(global_batch, world_size)
    if rest or share % together:
        mixed = f" x {together} ({_MIXING[together]})" if together > 1 else ""
        raise UserError(
            f"--global-batch-size {global_batch} is not a multiple of "
            f"{plural(world_size, 'process', 'processes')}{mixed}; use a multiple of {world_size * together}"
        )
    return [size for size in range(together, share + 1, together) if share % size == 0]


def plan_batches(global_batch: int | None, batch_size: int, world_size: int, *, together: int) -> BatchPlan:
    """The division of a global batch; `together`: samples that must share a device (`mixing.together`).

    Raises:
        UserError: naming --batch-size or --global-batch-size and values that fit.
    """
    at_once = batch_size * world_size
    global_batch = global_batch or at_once
    if global_batch % at_once:
        fits = batch_sizes(global_batch, world_size, together=together)
        raise UserError(
            f"--global-batch-size {global_batch} is not a multiple of --batch-size {batch_size} x {world_size} "
            f"processes = {at_once}; use --batch-size one of {', '.join(map(str, fits))}"
        )
    if batch_size % together:
        odd, off = ("odd", "--mixup 0 --cutmix 0") if together == 2 else ("not a multiple of 4", "--splicemix 0")
        more = batch_size + -batch_size % together
        raise UserError(f"--batch-size {batch_size} is {odd}, but {_MIXING[together]}; use {more} or {off}")
    return BatchPlan(global_batch, batch_size, world_size)


def train_positions(
    samples_seen: int, total: int, plan: BatchPlan, rank: int, arrange: Callable[[range], Sequence[int]] | None = None
) -> Iterator[Sequence[int]]:
    """Positions of each micro-batch of one rank, from `samples_seen` until at least `total` samples are read; `arrange`
    gives the positions of a global batch another order."""
    for start in range(samples_seen, total, plan.global_batch):
        positions = range(start, start + plan.global_batch)
        if arrange:
            positions = arrange(positions)
        for micro in range(plan.accumulation):
            first = (micro * plan.world_size + rank) * plan.batch_size
            yield positions[first : first + plan.batch_size]


def eval_blocks(rows: np.ndarray, batch_size: int, world_size: int, rank: int) -> Iterator[list[int]]:
    """Rows of each block of one rank, padded with -1; every rank gets the same number of blocks."""
    blocks = -(-len(rows) // batch_size)
    for block in range(rank, -(-blocks // world_size) * world_size, world_size):
        own = rows[block * batch_size : (block + 1) * batch_size].tolist()
        yield own + [-1] * (batch_size - len(own))


def load(
    dataset: TrainDataset | EvalDataset, positions: Iterator, *, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of `positions`, in order, made by `workers` processes (0: in this one); keep at most three of them, see
    `Buffers`.

    Raises:
        UserError: /dev/shm cannot be written.
    """
    batches = DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=_small_as_arrays,
        pin_memory=device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_die_with_parent,
    )
    if workers:
        need_locks("--workers", workers, alone=0)
    return map(_as_tensors, batches)


def _die_with_parent(worker: int) -> None:
    """A worker inherits the connections to the other ranks: while it outlives a process that was killed (5 s, until
    PyTorch's own watch notices), they would wait for the dead."""
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _small_as_arrays(batch: Batch) -> dict[str, torch.Tensor | np.ndarray]:
    """For the way out of a worker: a tensor costs a file descriptor, a few numbers go with the message."""
    return {name: tensor if name == "image" else tensor.numpy() for name, tensor in batch.items()}


def _as_tensors(batch: dict[str, torch.Tensor | np.ndarray]) -> Batch:
    return {name: torch.as_tensor(value) for name, value in batch.items()}


@contextmanager
def readers():
    """Around a program: when one of its workers is killed, mostly because memory is short, that is one line."""
    try:
        yield
    except RuntimeError as error:
        if not _ENDED.match(str(error)):
            raise
        if hasattr(signal, "SIGCHLD"):  # or PyTorch says it again, in the middle of the next line
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reason = " ".join(str(error).partition(". ")[0].split()).rstrip(".")
        raise UserError(
            f"a process that reads images ended: {reason}; {_why(reason)}, then start again (a training with "
            "--resume auto)"
        ) from None


def _why(reason: str) -> str:
    """What a worker mostly dies of: the kernel kills for want of memory, and answers with SIGBUS where a page that is
    mapped cannot be had."""
    if "Bus error" not in reason:
        return "mostly memory is short: fewer --workers or a smaller --batch-size"
    return (
        f"/dev/shm is full ({free_shm()}), or a file of the data set was cut or cannot be read: {SHM_FIX}; `mlc "
        "verify` finds damaged data"
    )


class Waiting:
    """Iterates over batches on the device, and adds up the seconds the caller had to wait for data.

    `prepare` fetches the next batch while the device computes: the copy has a CUDA stream of its own, so that it does
    not queue behind the step.
    """

    def __init__(self, batches, device: torch.device):
        self._batches, self._device, self.seconds = iter(batches), device, 0.0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        self.prepare()
        batch, self._ahead = self._ahead, None
        if batch is None:
            raise StopIteration
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in batch.values():
                if tensor.is_cuda:
                    tensor.record_stream(current)  # its memory is not used again before the step has read it
        return batch

    def prepare(self) -> None:
        """The next batch on its way to the device; waits for the workers where they are not ready."""
        if self._ahead is not None:
            return
        begin = time.perf_counter()
        try:
            batch = next(self._batches, None)
        except UserError as error:  # a worker's comes wrapped in its traceback
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise RuntimeError(f"{WORKER} ended while it sent a batch ({type(error).__name__})") from error
        if batch is not None:
            with torch.cuda.stream(self._stream):  # does nothing where there is none
                self._ahead = {name: self._moved(name, tensor) for name, tensor in batch.items()}
        self.seconds += time.perf_counter() - begin

    def _moved(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name in ON_THE_HOST else to_device(tensor, self._device)

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
