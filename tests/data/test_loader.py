import errno
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import time

import numpy as np
import pytest
import torch

from mlc.data.dataset import TrainDataset, shared_memory
from mlc.data.loader import Waiting, eval_blocks, load, plan_batches, readers, train_positions
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform
from shards.console import UserError
from shards.dataset import load_dataset
from shards.workers import spread


@pytest.mark.parametrize("world, batch", [(1, 24), (1, 6), (2, 12), (2, 2), (3, 4), (4, 6)])
def test_any_division_of_a_global_batch_covers_the_same_positions(world, batch):
    plan = plan_batches(24, batch, world, together=2)
    assert plan.accumulation * batch * world == 24
    ranks = [list(train_positions(48, 120, plan, rank)) for rank in range(world)]
    assert {len(r) for r in ranks} == {3 * plan.accumulation}
    for step in range(3):
        micro = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        seen = sorted(p for rank in ranks for positions in rank[micro] for p in positions)
        assert seen == list(range(48 + 24 * step, 72 + 24 * step))
    assert all(positions[0] % 2 == 0 for rank in ranks for positions in rank)  # pairs stay together


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_every_row_is_in_one_block_and_blocks_are_the_same_at_any_world_size(n, world):
    blocks = [list(eval_blocks(np.arange(n), 8, world, rank)) for rank in range(world)]
    assert len({len(b) for b in blocks}) == 1  # no rank waits for a batch that another does not have
    rows = sorted(row for rank in blocks for block in rank for row in block if row >= 0)
    assert rows == list(range(n))
    alone = {tuple(block) for block in eval_blocks(np.arange(n), 8, 1, 0)}
    assert {tuple(block) for rank in blocks for block in rank if block[0] >= 0} == alone


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"global_batch": 30, "batch_size": 8, "world_size": 2, "together": 1},
            ("--global-batch-size 30", "--batch-size one of 1, 3, 5, 15"),
        ),
        ({"global_batch": 31, "batch_size": 8, "world_size": 2, "together": 1}, ("a multiple of 2",)),
        (
            {"global_batch": None, "batch_size": 7, "world_size": 2, "together": 2},
            ("--batch-size 7 is odd", "--mixup 0"),
        ),
        (
            {"global_batch": None, "batch_size": 6, "world_size": 2, "together": 4},
            ("--batch-size 6 is not a multiple of 4", "use 8 or --splicemix 0"),
        ),
        (
            {"global_batch": 28, "batch_size": 5, "world_size": 2, "together": 4},
            ("a multiple of 2 processes x 4 (splicemix takes four", "use a multiple of 8"),
        ),
    ],
)
def test_impossible_divisions_say_what_fits(arguments, words):
    with pytest.raises(UserError) as error:
        plan_batches(
            arguments.pop("global_batch"), arguments.pop("batch_size"), arguments.pop("world_size"), **arguments
        )
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_is_not_written_over_while_the_next_two_are_fetched(shards, workers):
    """Workers use their memory again: not before the training loop is done with it."""
    index = open_split(load_dataset(shards), "train")
    stream = TrainDataset.of(index, TrainTransform(size=24), seed=1)
    positions = [range(8 * step, 8 * step + 8) for step in range(40)]
    batches = load(stream, iter(positions), workers=workers, device=torch.device("cpu"))
    kept, addresses = [], set()
    for expected, batch in zip(positions, batches, strict=True):
        kept = [*kept[-2:], (expected, batch)]
        addresses.add(batch["image"].data_ptr())
        time.sleep(0.01)  # the workers get as far ahead as they may
        for range_, old in kept:
            assert torch.equal(old["image"], stream.__getitems__(range_)["image"])
    assert len(addresses) < 40


def test_preparing_ahead_changes_nothing(shards):
    index = open_split(load_dataset(shards), "train")
    stream = TrainDataset.of(index, TrainTransform(size=24), seed=1)
    plan, device = plan_batches(8, 8, 1, together=1), torch.device("cpu")
    straight, ahead = (
        Waiting(load(stream, train_positions(0, 40, plan, 0), workers=0, device=device), device) for _ in range(2)
    )
    seen = [batch["position"].tolist() for batch in straight]
    prepared = []
    for batch in ahead:
        ahead.prepare()
        ahead.prepare()
        prepared.append(batch["position"].tolist())
    assert prepared == seen == [list(range(8 * s, 8 * s + 8)) for s in range(5)]
    assert ahead.take_seconds() > 0 and ahead.take_seconds() == 0


class Endless:
    def __getitems__(self, positions):
        return {"image": torch.zeros(1)}


def raising(error: Exception):
    def refuse(*_, **__):
        raise error

    return refuse


def test_a_small_dev_shm_is_enough(shards, monkeypatch):
    """A container's has 64 MB: batches do not lie there."""
    full = RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", raising(full))
    stream = TrainDataset.of(open_split(load_dataset(shards), "train"), TrainTransform(size=24), seed=1)
    (batch,) = load(stream, iter([range(8)]), workers=1, device=torch.device("cpu"))
    assert torch.equal(batch["image"], stream.__getitems__(range(8))["image"])

    monkeypatch.setattr(os, "memfd_create", raising(OSError(errno.EPERM, "Operation not permitted")), raising=False)
    with pytest.raises(UserError, match=r"No space left.*more /dev/shm \(docker run --shm-size 8g\).*fewer --workers"):
        shared_memory(1000)


def test_a_dev_shm_that_cannot_be_written_is_one_line(monkeypatch):
    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", raising(error))
    with pytest.raises(UserError, match=r"--workers 1: /dev/shm .*Read-only.*writable.*, or --workers 0$"):
        load(Endless(), iter(range(1)), workers=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"-j 2: /dev/shm .*, or -j 1$"):
        list(spread(abs, [1, 2], 2))


@pytest.mark.parametrize(
    "said, words",
    [("killed by signal: Bus error", "/dev/shm is full"), ("killed by signal: Killed", "mostly memory is short")],
)
def test_why_a_worker_was_killed(said, words):
    with pytest.raises(UserError, match=f"{said}; {words}") as found, readers():
        raise RuntimeError(f"DataLoader worker (pid 7) is {said}. It is possible that dataloader's workers are out of")
    assert "It is possible" not in str(found.value)


def test_a_defect_in_a_worker_is_not_a_worker_that_was_killed():
    with pytest.raises(RuntimeError, match="Caught"), readers():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...")


def test_a_worker_that_is_killed_is_one_line():
    kept = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match=r"DataLoader worker.*fewer --workers"), readers():
        device = torch.device("cpu")
        batches = Waiting(load(Endless(), iter(range(10**9)), workers=1, device=device), device)
        for _ in range(10**6):
            next(batches)
            for worker in multiprocessing.active_children():
                worker.kill()
    signal.signal(signal.SIGCHLD, kept)
    with pytest.raises(RuntimeError, match="other"), readers():
        raise RuntimeError("other")
