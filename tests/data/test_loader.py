import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch

from mlc.data.dataset import TrainDataset
from mlc.data.loader import Waiting, eval_blocks, load, plan_batches, readers, train_positions
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform
from shards.console import UserError
from shards.dataset import load_dataset


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
