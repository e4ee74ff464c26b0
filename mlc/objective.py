"""What a training step minimises: the losses of the labels and of the teachers, summed over a micro-batch.

Losses keep one value per sample and class (mlc/optim/losses.py); how classes weigh against each other, which of them
take part and what a teacher adds is put together here, from the settings.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from mlc.config import Config
from mlc.models.teacher import Teacher
from mlc.optim.distill import combine, distill_loss
from mlc.optim.losses import LOSSES, Loss, smooth


def make_loss(config: Config) -> Loss:
    """The loss of `--loss` with its settings: logits [B, C], target [B, C] -> float32 [B, C]."""
    loss = LOSSES[config.loss]
    if config.loss == "focal":
        alpha = -1.0 if config.focal_alpha is None else config.focal_alpha
        loss = functools.partial(loss, gamma=config.focal_gamma, alpha=alpha)
    return loss


class Objective:
    """(model, image, target, batch) -> (the loss summed over a micro-batch and its classes, logits [B, C]).

    The caller divides the sum once, by the samples of the global batch times the classes.
    """

    def __init__(
        self,
        config: Config,
        *,
        loss: Loss,
        teacher: Teacher | None,
        autocast: Callable[[], AbstractContextManager],
    ):
        self._config, self._loss, self._teacher, self._autocast = config, loss, teacher, autocast

    def __call__(self, model: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        with self._autocast():
            logits = model(image)
            teacher_logits = self._teacher(image) if self._teacher else None
        loss = self._loss(logits, smooth(target, config.smoothing))
        if self._teacher:
            loss = combine(loss, distill_loss(logits, teacher_logits, config.kd_temp), config.kd_alpha)
        return loss.sum(), logits
