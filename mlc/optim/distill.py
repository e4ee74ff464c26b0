"""Knowledge distillation where every class is a yes-or-no question of its own, so a softmax over classes would be
wrong: the student matches the teacher's softened sigmoid of each class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mlc.optim.losses import bce


def soften(logits: Tensor, temperature: float) -> Tensor:
    """sigmoid(t / T): a teacher's logits -> probabilities, float32, without a gradient."""
    return (logits.detach().float() / temperature).sigmoid()


def soften_probabilities(probabilities: Tensor, temperature: float) -> Tensor:
    """The same of a teacher of whom probabilities are known; 0 and 1 stay what they are."""
    p = probabilities.float()
    return p if temperature == 1 else soften(p.logit(), temperature)


def distill_loss(student_logits: Tensor, soft: Tensor, temperature: float) -> Tensor:
    """T^2 BCE(s / T, soft). `[B, C], [B, C] -> float32 [B, C]`; `soft` are probabilities at the same temperature, of
    one teacher or the mean of several.

    The gradient is T (sigmoid(s / T) - soft), which for one teacher tends to (s - t) / 4 for a large T: the factor T^2
    makes its size independent of the temperature (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
    section 2; here with a sigmoid in place of the softmax). At s = t the gradient is zero, the loss is the teacher's
    own entropy and not zero.
    """
    return temperature**2 * bce(student_logits.float() / temperature, soft)


def combine(hard: Tensor, soft: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) hard + alpha soft`: alpha is the teacher's share, 0 the labels alone, 1 the teacher alone."""
    return (1 - alpha) * hard + alpha * soft


def larger(target: Tensor, probabilities: Tensor) -> Tensor:
    """The larger one of label and teacher's probability, [B, C]: a label that somebody forgot comes back, and none that
    is there is doubted (ninth place of the iMet competition of 2019)."""
    return torch.maximum(target.float(), probabilities)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the angle between two features, [B, D], [B, D] -> float32 [B]; 0 for a feature that is zero would
    be no angle: it counts 1. No gradient reaches the teacher."""
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
