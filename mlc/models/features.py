"""The pooled features of a model, taken on their way into its classifier: what a student can learn from a teacher
besides its answers. The forward pass stays as it is, so whatever wraps the model (DDP, FSDP2, ZeRO, compiled or
recomputed blocks) need not know.
"""

import numpy as np
import torch
from torch import Tensor, nn

from shards.console import UserError


class PooledFeatures:
    """What entered the classifier in the latest forward pass, one vector per image."""

    def __init__(self, model: nn.Module):
        """`model`: the bare one, before it is compiled or divided. Raises UserError for one without a classifier."""
        model = getattr(model, "image", None) or model  # of images and captions: what it knows of the image
        # A label head is given places, [B, H, W, D], whatever the backbone's own layout.
        self._channels_last = hasattr(model, "label_head") or getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._latest: Tensor | None = None
        classifier_of(model).register_forward_pre_hook(self._keep)

    def _keep(self, classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._latest = inputs[0]

    def take(self) -> Tensor:
        """float [B, D], with its gradient where the model's forward pass had one."""
        features, self._latest = self._latest, None
        assert features is not None, "no forward pass went through the classifier"
        return pooled(features, channels_last=self._channels_last)


def pooled(features: Tensor, *, channels_last: bool) -> Tensor:
    """[B, D], tokens [B, N, D] or a map, [B, D, H, W] or [B, H, W, D] -> their mean over places, [B, D]."""
    if features.ndim == 4 and not channels_last:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features


def classifier_of(model: nn.Module) -> nn.Module:
    """The part that makes logits of features: `label_head` where a head looks at the feature map, else timm's."""
    if hasattr(model, "label_head"):
        return model.label_head
    names = model.pretrained_cfg.get("classifier")
    name = names if isinstance(names, str) or not names else names[0]
    if not name:
        raise UserError(f"--kd-feature: {type(model).__name__} has no classifier whose input could be compared")
    return model.get_submodule(name)


class FeaturePair:
    """The features of student and teacher of the same images, with the same width.

    Where widths differ, a fixed random matrix with orthonormal rows maps the wider ones to the narrower width: it keeps
    angles up to a small error (Johnson & Lindenstrauss 1984), and nothing is trained, saved or exported for it.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, seed: int):
        self._student, self._teacher, self._seed = PooledFeatures(student), PooledFeatures(teacher), seed
        self._map: Tensor | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) of their latest forward passes, float32 [B, D] each. Not under autocast."""
        student, teacher = self._student.take().float(), self._teacher.take().float()
        if student.shape[1] == teacher.shape[1]:
            return student, teacher
        narrow, wide = sorted((student.shape[1], teacher.shape[1]))
        if self._map is None:
            self._map = orthonormal_rows(narrow, wide, self._seed).to(student.device)
        return tuple(x if x.shape[1] == narrow else x @ self._map.T for x in (student, teacher))


def orthonormal_rows(narrow: int, wide: int, seed: int) -> Tensor:
    """A uniformly random float32 [narrow, wide] with orthonormal rows, the same everywhere for a seed: Q of the QR
    decomposition of a Gaussian matrix, its signs made unique (Mezzadri 2007, "How to generate random matrices from the
    classical compact groups")."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((wide, narrow)))
    return torch.from_numpy((q * np.sign(np.diag(r))).T.astype(np.float32))
