"""One vector per caption out of one per token. A mask says which tokens count, so that padding changes nothing."""

import torch
from torch import Tensor, nn

POOLS = ("cls", "mean", "attention")


class AttentionPool(nn.Module):
    """The weighted mean of the places, weights softmax(v . tanh(W x + b)): Yang et al. 2016, "Hierarchical Attention
    Networks", equations 5 to 7. Sequence [B, L, D] -> float32 [B, D].
    """

    def __init__(self, features: int):
        super().__init__()
        self.project, self.score = nn.Linear(features, features), nn.Linear(features, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(self.project(x).tanh()).squeeze(-1).float()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        return (weights[..., None] * x.float()).sum(1)


class Cls(nn.Module):
    """The first token's features, which is where encoders are pretrained to put what is about the whole text."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, 0]


class Mean(nn.Module):
    """The mean over the real tokens. Sequence [B, L, D] -> float32 [B, D]."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        real = mask[..., None]
        return (x.float() * real).sum(1) / real.sum(1)


def pooling(kind: str, features: int) -> nn.Module:
    """Module (sequence float [B, L, D], mask bool [B, L] with a token in every row) -> [B, D]; `kind` one of POOLS."""
    if kind == "attention":
        return AttentionPool(features)
    return {"cls": Cls, "mean": Mean}[kind]()
