"""Every sampler is a pure function of the position: exact within an epoch, as frequent as it says, fixed for ever."""

import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexes import make_index
from scipy import stats

from mlc.data.order import locate
from mlc.data.sampler import (
    WINDOW_BLOCKS,
    Rows,
    Sampler,
    Shuffle,
    parse_data,
    parse_oversample,
    parse_shuffle,
    row_repeats,
    row_weights,
    source_seed,
)
from shards.console import UserError

WEIGHTED = ["log-freq", "sqrt-freq", "class-balanced", "weights:weight"]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("a"), 700, seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("b"), 90, seed=1)


def drawn(sampler: Sampler, count: int) -> np.ndarray:
    return sampler.locate(np.arange(count))[1]


def alone(rows: Rows) -> Sampler:
    return Sampler([rows], [None], rows.seed)


# ---- orders ----------------------------------------------------------------------------------------------------------


def test_uniform_is_the_order_that_runs_had_before_there_were_samplers(index):
    position = np.arange(3 * 700 + 5)
    source, row = alone(Rows(index, seed=42)).locate(position)
    assert np.array_equal(row, locate(position, 700, 42)[1]) and not source.any()
    few = np.flatnonzero(index.fold != 0)
    assert np.array_equal(drawn(alone(Rows(index, 42, rows=few)), 1000), few[locate(np.arange(1000), len(few), 42)[1]])


@given(n=st.integers(1, 700), block=st.integers(1, 120), seed=st.integers(0, 2**63))
def test_a_block_shuffle_has_every_row_once_an_epoch(n, block, seed):
    epoch, row = Shuffle(n, seed, block)(np.arange(2 * n))
    assert epoch.tolist() == [0] * n + [1] * n
    assert all(np.array_equal(np.sort(row[e * n : (e + 1) * n]), np.arange(n)) for e in (0, 1))


def test_a_block_shuffle_stays_inside_a_few_blocks_and_shuffles_them_well():
    n, block = 100_000, 500
    shuffle = Shuffle(n, 3, block)
    window = block * WINDOW_BLOCKS
    epochs = [shuffle(np.arange(e * n, (e + 1) * n))[1] for e in range(3)]
    for rows in epochs:
        touched = [len(np.unique(rows[first : first + window] // block)) for first in range(0, n - window, window)]
        assert max(touched) <= 2 * WINDOW_BLOCKS + 1  # blocks are cut anywhere, so each may lie in two
        inside = rows[:window]
        assert abs(stats.spearmanr(np.arange(window), inside)[0]) < 0.06
        assert abs(stats.spearmanr(np.arange(n), rows)[0]) < 0.2  # 200 blocks: sd 0.07
    first_blocks = {tuple(np.unique(rows[:window] // block)) for rows in epochs}
    assert len(first_blocks) == 3


def test_every_row_is_equally_likely_at_every_place_of_a_block_shuffle():
    n, epochs = 23, np.arange(6000)
    shuffle = Shuffle(n, 1, 3)
    first = np.stack([shuffle(epochs * n + place)[1] for place in (0, 11, n - 1)], 1)
    assert [shuffle(np.array([5 * n]))[1][0], shuffle(np.array([7 * n + 11]))[1][0]] == [first[5, 0], first[7, 1]]
    for place in first.T:
        assert stats.chisquare(np.bincount(place, minlength=n)).pvalue > 1e-4


# ---- weights ---------------------------------------------------------------------------------------------------------


def brute_force_weights(index, sampler: str) -> np.ndarray:
    """Row by row from the definition; float."""
    labels = [index.labels(row).tolist() or ["none"] for row in range(len(index))]
    count: dict = {}
    for row in labels:
        for c in row:
            count[c] = count.get(c, 0) + 1
    of_class = {"log-freq": lambda n: np.log(1 + n), "sqrt-freq": np.sqrt, "class-balanced": lambda n: 1.0}[sampler]
    return np.array([sum(of_class(count[c]) / count[c] for c in row) for row in labels])


@pytest.mark.parametrize("sampler", WEIGHTED[:3])
def test_weights_follow_the_definition(index, sampler):
    ours, theirs = row_weights(index, sampler, None), brute_force_weights(index, sampler)
    assert np.allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-5)


@pytest.mark.parametrize("sampler", WEIGHTED)
@pytest.mark.parametrize("block", [0, 50])
def test_rows_are_drawn_as_often_as_their_weights_say(index, sampler, block):
    weights = index.weight.astype(float) if ":" in sampler else brute_force_weights(index, sampler)
    epochs = 200
    counts = np.bincount(drawn(alone(Rows(index, 7, sampler=sampler, block=block)), 700 * epochs), minlength=700)
    expected = weights / weights.sum() * 700 * epochs
    assert not counts[weights == 0].any()
    assert stats.chisquare(counts[weights > 0], expected[weights > 0], sum_check=False).pvalue > 1e-4
    one = np.bincount(drawn(alone(Rows(index, 7, sampler=sampler, block=block)), 700), minlength=700)
    assert np.abs(one - expected / epochs).max() < 2  # within an epoch as even as can be


@pytest.mark.parametrize("sampler", WEIGHTED)
def test_the_draws_are_not_only_right_on_average(index, sampler):
    """A row's place within the epoch is uniform, and one epoch says nothing about the next."""
    rows = Rows(index, 7, sampler=sampler)
    epochs = [drawn(alone(rows), 700 * 2)[e * 700 : (e + 1) * 700] for e in (0, 1)]
    assert abs(stats.spearmanr(*epochs)[0]) < 0.13 and abs(stats.spearmanr(epochs[0], np.arange(700))[0]) < 0.13


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": np.arange(0, 700, 3)},
        {"repeats": {0: 3, 2: 5}},
        {"rows": np.arange(100, 500), "repeats": {0: 3}},
        *({"sampler": name} for name in WEIGHTED),
        {"sampler": "log-freq", "rows": np.arange(100, 500)},
        {"sampler": "log-freq", "repeats": {1: 4}, "block": 30},
    ],
)
def test_expected_frequencies_are_those_that_come(index, options, monkeypatch):
    monkeypatch.setattr("mlc.data.sampler.CHUNK", 64)
    sampler, draws = alone(Rows(index, 3, **options)), 60
    count = draws * sampler.epoch_samples
    seen = index.targets(drawn(sampler, count)).mean(0)
    expected = sampler.expected_frequencies()
    if "sampler" not in options:
        assert np.allclose(seen, expected, atol=1e-9)  # whole epochs: exact
    z = (seen - expected) / np.sqrt(expected * (1 - expected) / count + 1e-12)
    assert np.abs(z).max() < 4
    assert not np.allclose(expected, index.targets(np.arange(700)).mean(0), atol=0.004) or not options


def test_class_balanced_makes_a_rare_class_frequent(index):
    before = index.targets(np.arange(700)).mean(0)
    after = Rows(index, 0, sampler="class-balanced").expected_frequencies()
    rare, common = 2, 0
    assert after[rare] > 5 * before[rare] and after[common] < before[common]


@pytest.mark.parametrize("sampler", WEIGHTED)
def test_how_far_an_epoch_is_from_the_expected_numbers(index, sampler):
    """Less than 2, and less than 1 within a stratum. That 1 is passed, of a row across a border, is
    part of the order that is fixed for ever."""
    most = []
    for seed in range(20):
        rows = Rows(index, seed, sampler=sampler, block=(0, 64)[seed % 2])
        ends = rows._ends / rows._ends[-1] * len(rows)
        begins = np.concatenate([[0], ends[:-1]])
        counts = np.bincount(rows.locate(np.arange(len(rows))), minlength=len(rows))
        far = np.abs(counts - (ends - begins))
        assert (far < 2).all()
        assert (far[np.floor(begins) == np.floor(ends)] < 1).all()
        most.append(far.max())
    assert max(most) > 1


def test_weights_that_mean_nothing_are_refused(index):
    with pytest.raises(UserError, match=r"--sampler sqrt-feq: use one of .*did you mean sqrt-freq"):
        Rows(index, 0, sampler="sqrt-feq")
    with pytest.raises(UserError, match="--sampler weights:colour: the index has no such numbers"):
        Rows(index, 0, sampler="weights:colour")
    zero = np.flatnonzero(index.weight == 0)
    with pytest.raises(UserError, match="must be finite, not negative, and not all 0"):
        Rows(index, 0, sampler="weights:weight", rows=zero)


# ---- repeats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 40])
def test_oversampled_rows_come_that_often_in_every_epoch(index, block):
    rows = Rows(index, 5, repeats={0: 3, 2: 5}, block=block)
    labels = [set(index.labels(row).tolist()) for row in range(700)]
    times = np.array([5 if 2 in row else 3 if 0 in row else 1 for row in labels])
    assert np.array_equal(row_repeats(index, {0: 3, 2: 5}, None), times) and len(rows) == times.sum()
    for epoch in range(3):
        place = np.arange(epoch * len(rows), (epoch + 1) * len(rows))
        assert np.array_equal(np.bincount(rows.locate(place), minlength=700), times)


def test_oversample_is_read_and_refused(index):
    dataset = SimpleNamespace(classes=("cat", "tag::a=b", "dog"))
    assert parse_oversample(["cat=3", "tag::a=b=2"], dataset) == {0: 3, 1: 2}
    for text, words in (("cta=3", "no class 'cta'; did you mean cat"), ("cat=0", "K is how many"), ("cat", "no class")):
        with pytest.raises(UserError, match=words):
            parse_oversample([text], dataset)


# ---- several data sets -----------------------------------------------------------------------------------------------


def mixture(index, other, shares, **options) -> Sampler:
    return Sampler(
        [Rows(index, source_seed(9, 0), **options), Rows(other, source_seed(9, 1), **options)], shares, seed=9
    )


@pytest.mark.parametrize(
    "shares, b", [([None, 0.3], 0.3), ([None, None], 90 / 790), ([3, 1], 0.25), ([0.999, None], 0.001)]
)
def test_shares_are_exact_in_every_window_and_each_data_set_is_a_stream_of_its_own(index, other, shares, b):
    sampler = mixture(index, other, shares)
    source, row = sampler.locate(np.arange(4096 * 20))
    for first in range(0, len(source), 4096):
        assert abs((source[first : first + 4096] == 1).sum() - 4096 * b) <= 1
    assert abs((source == 1).mean() - b) < 1e-4
    for number, part in enumerate((index, other)):
        own = row[source == number]
        counts = np.bincount(own, minlength=len(part))
        assert counts.max() - counts.min() <= 1 + (len(own) % len(part) > 0)
    assert sampler.epoch_samples == round(700 / (1 - b))


def test_three_data_sets_and_their_frequencies(index, other):
    sampler = Sampler([Rows(index, 1), Rows(other, 2), Rows(other, 3)], [0.5, 0.2, None], seed=4)
    source, row = sampler.locate(np.arange(70_000))
    assert np.allclose(np.bincount(source) / 70_000, [0.5, 0.2, 0.3], atol=1e-3)
    targets = np.where((source == 0)[:, None], index.targets(row % 700), other.targets(row % 90))
    assert np.allclose(targets.mean(0), sampler.expected_frequencies(), atol=3e-3)
    together = 0.5 * Rows(index, 1).expected_frequencies() + 0.5 * Rows(other, 1).expected_frequencies()
    assert np.allclose(sampler.expected_frequencies(), together)


def test_partners_of_mixing_come_from_either_data_set(index, other):
    """Positions 2k and 2k + 1: with equal shares all four pairings are equally frequent."""
    source, _ = mixture(index, other, [1, 1]).locate(np.arange(40_960))
    pairs = np.bincount(source[::2] * 2 + source[1::2], minlength=4)
    assert stats.chisquare(pairs).pvalue > 1e-4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("shards", ("shards", None)),
        ("a/b:0.3", ("a/b", 0.3)),
        ("b:2", ("b", 2.0)),
        ("b:.5", ("b", 0.5)),
        ("http://host:8000", ("http://host:8000", None)),
        ("http://host:8000/a:0.5", ("http://host:8000/a", 0.5)),
        ("s3://bucket/a", ("s3://bucket/a", None)),
        ("s3://bucket/a:3", ("s3://bucket/a", 3.0)),
        ("odd:name", ("odd:name", None)),
    ],
)
def test_data_flag(text, expected):
    assert parse_data(text) == expected


def test_a_folder_with_a_number_behind_a_colon_and_a_share_of_nothing(tmp_path):
    (tmp_path / "a:1").mkdir()
    assert parse_data(f"{tmp_path}/a:1") == (f"{tmp_path}/a:1", None)
    with pytest.raises(UserError, match="the share of a data set must be above 0"):
        parse_data("a:0.0")


def test_shares_that_leave_nothing_are_refused(index, other):
    with pytest.raises(UserError, match=r"the shares add up to 1\.2 and leave nothing"):
        mixture(index, other, [None, 1.2])


# ---- purity ----------------------------------------------------------------------------------------------------------

MAKERS = {
    "uniform": lambda a, b: alone(Rows(a, 42)),
    "block": lambda a, b: alone(Rows(a, 42, block=40)),
    "log-freq": lambda a, b: alone(Rows(a, 42, sampler="log-freq")),
    "weights": lambda a, b: alone(Rows(a, 42, sampler="weights:weight", block=40)),
    "oversample": lambda a, b: alone(Rows(a, 42, repeats={0: 3, 2: 5})),
    "mixture": lambda a, b: mixture(a, b, [None, 0.3], sampler="class-balanced"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_position_means_the_same_whoever_asks_and_when(index, other, name):
    sampler = MAKERS[name](index, other)
    whole = np.stack(sampler.locate(np.arange(240)), 1)
    for world, batch in ((1, 24), (2, 6), (3, 4), (4, 2)):
        pieces = [np.arange(first, first + batch) for first in range(0, 240, batch)]
        again = pickle.loads(pickle.dumps(sampler))
        ranks = [[np.stack(again.locate(p), 1) for p in pieces[rank::world]] for rank in range(world)]
        assert np.array_equal(np.concatenate([ranks[i % world][i // world] for i in range(len(pieces))]), whole)
    far = np.array([10**12, 10**12 + 1])
    assert [np.stack(sampler.locate(far[i : i + 1]), 1).tolist()[0] for i in (0, 1)] == np.stack(
        sampler.locate(far), 1
    ).tolist()


@pytest.mark.parametrize("name", MAKERS)
def test_the_order_is_fixed_for_ever(index, other, name):
    """Golden values: if these change, every run in the world with this sampler loses its exact resume."""
    position = np.array([0, 1, 2, 699, 700, 123_456, 10**9])
    assert [x.tolist() for x in MAKERS[name](index, other).locate(position)] == GOLDEN[name]


GOLDEN = {
    "uniform": [[0, 0, 0, 0, 0, 0, 0], [686, 539, 213, 156, 671, 290, 224]],
    "block": [[0, 0, 0, 0, 0, 0, 0], [341, 175, 601, 164, 431, 49, 164]],
    "log-freq": [[0, 0, 0, 0, 0, 0, 0], [683, 536, 186, 137, 665, 268, 196]],
    "weights": [[0, 0, 0, 0, 0, 0, 0], [333, 176, 603, 161, 423, 49, 162]],
    "oversample": [[0, 0, 0, 0, 0, 0, 0], [189, 639, 107, 182, 252, 537, 597]],
    "mixture": [[0, 1, 0, 0, 1, 0, 0], [178, 1, 57, 406, 83, 321, 619]],
}


def test_a_block_shuffle_of_ten_billion_rows_needs_no_memory():
    shuffle = Shuffle(10**10, 1, 100_000)
    tracemalloc.start()
    epoch, row = shuffle(np.arange(10**10 * 3 + 5, 10**10 * 3 + 517))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 and set(epoch) == {3} and len(set(row)) == 512


@pytest.mark.parametrize("text, block", [("global", 0), ("block:1", 1), ("block:10000", 10_000)])
def test_shuffle_flag(text, block):
    assert parse_shuffle(text) == block


@pytest.mark.parametrize("text", ["blocks:5", "block:", "block:0", "block:-3", "block:1e3", "none"])
def test_shuffle_flag_refused(text):
    with pytest.raises(UserError, match=f"--shuffle {text}: use global, or block:N"):
        parse_shuffle(text)
