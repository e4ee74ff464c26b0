"""Extra places of an epoch: the ordinary rows as often as without them, the listed ones once more, a pure function."""

import pickle
from collections import Counter

import numpy as np
import pytest
from indexes import make_index

from mlc.data.hard import HardRows
from mlc.data.sampler import Rows, Sampler

SEED = 7


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("a"), 300, seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("b"), 90, seed=1)


def alone(rows: Rows) -> Sampler:
    return Sampler([rows], [None], SEED)


def epoch_of(sampler: Sampler, number: int) -> Counter:
    n = sampler.epoch_samples
    return Counter(sampler.locate(np.arange(number * n, (number + 1) * n))[1].tolist())


@pytest.mark.parametrize("block", [0, 20])
def test_an_epoch_is_every_row_and_the_listed_ones_once_more(index, block):
    rows = Rows(index, SEED, hard=0.05, block=block)
    sampler = alone(rows)
    assert sampler.epoch_samples == 315 and len(rows.hard) == 15
    first = rows.hard.lists[0]
    assert len(set(first.tolist())) == 15
    lists = {1: np.arange(100, 115), 2: np.arange(0, 150, 10)}
    before = epoch_of(sampler, 0)
    rows.hard.add(1, lists[1])
    assert epoch_of(sampler, 0) == before == Counter(range(300)) + Counter(first.tolist())
    assert epoch_of(sampler, 1) == Counter(range(300)) + Counter(lists[1].tolist())
    rows.hard.add(2, lists[2])
    assert epoch_of(sampler, 1) == Counter(range(300)) + Counter(lists[1].tolist())
    assert epoch_of(sampler, 5) == Counter(range(300)) + Counter(lists[2].tolist())  # no newer one
    assert list(rows.hard.lists) == [1, 2]


def test_a_batch_over_the_end_of_an_epoch_takes_each_list_in_its_own(index):
    rows = Rows(index, SEED, hard=0.2)
    sampler = alone(rows)
    rows.hard.add(1, np.arange(60))
    n = sampler.epoch_samples
    at_once = sampler.locate(np.arange(n - 50, n + 50))[1]
    one_by_one = [int(sampler.locate(np.array([p]))[1][0]) for p in range(n - 50, n + 50)]
    assert at_once.tolist() == one_by_one
    again = pickle.loads(pickle.dumps(sampler))
    assert np.array_equal(again.locate(np.arange(n - 50, n + 50))[1], at_once)


def test_nothing_changes_without_it(index):
    plain, none = alone(Rows(index, SEED)), alone(Rows(index, SEED, hard=0.0))
    position = np.arange(1000)
    assert np.array_equal(plain.locate(position)[1], none.locate(position)[1])
    assert plain.fingerprint == none.fingerprint != alone(Rows(index, SEED, hard=0.1)).fingerprint


def test_known_errors_give_one_list_for_all_epochs(index):
    hardness = np.random.default_rng(0).random(300)
    rows = Rows(index, SEED, hard=0.1, hardness=hardness)
    worst = np.argsort(-hardness)[:30]
    assert set(rows.hard.lists[0].tolist()) == set(worst.tolist())
    assert epoch_of(alone(rows), 3) == Counter(range(300)) + Counter(worst.tolist())
    other = Rows(index, SEED, hard=0.1, hardness=hardness[::-1])
    assert other.fingerprint != rows.fingerprint


def test_rows_that_take_no_part_are_never_hard(index):
    few = np.arange(0, 300, 3)
    rows = Rows(index, SEED, rows=few, hard=0.1, hardness=np.arange(300.0))
    assert set(rows.hard.lists[0].tolist()) == set(few[-10:].tolist())
    weighted = Rows(index, SEED, sampler="weights:weight", hard=1.0, hardness=np.ones(300))
    assert set(weighted.hard.lists[0].tolist()) == set(np.flatnonzero(index.weight > 0).tolist())
    repeated = Rows(index, SEED, repeats={0: 3}, hard=0.1)
    extra = epoch_of(alone(repeated), 0) - epoch_of(alone(Rows(index, SEED, repeats={0: 3})), 0)
    assert extra == Counter(repeated.hard.lists[0].tolist())


def test_weighted_draws_are_as_frequent_as_without(index):
    weights = index.weight.astype(float)
    rows = Rows(index, SEED, sampler="weights:weight", hard=0.1, hardness=np.zeros(300))
    counts = sum((epoch_of(alone(rows), e) for e in range(50)), Counter())
    hard = Counter(dict.fromkeys(rows.hard.lists[0].tolist(), 50))
    drawn = np.array([counts[row] - hard[row] for row in range(300)])
    assert drawn.sum() == 300 * 50 and not drawn[weights == 0].any()
    expected = weights / weights.sum() * 300 * 50
    assert np.abs(drawn - expected).max() <= 50  # within one a draw and epoch


def test_beside_another_data_set_the_list_is_for_the_epochs_of_the_run(index, other):
    rows = Rows(index, SEED, hard=0.1)
    sampler = Sampler([rows, Rows(other, 3)], [None, 0.5], SEED)
    rows.hard.add(1, np.full(30, 299))
    n = sampler.epoch_samples
    assert n == 660
    source, row = sampler.locate(np.arange(2 * n))
    extra = [int(((source == 0) & (row == 299))[e * n : (e + 1) * n].sum()) for e in (0, 1)]
    assert extra[0] <= 2 and extra[1] >= 20  # positions take turns, so its own epoch is not quite the run's


def test_ties_go_to_the_first_rows():
    hard = HardRows(np.array([2, 3, 5, 8, 9]), 3, SEED)
    assert hard.hardest(np.array([9, 9, 1, 2, 9, 2, 9, 9, 2, 0.5])).tolist() == [3, 5, 8]
