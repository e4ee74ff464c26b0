"""Mixing of samples on the device. Partners are the positions 2k and 2k + 1 of the stream, which always share a
micro-batch, so the mixed samples of a global batch do not depend on world size, micro-batch or accumulation.
"""

import numpy as np
import torch
from scipy.special import betaincinv

from mlc.data.order import MIX, uniform


def mix_lambda(position: torch.Tensor, *, alpha: float, prob: float, seed: int) -> torch.Tensor:
    """Each sample's own share, float32 [B] in [0, 1] on the CPU as `position` is, equal for both partners; 1 where a
    pair is not mixed.

    lambda ~ Beta(alpha, alpha) (Zhang et al. 2017, mixup) by the inverse of its distribution at a uniform of the pair.
    """
    pair = position.numpy() // 2
    lam = betaincinv(alpha, alpha, uniform(seed, MIX, pair, 0))
    lam = np.where(uniform(seed, MIX, pair, 1) < prob, lam, 1.0)
    return torch.from_numpy(lam.astype(np.float32))


def swap_pairs(x: torch.Tensor) -> torch.Tensor:
    """Each row's partner: rows 2k and 2k + 1 of [B, ...] exchanged; B is even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mixup(image: torch.Tensor, target: torch.Tensor, lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convex combination of image [B, 3, H, W] and target [B, C] with the partner's; lam [B] is the own share."""
    lam = lam.to(image.device, non_blocking=True)
    own = lam.view(-1, 1, 1, 1)
    image = own * image + (1 - own) * swap_pairs(image)
    own = lam.view(-1, 1)
    return image, own * target + (1 - own) * swap_pairs(target)
