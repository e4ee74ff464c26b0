"""Heads in which labels inform each other: where there is a horse, a rider is likelier, whatever the pixels say.

Both take features and return logits [B, C].
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlc.models.recurrent import states_of


class Lstm(nn.Module):
    """A linear classifier, and an LSTM that walks over its logits in both directions and corrects them.

    The input of a step is a label's logit and a learned embedding of it. The correction begins at zero, so that the
    untrained head is `linear`. Takes pooled features [B, D].

    embed, hidden: widths of the embeddings and of the LSTM's state in each direction.
    """

    sees_map = False

    def __init__(self, features: int, num_classes: int, *, embed: int = 64, hidden: int = 128):
        super().__init__()
        self.linear = nn.Linear(features, num_classes)
        self.embedding = nn.Parameter(torch.randn(num_classes, embed))
        self.lstm = nn.LSTM(1 + embed, hidden, batch_first=True, bidirectional=True)
        self.correction = nn.Linear(2 * hidden, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        labels = self.embedding.to(logits.dtype).expand(len(x), -1, -1)
        states = states_of(self.lstm, torch.cat((logits[..., None], labels), -1))
        return logits + self.correction(states).squeeze(-1)

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.linear.weight, self.linear.bias


class Gcn(nn.Module):
    """ML-GCN (Chen et al. 2019): two graph convolutions make the classifiers [C, D] from embeddings of the labels.

    Labels are neighbours where one is frequent among the samples of the other. Features are the maximum over the
    places of the map [B, H, W, D]. Where the paper has GloVe vectors of the names, embeddings are learned here.

    cooccurrence: samples that have label i and j, [C, C]; None where loaded weights bring the graph.
    embed, hidden: widths of the embeddings and between the convolutions.
    tau, p: as in `label_graph`.
    """

    sees_map = True

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        cooccurrence: np.ndarray | None = None,
        embed: int = 300,
        hidden: int = 1024,
        tau: float = 0.4,
        p: float = 0.2,
    ):
        super().__init__()
        if not (0 < tau <= 1 and 0 <= p < 1):
            raise ValueError(f"tau {tau} must be in (0, 1], p {p} in [0, 1)")
        graph = torch.eye(num_classes) if cooccurrence is None else label_graph(cooccurrence, tau, p)
        self.register_buffer("graph", graph)
        self.embedding = nn.Parameter(torch.randn(num_classes, embed))
        self.weight1 = nn.Parameter(torch.empty(embed, hidden).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.weight2 = nn.Parameter(torch.empty(hidden, features).uniform_(-(features**-0.5), features**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        classifiers = F.leaky_relu(self.graph @ (self.embedding @ self.weight1), 0.2)
        classifiers = self.graph @ (classifiers @ self.weight2)
        return x.amax((1, 2)) @ classifiers.t()

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.weight2, None


def label_graph(cooccurrence: np.ndarray, tau: float, p: float) -> Tensor:
    """float32 [C, C]: ML-GCN's correlation matrix, equations 7 and 8 of the paper, normalised as D^-1/2 A D^-1/2.

    Label j is a neighbour of i if P(j | i) >= tau. A label keeps 1 - p of itself and takes p from all its neighbours
    together; with no neighbour it is alone.
    """
    counts = np.asarray(cooccurrence, np.float64)
    near = counts / np.maximum(np.diag(counts), 1)[:, None] >= tau
    np.fill_diagonal(near, False)
    a = p * near / np.maximum(near.sum(1, keepdims=True), 1)
    np.fill_diagonal(a, 1 - p)
    d = a.sum(1) ** -0.5
    return torch.from_numpy(d[:, None] * a * d).float()
