"""Heads that look at the places of the feature map: a small object in a corner is lost in the mean over all of them.

Each class asks where it is: by a query of its own (ML-Decoder, Query2Label) or by its weights (residual attention).
All take the map float [B, H, W, D] of the backbone's last stage and return logits [B, C].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MlDecoder(nn.Module):
    """ML-Decoder (Ridnik et al. 2021): fixed random queries, one decoder layer, group-wise classifiers.

    The function of `timm.layers.ml_decoder.MLDecoder`, which the TransformerDecoder of today's PyTorch does not run.

    groups: queries, each of which serves C / groups classes; -1 for one per class, but at most 100.
    dim: width of the decoder, a multiple of `heads`; hidden: that of its MLP.
    """

    sees_map = True

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        groups: int = -1,
        dim: int = 768,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of heads, {heads}")
        groups = min(num_classes, groups if groups > 0 else 100)
        self.project = nn.Linear(features, dim)
        self.register_buffer("query", torch.randn(groups, dim))
        self.norm = nn.LayerNorm(dim)
        self.layer = _Layer(dim, heads, hidden, dropout, reads=("map",))
        self.drop = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(groups, dim, math.ceil(num_classes / groups)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x.flatten(1, 2)).relu()
        query = self.query.to(x.dtype).expand(len(x), -1, -1)
        y = self.layer(self.norm(query + self.drop(query)), 0.0, x, 0.0)
        return torch.einsum("bgd,gdk->bgk", y, self.weight).flatten(1)[:, : len(self.bias)] + self.bias

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class Query2Label(nn.Module):
    """Liu et al. 2021, "Query2Label": DETR's transformer with one learned query per class, and a classifier for each.

    dim: width of the transformer (default: that of the features), a multiple of 4 and of `heads`.
    encoder, decoder: numbers of layers.
    feedforward: hidden width of their MLPs (default: 4 dim).
    self_attention: of the queries among each other in the decoder; the authors' code removes it unless asked.
    """

    sees_map = True

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        dim: int | None = None,
        heads: int = 4,
        encoder: int = 1,
        decoder: int = 2,
        feedforward: int | None = None,
        dropout: float = 0.1,
        self_attention: bool = False,
    ):
        super().__init__()
        dim = dim or features
        if dim % 4 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of 4 and of heads, {heads}")
        self.project = nn.Linear(features, dim)
        self.query = nn.Parameter(torch.randn(num_classes, dim))
        common = {"dim": dim, "heads": heads, "hidden": feedforward or 4 * dim, "dropout": dropout}
        self.encoder = nn.ModuleList(_Layer(**common, reads=("self",)) for _ in range(encoder))
        reads = ("self", "map") if self_attention else ("map",)
        self.decoder = nn.ModuleList(_Layer(**common, reads=reads) for _ in range(decoder))
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.empty(num_classes, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        place = sine_positions(*x.shape[1:], x.device).flatten(0, 1)
        x = x.flatten(1, 2)
        for layer in self.encoder:
            x = layer(x, place)
        y = torch.zeros_like(self.query).expand(len(x), -1, -1)
        for layer in self.decoder:
            y = layer(y, self.query, x, place)
        return (self.norm(y) * self.weight).sum(-1) + self.bias

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class _Layer(nn.Module):
    """Of DETR's encoder or decoder, norms after the sums: attention to each of `reads`, then an MLP.

    Positions are added to what is compared, queries and keys, and not to the values.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, reads: tuple[str, ...]):
        super().__init__()
        self.attentions = nn.ModuleDict({name: Attention(dim, heads, dropout) for name in reads})
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in (*reads, "mlp"))
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.xavier_uniform_(self.fc2.weight)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor | float, memory: Tensor | None = None, place: Tensor | float | None = None
    ) -> Tensor:
        """x [B, N, dim] with its positions [N, dim], or 0 for none; memory [B, M, dim] with its own."""
        for (name, attention), norm in zip(self.attentions.items(), self.norms, strict=False):
            source, where = (x, position) if name == "self" else (memory, place)
            x = norm(x + self.drop(attention(x + position, source + where, source)))
        return self.norms[-1](x + self.drop(self.fc2(self.drop(self.fc1(x).relu()))))


class Attention(nn.Module):
    """torch's MultiheadAttention reads the weights of its last layer from outside, where a divided one is not whole."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, dim], [B, M, dim] twice -> [B, N, dim]; mask bool [B, M]: which of M are there, at least one."""
        mask = None if mask is None else mask[:, None, None]
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, q), (self.k, k), (self.v, v))
        )
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


def sine_positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """float32 [height, width, dim]: DETR's, half of it for the row and half for the column, each 1 ... n as a share of
    2 pi, in sines and cosines of wavelengths up to 10000 by turns."""
    half = dim // 2
    frequency = 10000 ** (-2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half)

    def encoded(n: int) -> Tensor:
        angle = torch.arange(1, n + 1, device=device)[:, None] * (2 * math.pi / n) * frequency
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), -1).flatten(1)

    rows, columns = encoded(height)[:, None].expand(-1, width, -1), encoded(width).expand(height, -1, -1)
    return torch.cat((rows, columns), -1)


_TEMPERATURES = {1: (1,), 2: (1,), 4: (1, 2, 4), 6: (1, 2, 3, 4, 5), 8: (1, 2, 3, 4, 5, 6, 7)}  # and the maximum


class Csra(nn.Module):
    """Zhu & Wu 2021, "Residual Attention": a class's mean score over all places + `lam` x its score where it is high.

    The second is weighted by a softmax over places of temperature T, the largest score for the last of several `heads`,
    whose logits are summed: 1 head has T = 1; 2 have 1 and the maximum; 4: 1, 2, 4; 6: 1 to 5; 8: 1 to 7, and the
    maximum. Scores are of weights of unit length; there is no bias.
    """

    sees_map = True

    def __init__(self, features: int, num_classes: int, *, heads: int = 1, lam: float = 0.1):
        super().__init__()
        if heads not in _TEMPERATURES:
            raise ValueError(f"heads {heads}: choose one of {', '.join(map(str, _TEMPERATURES))}")
        self.temperatures, self.lam = _TEMPERATURES[heads], lam
        bound = features**-0.5
        self.weight = nn.Parameter(torch.empty(heads, num_classes, features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=-1)
        scores = F.linear(x.flatten(1, 2), weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).float()  # [B, N, T, C]
        attended = [(s * (s * t).softmax(1)).sum(1) for t, s in zip(self.temperatures, scores.unbind(2), strict=False)]
        if len(self.weight) > 1:
            attended.append(scores[:, :, -1].amax(1))
        return scores.mean(1).sum(1) + self.lam * sum(attended)

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, None
