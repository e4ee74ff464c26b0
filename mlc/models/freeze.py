"""Parts of a model that are not trained: the encoder under a new head, or whatever an expression names."""

import re

from torch import nn

from mlc.models.heads import classifier_prefixes
from shards.console import UserError

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def freeze(model: nn.Module, what: str) -> int:
    """Takes parameters of the bare model out of the training; returns how many numbers that are.

    what: `backbone`, all but the classifier; else a regular expression of parameter names. '' freezes nothing.
    UserError where nothing matches or nothing is left.
    """
    if not what:
        return 0
    head = classifier_prefixes(model)
    frozen = [p for name, p in model.named_parameters() if _matches(what, name, head)]
    if not frozen:
        raise UserError(f"--freeze {what}: found in no parameter's name; `backbone` is all but the classifier")
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {what}: nothing is left to train")
    return sum(parameter.numel() for parameter in frozen)


def _matches(what: str, name: str, head: tuple[str, ...]) -> bool:
    if what == "backbone":
        return not name.startswith(head)
    try:
        return re.search(what, name) is not None
    except re.error as error:
        raise UserError(f"--freeze {what}: no regular expression: {error}") from error


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but batch norms whose parameters are frozen keep their running statistics, and use them:
    what is frozen computes the same for ever."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NORMS) and not _learns(module):
            module.eval()


def learning_norms(model: nn.Module) -> list[str]:
    """Names of the batch norms that use their batch's statistics in training."""
    return [name for name, module in model.named_modules() if isinstance(module, _NORMS) and _learns(module)]


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
