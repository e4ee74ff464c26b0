"""The order is the product's core: a bijection for every n, uniform, without memory in n, and the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlc.data.order import AUGMENT, MIX, Draws, hash64, locate, permute, uniform

SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 17, 100, 255, 256, 257, 1000, 4097, 65_537]


@pytest.mark.parametrize("n", SIZES)
def test_permute_is_a_bijection(n):
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_any_size_and_key(n, key):
    assert len(np.unique(permute(np.arange(n), n, key))) == n


def test_permute_is_fixed_for_ever():
    """Golden values: if these change, every run in the world loses its exact resume."""
    assert permute(np.arange(10), 10, 0).tolist() == GOLDEN_10
    assert permute(np.array([0, 1, 2, 10**10 - 1]), 10**10, 42).tolist() == GOLDEN_1E10
    assert locate(np.array([0, 1, 4999, 5000, 5001, 12_345_678]), 5000, 42)[1].tolist() == GOLDEN_LOCATE
    assert int(hash64(1, 2, 3)[0]) == GOLDEN_HASH
    draws = Draws(42, AUGMENT, 7)
    assert [draws.bits(), draws.integer(1000), round(draws.uniform(), 12)] == GOLDEN_DRAWS


GOLDEN_10 = [3, 7, 4, 9, 6, 2, 1, 8, 0, 5]
GOLDEN_1E10 = [8863948628, 1216088662, 6334293776, 5805299245]
GOLDEN_LOCATE = [1312, 1382, 4185, 4217, 1960, 571]
GOLDEN_HASH = 15020427595393229491
GOLDEN_DRAWS = [15636203820027758812, 717, 0.447275186857]


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 24, 100])
def test_every_place_is_equally_likely(n):
    """Over many keys, the first and the last go everywhere equally often, and independently (chi-square)."""
    keys = np.arange(20_000)
    first, last = (permute(np.full(len(keys), i), n, keys) for i in (0, n - 1))
    assert stats.chisquare(np.bincount(first, minlength=n)).pvalue > 1e-4
    assert stats.chisquare(np.bincount(last, minlength=n)).pvalue > 1e-4
    if n <= 10:
        pairs = first * n + last
        possible = [a * n + b for a in range(n) for b in range(n) if a != b]
        assert stats.chisquare(np.bincount(pairs, minlength=n * n)[possible]).pvalue > 1e-4


def test_all_orders_of_four_are_equally_likely():
    """Every one of the 4! permutations, odd ones too: a bare Feistel network on two bits reaches only some of them."""
    keys = np.arange(24_000)
    places = np.stack([permute(np.full(len(keys), i), 4, keys) for i in range(4)], 1)
    _, counts = np.unique(places @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4


def test_epochs_are_uncorrelated():
    n = 5000
    epochs = [locate(np.arange(e * n, (e + 1) * n), n, seed=0)[1] for e in range(4)]
    for a in range(4):
        assert abs(stats.spearmanr(np.arange(n), epochs[a])[0]) < 0.06
        for b in range(a):
            assert abs(stats.spearmanr(epochs[a], epochs[b])[0]) < 0.06


def test_a_batch_out_of_ten_billion_needs_no_memory_in_n():
    import tracemalloc

    position = np.arange(10**10 * 3 + 5, 10**10 * 3 + 517)
    tracemalloc.start()
    epoch, row = locate(position, 10**10, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 and set(epoch) == {3} and len(set(row)) == 512 and row.max() < 10**10


def test_a_batch_across_the_end_of_an_epoch_equals_its_halves():
    n = 101
    together = locate(np.arange(90, 110), n, 3)
    one_by_one = [locate(p, n, 3) for p in range(90, 110)]
    assert together[0].tolist() == [int(e) for e, _ in one_by_one]
    assert together[1].tolist() == [int(r) for _, r in one_by_one]


def test_uniform_is_uniform_and_streams_are_independent():
    position = np.arange(100_000)
    a, b = uniform(42, AUGMENT, position), uniform(42, MIX, position)
    assert stats.kstest(a, "uniform").pvalue > 1e-4 and a.min() >= 0 and a.max() < 1
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.02


def test_draws_are_uniform_within_and_across_positions():
    across = [Draws(0, AUGMENT, p).uniform() for p in range(20_000)]
    one = Draws(0, AUGMENT, 5)
    within = [one.uniform() for _ in range(20_000)]
    assert stats.kstest(across, "uniform").pvalue > 1e-4 and stats.kstest(within, "uniform").pvalue > 1e-4
    integers = [one.integer(7) for _ in range(14_000)]
    assert stats.chisquare(np.bincount(integers, minlength=7)).pvalue > 1e-4


@pytest.mark.parametrize("i, n", [(5, 5), (-1, 5), (0, 0), (0, 2**63)])
def test_outside_the_domain_is_refused(i, n):
    with pytest.raises(ValueError):
        permute(np.array([i]), n, 0)
