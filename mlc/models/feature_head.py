"""A head without a backbone: it is trained on features that frozen encoders made once (mlc/data/features.py)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from mlc.models.fusion_kinds import TextMix, mixed
from mlc.models.heads import check_head, make_label_head

NORMS = ("standardize", "l2", "none")


class FeatureHead(nn.Module):
    """Features float [B, D], the encoders' side by side -> logits [B, num_classes].

    `standardize`: (x - mean) / std of the training samples; `l2`: the features of each encoder to the length sqrt(their
    number), so that either way a feature is about 1; `none`: as they are. Features of an encoder that are all zero say
    that there was nothing to see, such as no caption; they stay zero.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        num_classes: int,
        *,
        head: str = "linear",
        head_kwargs: dict | None = None,
        norm: str = "standardize",
        drop: float = 0.0,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        """sizes: how many features each encoder has, D in all.
        head: `linear`, or one of LABEL_HEADS that looks at no places; UserError for arguments that make none.
        drop: rate of dropout before it.
        statistics: mean and standard deviation float32 [D], for `standardize`; without them they are to be loaded.
        """
        super().__init__()
        self.sizes, self.norm, self.num_classes = list(sizes), norm, num_classes
        features = sum(self.sizes)
        check_head(head, head_kwargs or {})
        if norm == "standardize":
            mean, std = statistics or (np.zeros(features, np.float32), np.ones(features, np.float32))
            self.register_buffer("mean", torch.from_numpy(mean))
            self.register_buffer("std", torch.from_numpy(std))
        self.drop = nn.Dropout(drop)
        if head == "linear":
            self.classifier = nn.Linear(features, num_classes)
        else:
            self.label_head = make_label_head(head, features, num_classes, head_kwargs or {})
        self.head_spec = {"head": head, "head_kwargs": dict(head_kwargs or {}), "sizes": self.sizes, "norm": norm}

    def forward(self, features: Tensor, mix: TextMix | None = None) -> Tensor:
        """mix: how the samples are mixed (`Mix.shares`), after they are normalised."""
        x = self.drop(mixed(self._normalized(features.float()), mix))
        return self.label_head(x) if hasattr(self, "label_head") else self.classifier(x)

    def _normalized(self, x: Tensor) -> Tensor:
        if self.norm == "none":
            return x
        parts = x.split(self.sizes, 1)
        if self.norm == "l2":
            return torch.cat([F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in parts], 1)
        there = torch.cat([part.any(1, keepdim=True).expand_as(part) for part in parts], 1)
        return torch.where(there, (x - self.mean) / self.std, 0.0)

    # ---- What the house asks of a model ------------------------------------------------------------------------------

    @property
    def pretrained_cfg(self) -> dict:
        norm = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        return {"architecture": "features", "classifier": self.classifier_prefixes()[0][:-1], **norm}

    def get_classifier(self) -> nn.Module:
        return getattr(self, "label_head", None) or self.classifier

    def classifier_prefixes(self) -> tuple[str, ...]:
        return ("label_head.",) if hasattr(self, "label_head") else ("classifier.",)

    def last_layers(self) -> list[tuple[Tensor, Tensor | None]]:
        if hasattr(self, "label_head"):
            return [self.label_head.last()]
        return [(self.classifier.weight, self.classifier.bias)]
