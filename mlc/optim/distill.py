"""Knowledge distillation where every class is a yes-or-no question of its own, so a softmax over classes would be
wrong: the student matches the teacher's softened sigmoid of each class.
"""

from torch import Tensor

from mlc.optim.losses import bce


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 BCE(s / T, sigmoid(t / T)). `[B, C], [B, C] -> float32 [B, C]`; no gradient reaches the teacher.

    The gradient is T (sigmoid(s / T) - sigmoid(t / T)), which tends to (s - t) / 4 for a large T: the factor T^2 makes
    its size independent of the temperature (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
    section 2; here with a sigmoid in place of the softmax). At s = t the gradient is zero, the loss is the teacher's
    own entropy and not zero.
    """
    soft = (teacher_logits.detach().float() / temperature).sigmoid()
    return temperature**2 * bce(student_logits.float() / temperature, soft)


def combine(hard: Tensor, soft: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) hard + alpha soft`: alpha is the teacher's share, 0 the labels alone, 1 the teacher alone."""
    return (1 - alpha) * hard + alpha * soft
