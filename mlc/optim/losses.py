"""Losses keep one value per sample and class, because weighting and reduction belong to the training story: class
weights, group weights, the `valid` mask and the global count of a step are only known there.

All arithmetic is float32 whatever comes in: `1 - p` and its powers underflow in half precision, and a NaN from the
loss poisons the weights of every rank at once. Soft targets (mixing, smoothing, pseudo-labels) are always allowed.
A loss's own settings are bound by the caller: `functools.partial(focal, gamma=1.5)`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], target [B, C] -> [B, C]
ABSENT = -1e30  # takes a term out of a logsumexp; with -inf a sum of no terms would have NaN for a gradient
TINY = 1e-30  # keeps the slope of a power below 1, and a quotient, finite at zero


def bce(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) in nats. `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    pos_weight: float32 [C], weighs t log p of each class, as torch's; here and in the losses that have it too.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), pos_weight=pos_weight, reduction="none")


def focal(
    logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float = -1.0, pos_weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy scaled by (1 - p_t)^gamma. `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    p_t = p t + (1 - p)(1 - t); alpha in 0..1 weights positives by alpha and negatives by 1 - alpha, and is off below 0.
    Lin et al. 2017, "Focal Loss for Dense Object Detection"; on hard targets equal to torchvision's
    `sigmoid_focal_loss`, whose formula is kept for soft ones.
    """
    x, t = logits.float(), target.float()
    # 1 - p_t out of two sigmoids: subtracting p_t from 1 would lose every digit of a confident, correct answer.
    # The floor keeps the slope of a power below 1 finite at zero.
    miss = (torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t).clamp_min(TINY)
    loss = bce(x, t, pos_weight) * miss**gamma
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


def asl(
    logits: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss. `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    -(1 - p_t)^gamma (t log p + (1 - t) log(1 - p_m)) with p_m = max(p - clip, 0), p_t = p t + (1 - p_m)(1 - t) and
    gamma = gamma_pos t + gamma_neg (1 - t). Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification"; equal
    to timm's `AsymmetricLossMultiLabel`, whose formula is kept for soft targets and whose gradient, as here, also flows
    through the focusing weight. Only where timm clamps a probability at 1e-8 the logarithm goes on here, so that a hard
    mistake still has a gradient.
    """
    x, t = logits.float(), target.float()
    miss, hit = torch.sigmoid(x), torch.sigmoid(-x)  # of a negative; subtracting from 1 would lose digits
    log_negative = (hit + clip).clamp_max(1).log() if clip else F.logsigmoid(-x)
    log_positive = F.logsigmoid(x) if pos_weight is None else pos_weight * F.logsigmoid(x)
    loss = -(t * log_positive + (1 - t) * log_negative)
    if not (gamma_neg or gamma_pos):
        return loss
    # The floor keeps the slope of a power below 1 finite where the answer is wholly right.
    away = (hit * t + (miss - clip).clamp_min(0) * (1 - t)).clamp_min(TINY)
    return loss * away ** (gamma_pos * t + gamma_neg * (1 - t))


def two_way(logits: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Two-way loss: positives above negatives, within each sample and within each class.
    `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    softplus(T log sum_i t_i exp(-x_i / T) + log sum_j (1 - t_j) exp(x_j)), with the sums over the classes of a sample,
    averaged over the samples that have a positive, plus the same with the sums over the samples of a class, averaged
    over the classes that have one; without a negative it is 0. Kobayashi 2023, "Two-way Multi-Label Loss"; soft targets
    weigh the terms. Both parts are spread evenly, so that the mean over [B, C] is the paper's loss.

    The samples of a class are those of this call: one micro-batch of one device. So this loss alone depends on how a
    global batch is divided.
    """
    t = target.float()
    positive, negative = _log_terms(logits, target, temperature)
    parts = []
    for dim in (1, 0):
        margin = temperature * positive.logsumexp(dim, keepdim=True) + negative.logsumexp(dim, keepdim=True)
        present = (t > 0).any(dim, keepdim=True).float()
        parts.append(F.softplus(margin) * present / present.mean().clamp_min(TINY))
    return parts[0] + parts[1]


def _log_terms(logits: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log(t exp(-x / T)) and log((1 - t) exp(x)), float32 [B, C] each, for sums of exponentials; ABSENT for log 0."""
    x, t = logits.float(), target.float()
    positive = (t.log() - x / temperature).masked_fill(t <= 0, ABSENT)
    return positive, ((-t).log1p() + x).masked_fill(t >= 1, ABSENT)


def zlpr(logits: Tensor, target: Tensor) -> Tensor:
    """Zero-bounded log-sum-exp and pairwise rank-based loss of each sample, the same for all of its classes.
    `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    log(1 + sum_i t_i exp(-x_i)) + log(1 + sum_j (1 - t_j) exp(x_j)) with sums over the classes of a sample: positives
    above negatives, and 0 between them. As every class has the sample's value, the mean over [B, C] is the mean over
    samples. Su et al. 2022, "ZLPR: A Novel Loss for Multi-label Classification"; on hard targets equal to timm's
    `ZlprLoss`, which makes soft ones hard where here they weigh the terms.
    """
    value = sum(F.softplus(terms.logsumexp(1, keepdim=True)) for terms in _log_terms(logits, target))
    return value.expand(logits.shape)


def distribution_balanced(
    logits: Tensor,
    target: Tensor,
    frequencies: Tensor | float = 0.5,
    weight_map: tuple[float, float, float] = (0.1, 10.0, 0.2),
    neg_scale: float = 2.0,
    bias: float = 0.05,
    gamma: float = 2.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Distribution-balanced loss for long-tailed classes. `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    frequencies [C] or a number: share f of the training samples that have each class, inside (0, 1).

    Re-balanced weights: 1 / f over its sum over the sample's positives is how much of a class-balanced draw of this
    sample is for this class; with weight_map = (a, b, m) a class weighs a + sigmoid(b (ratio - m)). A sample without
    positives has the largest weight. They look at labels before their `smoothing`, whose amount is undone for them.
    Negative-tolerant: with z = x + bias logit(f) / neg_scale a positive costs softplus(-z) and a negative
    softplus(neg_scale z) / neg_scale, so that the many negatives of a rare class do not push it down for ever. gamma
    above 0 makes easy labels count less, by 2 (1 - p_t)^gamma as in the authors' code.

    Wu et al. 2020, "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets"; equal to timm's
    `DistributionBalancedLoss`, soft targets included.
    """
    x, t = logits.float(), target.float()
    f = torch.as_tensor(frequencies, dtype=torch.float32, device=x.device)
    labels = ((t - smoothing / 2) / max(1 - smoothing, TINY)).clamp(0, 1)
    floor, slope, middle = weight_map
    ratio = 1 / f / (labels / f).sum(1, keepdim=True).clamp_min(TINY)
    weight = floor + torch.sigmoid(slope * (ratio - middle))
    z = x + bias / neg_scale * f.logit()
    positive, negative = F.softplus(-z), F.softplus(neg_scale * z) / neg_scale
    if gamma:
        positive = 2 * positive * torch.sigmoid(-z).clamp_min(TINY) ** gamma
        negative = 2 * negative * torch.sigmoid(neg_scale * z).clamp_min(TINY) ** gamma
    return weight * (t * positive + (1 - t) * negative)


def soft_fbeta(logits: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """1 - F-beta of each sample with probabilities for its predictions, the same for all of its classes.
    `[B, C], [B, C] in 0..1 -> float32 [B, C]`.

    F = (1 + beta^2) sum t p / (beta^2 sum t + sum p); 0 over 0 is 0, as in scikit-learn. It does not say how sure a
    prediction is, so it is one for a second stage, after another loss.
    """
    p, t = torch.sigmoid(logits.float()), target.float()
    most = (beta**2 * t + p).sum(1, keepdim=True).clamp_min(1e-12)
    value = (1 + beta**2) * (t * p).sum(1, keepdim=True) / most
    return (1 - value).expand_as(p)


def smooth(target: Tensor, smoothing: float) -> Tensor:
    """Label smoothing for independent sigmoids: `y (1 - s) + s / 2`, so 0 and 1 move s / 2 towards the middle."""
    return target * (1 - smoothing) + smoothing / 2


def class_weights(counts: Tensor, kind: str, beta: float = 0.999) -> Tensor:
    """float32 [C] with mean 1, for columns of a loss; `counts` [C]: positives of each class.

    kind: `effective`, one over the effective number of samples (1 - beta^n) / (1 - beta) (Cui et al. 2019,
    "Class-Balanced Loss Based on Effective Number of Samples"), or `inverse`, 1 / n.

    A class without positives has weight 1, as without class weights: as the rarest of all it would
    take nearly the whole loss, and its negatives have nothing to teach that is worth it.
    """
    present = counts > 0
    n = counts[present].double().clamp_min(1)
    own = {"effective": lambda: -1 / torch.expm1(n * math.log(beta)), "inverse": lambda: 1 / n}[kind]()
    weights = torch.ones(len(counts))
    weights[present] = (own / own.mean()).float()
    return weights


def pos_weights(counts: Tensor, samples: float, most: float = 20.0, power: float = 1.0) -> Tensor:
    """float32 [C]: (negatives / positives)^power of each class, at most `most`; 1 for a class without positives
    or without negatives, where there is nothing to balance. counts [C]: positives among the samples.

    With power 1 positives and negatives of a class come to the same sum, with 0.5 half way there on a logarithmic
    scale. timm's `compute_class_weights(method="neg_pos")`, but for these.
    """
    n = counts.double()
    negatives = samples - n
    weights = (negatives.clamp_min(0) / n.clamp_min(TINY)) ** power
    return torch.where((n > 0) & (negatives > 0), weights.clamp_max(most), 1.0).float()


LOSSES = {
    "bce": bce,
    "focal": focal,
    "asl": asl,
    "two-way": two_way,
    "zlpr": zlpr,
    "db": distribution_balanced,
    "soft-fbeta": soft_fbeta,
}
