"""Drawing of captions: pure functions of (seed, position), in the right proportions, and the same in any batch."""

import pickle

import numpy as np
import pytest
import torch
from indexes import make_index
from tiny_tokenizers import word_pieces
from tokenizers import Tokenizer

from mlc.data.captions import (
    EvalCaptions,
    TrainCaptions,
    arrange,
    caption_views,
    cleaned,
    draw_captions,
    drop_captions,
    hide_words,
    join,
    mixed_sources,
)
from mlc.data.loader import plan_batches, train_positions
from mlc.data.mixing import Grid, Mix
from mlc.data.sampler import plain
from mlc.data.text import Words, pretrained_tokenizer
from shards.captions import most_captions

TEXTS = ["A dog\nA cat\nA bird", "", "one red two blue three green", "A dog", "a b c d e f g h", "Dog\n\n cat "]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("drawn"), len(TEXTS), 0, TEXTS)


def row_of(index, text: str) -> int:
    return next(row for row in range(len(index)) if index.caption(row) == text)


def test_one_of_several_is_drawn():
    position = np.arange(6000)
    drawn = draw_captions([TEXTS[0]] * len(position), 7, position)
    assert drawn == draw_captions([TEXTS[0]] * len(position), 7, position)
    assert draw_captions([TEXTS[0]] * 10, 7, position[500:510]) == drawn[500:510]
    counts = np.array([drawn.count(text) for text in ("A dog", "A cat", "A bird")])
    assert counts.sum() == len(drawn) and (abs(counts - 2000) < 5 * 37).all()  # 37: its standard deviation
    assert draw_captions([TEXTS[0]] * len(position), 8, position) != drawn
    assert draw_captions(["", "\n", "x"], 7, np.arange(3)) == ["", "", "x"]


def test_captions_are_dropped():
    position = np.arange(6000)
    dropped = drop_captions(["x"] * len(position), 1, position, 0.1)
    assert abs(dropped.count("") - 600) < 5 * 24
    assert drop_captions(["x"] * 10, 1, position[500:510], 0.1) == dropped[500:510]
    assert drop_captions(["x"] * 10, 1, position[:10], 0) == ["x"] * 10
    assert drop_captions(["x"] * 10, 1, position[:10], 1) == [""] * 10


def test_words_are_hidden():
    words = Words(["a", "b"], max_tokens=64)
    position = np.arange(500)
    tokens, mask = words(["a b " * (1 + p % 20) for p in position.tolist()])
    hidden = hide_words(tokens, mask, 3, position, 0.25, tokenizer=words)
    assert (hidden[~mask] == words.pad).all()
    changed = hidden != tokens
    assert (hidden[changed] == words.mask).all()
    assert abs(changed[mask].mean() - 0.25) < 5 * (0.25 * 0.75 / mask.sum()) ** 0.5
    some = hide_words(tokens[40:43, :20], mask[40:43, :20], 3, position[40:43], 0.25, tokenizer=words)
    assert (some == hidden[40:43, :20]).all()  # neither the batch nor its padding matters
    assert hide_words(tokens, mask, 3, position, 0, tokenizer=words) is tokens
    words.special = np.array([0, 2])
    assert (hide_words(tokens, mask, 3, position, 1, tokenizer=words)[mask] == np.where(tokens == 2, 2, 1)[mask]).all()


def test_training_batch(index):
    words = Words(["dog", "cat", "bird"], max_tokens=8)
    captions = TrainCaptions([index], words, 5, clean=("lower",))
    row = np.array([row_of(index, text) for text in ("", TEXTS[3], TEXTS[0])])
    batch = captions(np.array([7, 8, 9]), np.zeros(3, np.int64), row)
    assert batch["tokens"][:2].tolist() == [[1, 0], [1, 2]]  # an empty caption is one UNK
    assert batch["tokens"][2, 1] in (2, 3, 4)
    assert batch["token_mask"].tolist() == [[True, False], [True, True], [True, True]]
    assert (batch["tokens"].dtype, batch["token_mask"].dtype) == (torch.int64, torch.bool)
    again = pickle.loads(pickle.dumps(captions))(np.array([9]), np.zeros(1, np.int64), row[2:])
    assert again["tokens"].tolist() == batch["tokens"][2:].tolist()
    dropping = TrainCaptions([index], words, 5, caption_dropout=1.0)(np.arange(3), np.zeros(3, np.int64), row)
    assert dropping["tokens"].tolist() == [[1]] * 3


def test_all_captions_in_prediction(index):
    texts, weight = caption_views(["a\nb\nc", "", "d"], 2)
    assert texts == [["a", "b"], ["", ""], ["d", ""]]
    assert weight.tolist() == [[0.5, 0.5], [1, 0], [1, 0]]
    words = Words(["dog", "cat"], max_tokens=8)
    rows = np.array([row_of(index, TEXTS[5]), row_of(index, TEXTS[1]), -1])
    batch = EvalCaptions(index, words, clean=("lower",), most=5)(rows)
    assert batch["tokens"].tolist() == [[[2], [3], [1]], [[1]] * 3, [[1]] * 3]  # three: the most that any sample has
    assert batch["token_mask"].all()
    assert batch["caption_weight"].sum(1).tolist() == [1, 1, 1]
    single = EvalCaptions(index, words, clean=("lower",))(rows)
    assert single["tokens"].tolist() == [[[2]], [[1]], [[1]]]
    assert EvalCaptions(None, words)(np.array([3]))["tokens"].tolist() == [[[1]]]


def test_most_captions(tmp_path):
    """A last line that ends, as files' last lines do, is no caption more; without captions there is one, empty."""
    for number, (texts, most) in enumerate(((["a\n", "b\r\n", ""], 1), (["a\nb\nc\n", "d"], 3), (["", ""], 1))):
        index = make_index(tmp_path / str(number), len(texts), 0, texts)
        assert most_captions(index) == most
        assert EvalCaptions(index, Words(["a"]), most=2).views == min(most, 2)


def test_cleaned_captions(index):
    assert sorted(cleaned(index, ("lower",))) == sorted(
        ["a dog", "a cat", "a bird", "one red two blue three green", "a dog", "a b c d e f g h", "dog", "cat"]
    )
    rows = np.array([row_of(index, TEXTS[5]), row_of(index, TEXTS[3])])
    assert list(cleaned(index, (), rows)) == ["Dog", "cat", "A dog"]


@pytest.mark.parametrize("together", [1, 2, 4])
def test_similar_lengths_together(together):
    lengths = np.random.default_rng(0).integers(1, 40, 64)
    order = arrange(lengths, together)
    assert sorted(order.tolist()) == list(range(64))
    groups = order.reshape(-1, together)
    assert (groups % together == np.arange(together)).all()  # each group whole and as it was
    assert (np.diff(groups, axis=1) == 1).all()
    assert (np.diff(lengths[order].reshape(-1, together).max(1)) >= 0).all()

    def padded(order):
        return lengths[order].reshape(-1, 8).max(1).sum()

    assert padded(order) < padded(np.arange(64))


@pytest.mark.parametrize("world, batch", [(1, 24), (1, 4), (2, 4), (3, 8)])
def test_arranged_positions_are_the_same_global_batch(index, world, batch):
    captions, sampler = TrainCaptions([index], Words(["a"]), 5, caption_dropout=0.2), plain(index, 5)
    plan = plan_batches(24, batch, world, together=4)

    def arranged(positions):
        return captions.arranged(positions, sampler=sampler, together=4)

    ranks = [list(train_positions(48, 96, plan, rank, arranged)) for rank in range(world)]
    steps = len(ranks[0]) // 2
    for start, micro in ((48, slice(steps)), (72, slice(steps, None))):
        in_turn = [own for parts in zip(*(rank[micro] for rank in ranks), strict=True) for own in parts]
        in_turn = [position for own in in_turn for position in own]
        assert in_turn == arranged(range(start, start + 24))
        assert sorted(in_turn) == list(range(start, start + 24))
    assert all(own[i] // 4 == own[i + 3] // 4 for rank in ranks for own in rank for i in range(0, batch, 4))
    position = np.array(arranged(range(48, 72)))
    texts = draw_captions([index.caption(row) for row in sampler.locate(position)[1]], 5, position)
    texts = drop_captions(texts, 5, position, 0.2)
    longest = [max(map(len, texts[i : i + 4])) for i in range(0, 24, 4)]
    assert longest == sorted(longest)


# ---- captions joined -------------------------------------------------------------------------------------------------


def test_joined_pieces(tmp_path):
    made = pretrained_tokenizer(str(word_pieces(tmp_path)))
    made.save(tmp_path)
    texts = ["a blue zero", "", "something red and a palace", "a one"]
    tokens, mask = map(torch.from_numpy, made(texts))
    sources = torch.tensor([[0, 1], [1, 0], [2, -1], [3, 2]])
    joined, own = join(tokens, mask, sources, pad=made.pad, starts=made.starts, most=100)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    pairs = [(texts[a], None if b < 0 else texts[b]) for a, b in sources.tolist()]
    expected = [theirs.encode(*pair).ids for pair in pairs]
    assert [row[keep].tolist() for row, keep in zip(joined, own, strict=True)] == expected
    assert joined.shape == (4, 2 * tokens.shape[1] - 1)
    assert (joined[~own] == made.pad).all()
    assert (own.long().diff(dim=1) <= 0).all()  # padded on the right


def test_joined_words():
    made = Words(["a", "b", "c"])
    tokens, mask = map(torch.from_numpy, made(["a b", "", "c", "b"]))
    sources = torch.tensor([[0, 2, 3, 1], [1, -1, -1, -1], [2, 0, -1, -1], [3, 3, -1, -1]])
    joined, own = join(tokens, mask, sources, pad=0, starts=False, most=100)
    assert [row[keep].tolist() for row, keep in zip(joined, own, strict=True)] == [
        [2, 3, 4, 3, 1],
        [1],
        [4, 2, 3],
        [3, 3],
    ]
    assert joined.shape == (4, 8)
    cut, own = join(tokens, mask, sources, pad=0, starts=False, most=3)
    assert cut.tolist() == [[2, 3, 4], [1, 0, 0], [4, 2, 3], [3, 3, 0]]
    assert (own == (cut != 0)).all()


def test_who_is_in_a_mixed_sample():
    lam = torch.tensor([0.3, 0.3, 1, 1, 1, 1, 0.9, 0.9])
    pairs = Mix(lam, torch.zeros(8, 4, dtype=torch.int64))
    expected = [[0, 1], [1, 0], [2, -1], [3, -1], [4, -1], [5, -1], [6, 7], [7, 6]]
    assert mixed_sources(pairs).tolist() == expected
    grids = (
        Grid((1, 2), torch.tensor([2]), torch.tensor([[3, 0]])),
        Grid((2, 2), torch.tensor([4, 5]), torch.tensor([[7, 5, 4, 6], [4, 5, 6, 7]])),
    )
    expected = [[*pair, -1, -1] for pair in expected]
    expected[2], expected[4], expected[5] = [3, 0, -1, -1], [7, 5, 4, 6], [4, 5, 6, 7]
    assert mixed_sources(Mix(lam, pairs.boxes, grids)).tolist() == expected
    for place, (_, sources, _) in enumerate(Mix(lam, pairs.boxes, grids).described()):  # which says the same
        assert {place, *sources} - {-1} >= set(expected[place]) - {-1} >= set(sources)
