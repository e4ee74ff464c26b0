"""How good the shuffle is, in numbers, beside those of the usual one: shards in random order and a buffer of 1,000."""

import random

import numpy as np
import pytest
from scipy.stats import chi2, hypergeom, spearmanr
from webdataset.filters import shuffle

from mlc.data.order import locate

SHARDS, PER_SHARD, BATCH, EPOCHS = 50, 400, 256, 6
ROWS = SHARDS * PER_SHARD


def ours(epoch: int) -> np.ndarray:
    """Rows of an epoch in the order they are read."""
    return locate(np.arange(epoch * ROWS, (epoch + 1) * ROWS), ROWS, seed=7)[1]


def buffered(epoch: int) -> np.ndarray:
    """webdataset's own: shards in random order, then its shuffle(1000)."""
    rng = random.Random(epoch)
    shards = rng.sample(range(SHARDS), SHARDS)
    rows = (shard * PER_SHARD + i for shard in shards for i in range(PER_SHARD))
    return np.array(list(shuffle(1000, rng=rng)(rows)))


def places(rows: np.ndarray) -> np.ndarray:
    """When each row is read."""
    found = np.empty(ROWS, np.int64)
    found[rows] = np.arange(ROWS)
    return found


def correlations(order) -> list[float]:
    """Rank correlation of the times at which a row is read, between every two epochs."""
    epochs = [places(order(epoch)) for epoch in range(EPOCHS)]
    return [spearmanr(epochs[a], epochs[b]).statistic for a in range(EPOCHS) for b in range(a)]


def neighbours(order) -> float:
    """Share of the rows read within a batch's length of the row that lies next to them in their shard."""
    found = places(order(0)).reshape(SHARDS, PER_SHARD)
    return float((np.abs(np.diff(found)) < BATCH).mean())


def counts_per_shard(order) -> np.ndarray:
    """int64 [batches, SHARDS]: how many samples of each shard are in each whole global batch."""
    rows = np.concatenate([order(epoch) for epoch in range(EPOCHS)])
    batches = rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH) // PER_SHARD
    return np.stack([np.bincount(batch, minlength=SHARDS) for batch in batches])


def expected_shards() -> float:
    """Different shards in a batch drawn from an epoch without replacement."""
    return SHARDS * (1 - hypergeom.pmf(0, ROWS, PER_SHARD, BATCH))


def test_epochs_do_not_know_each_other():
    """Of independent permutations the correlation has the standard deviation 1 / sqrt(n - 1)."""
    mine, theirs = correlations(ours), correlations(buffered)
    limit = 4.5 / np.sqrt(ROWS - 1)
    print(f"rank correlation between epochs, largest of {len(mine)}: {np.abs(mine).max():.4f}, ", end="")
    print(f"buffer {np.abs(theirs).max():.4f}; noise of a perfect shuffle {1 / np.sqrt(ROWS - 1):.4f}")
    assert np.abs(mine).max() < limit < np.abs(theirs).max()


def test_an_epoch_does_not_know_the_order_of_the_file():
    mine = [spearmanr(places(ours(epoch)), np.arange(ROWS)).statistic for epoch in range(EPOCHS)]
    assert np.abs(mine).max() < 4.5 / np.sqrt(ROWS - 1)
    near, theirs, expected = neighbours(ours), neighbours(buffered), 2 * BATCH / ROWS
    print(f"neighbours in a shard read within {BATCH} samples: {near:.2%}, buffer {theirs:.2%}, chance {expected:.2%}")
    assert near == pytest.approx(expected, rel=0.15) and theirs > 5 * expected


def test_a_batch_draws_from_all_shards_alike():
    mine, theirs = counts_per_shard(ours), counts_per_shard(buffered)
    shards = [(counts > 0).sum(1).mean() for counts in (mine, theirs)]
    print(f"shards in a batch of {BATCH}: {shards[0]:.1f} of {SHARDS}, buffer {shards[1]:.1f}, ", end="")
    print(f"expected {expected_shards():.1f}; samples of one shard at most: {mine.max()}, buffer {theirs.max()}")
    assert shards[0] == pytest.approx(expected_shards(), rel=0.01) and shards[1] < expected_shards() / 3

    # Pearson's statistic of every batch, with the correction for drawing without replacement, is chi-square.
    mean = BATCH / SHARDS
    statistic = ((mine - mean) ** 2 / mean).sum(1) * (ROWS - 1) / (ROWS - BATCH)
    assert statistic.mean() == pytest.approx(SHARDS - 1, rel=0.05)
    assert (statistic > chi2.ppf(0.99, SHARDS - 1)).mean() < 0.03
    assert mine.sum(0).std() < 0.01 * mine.sum(0).mean()
