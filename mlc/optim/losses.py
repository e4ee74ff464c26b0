"""Losses keep one value per sample and class, because weighting and reduction belong to the training story: class
weights, group weights, the `valid` mask and the global count of a step are only known there.

All arithmetic is float32 whatever comes in: `1 - p` and its powers underflow in half precision, and a NaN from the
loss poisons the weights of every rank at once. Soft targets (mixing, smoothing, pseudo-labels) are always allowed.
A loss's own settings are bound by the caller: `functools.partial(focal, gamma=1.5)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target [B, C] -> [B, C]


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) in nats. `[B, C], [B, C] in 0..1 -> float32 [B, C]`."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = -1.0) -> Tensor:
    """Cross-entropy scaled by (1 - p_t)^gamma. `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    p_t = p t + (1 - p)(1 - t); alpha in 0..1 weights positives by alpha and negatives by 1 - alpha, and is off below 0.
    Lin et al. 2017, "Focal Loss for Dense Object Detection"; on hard targets equal to torchvision's
    `sigmoid_focal_loss`, whose formula is kept for soft ones.
    """
    x, t = logits.float(), target.float()
    # 1 - p_t out of two sigmoids: subtracting p_t from 1 would lose every digit of a confident, correct answer.
    # The floor keeps the slope of a power below 1 finite at zero.
    miss = (torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t).clamp_min(1e-30)
    loss = bce(x, t) * miss**gamma
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


def smooth(target: Tensor, smoothing: float) -> Tensor:
    """Label smoothing for independent sigmoids: `y (1 - s) + s / 2`, so 0 and 1 move s / 2 towards the middle."""
    return target * (1 - smoothing) + smoothing / 2


LOSSES = {
    "bce": bce,
    "focal": focal,
}
