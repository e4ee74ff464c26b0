"""From the captions of an index to the tokens of a batch. Which of a sample's captions, whether it is dropped and which
of its words are hidden are drawn from (seed, position), like every other choice about a sample; so they do not depend
on world size, workers or micro-batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mlc.data.mixing import Mix
from mlc.data.order import CAPTION, uniform
from mlc.data.sampler import Sampler
from mlc.data.text import Tokenizer
from shards.captions import caption_texts, clean, most_captions, split_captions
from shards.dataset import Index

WHICH, DROPPED, HIDDEN = range(3)  # what is drawn for a position; HIDDEN and up: one for each place of a row


class TrainCaptions:
    """One caption a position, cleaned, at times dropped, some of its words hidden."""

    def __init__(
        self,
        indexes: Sequence[Index],
        tokenizer: Tokenizer,
        seed: int,
        *,
        clean: Sequence[str] = (),
        word_dropout: float = 0.0,
        caption_dropout: float = 0.0,
    ):
        """`indexes`: one for each data set of the sampler; `clean`: from `shards.captions.switches`."""
        self.indexes, self.tokenizer, self.seed, self.clean = list(indexes), tokenizer, seed, tuple(clean)
        self.word_dropout, self.caption_dropout = word_dropout, caption_dropout

    def __call__(self, position: np.ndarray, source: np.ndarray, row: np.ndarray) -> dict[str, Tensor]:
        """Positions of the stream, their data sets and rows, int64 [B] each -> `tokens` int64 and `token_mask` bool,
        [B, L]."""
        texts = self._drawn(position, source, row)
        tokens, mask = self.tokenizer([clean(text, self.clean) for text in texts])
        tokens = hide_words(tokens, mask, self.seed, position, self.word_dropout, tokenizer=self.tokenizer)
        return {"tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}

    def _drawn(self, position: np.ndarray, source: np.ndarray, row: np.ndarray) -> list[str]:
        """The caption of each position as it is in the data, "" where it is dropped."""
        texts = [self.indexes[s].caption(r) for s, r in zip(source.tolist(), row.tolist(), strict=True)]
        texts = draw_captions(texts, self.seed, position)
        return drop_captions(texts, self.seed, position, self.caption_dropout)

    def arranged(self, positions: Sequence[int], *, sampler: Sampler, together: int) -> list[int]:
        """The positions of a global batch in the order of `arrange`, for `loader.train_positions`. A caption's length
        is guessed from its characters, so that nothing is cleaned or tokenised for it."""
        position = np.asarray(positions, np.int64)
        texts = self._drawn(position, *sampler.locate(position))
        return position[arrange(np.array([len(text) for text in texts]), together)].tolist()


class EvalCaptions:
    """All captions of a sample, at most `most` of them, to be averaged."""

    def __init__(self, index: Index | None, tokenizer: Tokenizer, *, clean: Sequence[str] = (), most: int = 1):
        """`index` None: pictures without captions. K, the number of captions, is the same for all batches: `most`, or
        less where no sample of the index has so many."""
        self.index, self.tokenizer, self.clean = index, tokenizer, tuple(clean)
        self.views = 1 if index is None else min(most, most_captions(index))

    def __call__(self, rows: np.ndarray) -> dict[str, Tensor]:
        """int64 [B], -1 for padding -> `tokens` int64 and `token_mask` bool [B, K, L], `caption_weight` float32
        [B, K] that sums to 1 over K: the share of each caption in its sample's prediction."""
        texts = ["" if self.index is None or row < 0 else self.index.caption(row) for row in rows.tolist()]
        views, weight = caption_views(texts, self.views)
        tokens, mask = self.tokenizer([clean(text, self.clean) for captions in views for text in captions])
        shape = (*weight.shape, tokens.shape[1])
        return {
            "tokens": torch.from_numpy(tokens.reshape(shape)),
            "token_mask": torch.from_numpy(mask.reshape(shape)),
            "caption_weight": torch.from_numpy(weight),
        }


def cleaned(index: Index, chosen: Sequence[str], rows: np.ndarray | None = None) -> Iterator[str]:
    """Every caption of the rows (all), cleaned: what a vocabulary and word embeddings are made from."""
    for text in caption_texts(index, rows):
        yield from (clean(caption, chosen) for caption in split_captions(text))


# ---- one of several, while training ----------------------------------------------------------------------------------


def draw_captions(texts: Sequence[str], seed: int, position: np.ndarray) -> list[str]:
    """One of the captions (lines) of each sample, all equally likely; "" where it has none."""
    found = [split_captions(text) or [""] for text in texts]
    level = uniform(seed, CAPTION, position, WHICH)
    return [captions[int(u * len(captions))] for captions, u in zip(found, level.tolist(), strict=True)]


def drop_captions(texts: Sequence[str], seed: int, position: np.ndarray, prob: float) -> list[str]:
    """Each caption becomes empty with a probability, so that a model learns to work without one."""
    if not prob:
        return list(texts)
    dropped = uniform(seed, CAPTION, position, DROPPED) < prob
    return ["" if gone else text for text, gone in zip(texts, dropped.tolist(), strict=True)]


def hide_words(
    tokens: np.ndarray, mask: np.ndarray, seed: int, position: np.ndarray, prob: float, *, tokenizer: Tokenizer
) -> np.ndarray:
    """int64 [B, L] with each token that is not special replaced by the mask token (the unknown one where there is none)
    with a probability."""
    if not prob:
        return tokens
    places = HIDDEN + np.arange(tokens.shape[1])
    hidden = uniform(seed, CAPTION, np.asarray(position)[:, None], places) < prob
    return np.where(hidden & mask & ~np.isin(tokens, tokenizer.special), tokenizer.mask, tokens)


# ---- all of them, in prediction --------------------------------------------------------------------------------------


def caption_views(texts: Sequence[str], views: int) -> tuple[list[list[str]], np.ndarray]:
    """(captions [B][views], weights float32 [B, views]): the first captions of each sample with equal weights that sum
    to 1, padded with empty ones of weight 0; a sample without captions has an empty one of weight 1."""
    found = [split_captions(text)[:views] or [""] for text in texts]
    weight = np.zeros((len(found), views), np.float32)
    for place, captions in enumerate(found):
        weight[place, : len(captions)] = 1 / len(captions)
    return [captions + [""] * (views - len(captions)) for captions in found], weight


# ---- similar lengths together ----------------------------------------------------------------------------------------


def arrange(lengths: np.ndarray, together: int) -> np.ndarray:
    """int64 [G]: an order of a global batch in which captions of similar length are neighbours, so that micro-batches
    are padded less. Groups of `together` neighbours, which are mixed with each other, stay as they are; the order is
    a function of the global batch alone."""
    longest = lengths.reshape(-1, together).max(1)
    groups = np.argsort(longest, kind="stable")
    return (groups[:, None] * together + np.arange(together)).reshape(-1)


# ---- captions of mixed samples ---------------------------------------------------------------------------------------


def mixed_sources(mix: Mix) -> Tensor:
    """int64 [B, K], on the CPU: the samples of the micro-batch that each mixed sample shows, -1 for none; K is 2, or 4
    where some are grids."""
    place = np.arange(len(mix.lam))
    sources = np.full((len(place), 4 if mix.grids else 2), -1, np.int64)
    sources[:, 0] = place
    sources[:, 1] = np.where(mix.lam.numpy() < 1, place ^ 1, -1)
    for grid in mix.grids:
        shown = grid.sources.numpy()
        sources[grid.places.numpy(), : shown.shape[1]] = shown
    return torch.from_numpy(sources)


def join(tokens: Tensor, mask: Tensor, sources: Tensor, *, pad: int, starts: bool, most: int) -> tuple[Tensor, Tensor]:
    """Captions of mixed samples in one row, for mixing by `join`: [CLS a SEP b SEP], or a b of words.

    Args:
        tokens, mask: int64 and bool [B, L], as from a tokenizer.
        sources: int64 [B, K] from `mixed_sources`.
        pad, starts: the tokenizer's; with `starts`, of the later captions their first token is left out.
        most: rows are cut to so many tokens: no more than the encoder has places for.
    Returns:
        tokens and mask [B, at most K L]; made on any device without waiting for it.
    """
    picked = sources.clamp(min=0)
    own = mask[picked] & (sources >= 0).unsqueeze(2)  # [B, K, L]
    if starts:
        own[:, 1:, 0] = False
    own, joined = own.flatten(1), tokens[picked].flatten(1)
    width = min(most, own.shape[1] - (sources.shape[1] - 1 if starts else 0))
    order = torch.sort(own.logical_not().byte(), dim=1, stable=True).indices[:, :width]
    own = own.gather(1, order)
    return joined.gather(1, order).where(own, pad), own
