"""The small text encoder: word vectors and one recurrent layer in both directions, a hundredth of BERT's size.

Captions of a few words have little grammar to learn, and a competition that limits the size of a model leaves no room
for more. Lengths stay on the device: the walk from the right end begins at each caption's own last word because its
words are turned round, where packed sequences would have the host wait for the lengths in every step.
"""

import torch
from torch import Tensor, nn

from mlc.models.recurrent import states_of
from mlc.models.text_pool import AttentionPool

PAD = 0  # the row of zeros
_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class BiGru(nn.Module):
    """Tokens int64 [B, L], mask bool [B, L] -> (states float [B, L, 2 hidden], pooled float [B, 2 hidden]).

    Real tokens come first in a row, and every row has one. States of padding mean nothing.

    vocabulary: number of words, of which 0 is padding.
    embeddings: word vectors [vocabulary, dim] to start from; random ones of about length 1 without.
    dim: width of the word vectors; None for that of `embeddings`, else 150.
    hidden: width of the state in each direction.
    cell: `gru` or `lstm`.
    attention: pool by additive attention; else the last state of both directions, which has seen all words.
    norm: batch norm of the pooled features.
    dropout: of word vectors and pooled features.

    Raises:
        ValueError: arguments that make no encoder.
    """

    any_length, max_tokens = True, None

    def __init__(
        self,
        vocabulary: int,
        *,
        embeddings: Tensor | None = None,
        dim: int | None = None,
        hidden: int = 128,
        cell: str = "gru",
        attention: bool = True,
        norm: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        if cell not in _CELLS:
            raise ValueError(f"cell {cell}: choose gru or lstm")
        dim = dim or (150 if embeddings is None else embeddings.shape[1])
        if embeddings is not None and embeddings.shape != (vocabulary, dim):
            raise ValueError(f"embeddings are {list(embeddings.shape)}, not [{vocabulary} words, dim {dim}]")
        self.settings = {"vocabulary": vocabulary, "dim": dim, "hidden": hidden, "cell": cell}
        self.settings |= {"attention": attention, "norm": norm, "dropout": dropout}
        self.num_features = 2 * hidden
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        _fill(self.embedding.weight, embeddings)
        self.onward, self.back = (_CELLS[cell](dim, hidden, batch_first=True) for _ in range(2))
        self.pool = AttentionPool(2 * hidden) if attention else None
        self.norm = nn.BatchNorm1d(2 * hidden) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        words = self.drop(self.embedding(tokens))
        turn = _turned(token_mask)
        onward = states_of(self.onward, words)
        back = _take(states_of(self.back, _take(words, turn)), turn)
        states = torch.cat((onward, back), -1)
        if self.pool is not None:
            pooled = self.pool(states, token_mask)
        else:
            pooled = torch.cat((_take(onward, turn[:, :1])[:, 0], back[:, 0]), -1)
        return states, self.drop(self.norm(pooled))


@torch.no_grad()
def _fill(weight: Tensor, embeddings: Tensor | None) -> None:
    if embeddings is None:
        weight.normal_(std=weight.shape[1] ** -0.5)
    else:
        weight.copy_(embeddings)
    weight[PAD] = 0


def _turned(mask: Tensor) -> Tensor:
    """int64 [B, L]: the place of each word in the caption read from its end; padding stays where it is."""
    place, length = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True)
    return torch.where(place < length, length - 1 - place, place)


def _take(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
