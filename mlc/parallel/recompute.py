"""Activations fill a GPU long before weights do; what is computed again in the backward pass need not be kept.

`--grad-checkpointing` says how much is: `all` blocks of a backbone, `every:K`-th block, or only the `attention` of each
block. Only a module's `forward` is replaced, as by `compile_blocks`: what DDP, FSDP2 and ZeRO hang on a module stays
outside, so that a block's weights are gathered once for its whole backward pass, and the code of a compiled block runs
a second time instead of being compiled a second time.

Losses and gradients are those without it. Dropout and stochastic depth are drawn alike the second time, and running
statistics of batch norm see a batch once.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mlc.config import RECOMPUTED
from mlc.parallel.strategy import blocks
from shards.console import UserError

_MODE = re.compile(RECOMPUTED)


def recompute(model: nn.Module, mode: str) -> list[nn.Module]:
    """Has parts of `model` computed again in the backward pass, in place; returns them, in the model's order.

    none: nothing.
    all: every block.
    every:K: blocks 0, K, 2K, ..., the first being the hungriest of hierarchical backbones. A block keeps its input and
        costs its forward pass up to the last tensor that the backward pass needs: in SwinV2 all of it, in Swin and ViT,
        whose last product's result nobody needs, two thirds.
    attention: `block.attn` of every block, from its first product to the input of its last. Under autocast it keeps its
        input in the low precision that the first product wants. A block less the attention keeps little more than
        its MLP's activations: of SwinV2-L in bfloat16 it saves 31 % of the memory for 29 % of a forward pass (every:2:
        43 % for 49 %), and with timm's attention 71 % for the same (every:2: 47 %).

    Call it after `compile_blocks` and after the EMA is copied, which needs none of it.

    Raises:
        UserError: another mode, or a model that has no such parts.
    """
    asked = _MODE.fullmatch(mode)
    if not asked:
        raise UserError(f"--grad-checkpointing {mode}: choose none, all, attention or every:K (every K-th block)")
    if mode == "none":
        return []
    if mode == "attention":
        parts = [
            b.attn for b in blocks(model) if isinstance(getattr(b, "attn", None), nn.Module) and not _norms(b.attn)
        ]
    else:
        parts = blocks(model)[:: int(asked[1] or 1)]
    if not parts:
        what, others = ("block.attn", "all or every:K") if mode == "attention" else ("repeated blocks", "none")
        raise UserError(f"--grad-checkpointing {mode}: this backbone has no {what}; choose {others}")
    for part in parts:
        part.forward = MethodType(forward, part) if mode == "attention" else partial(_again, part.forward, _norms(part))
    return parts


def _again(whole: Callable, norms: list[_BatchNorm], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return whole(*args, **kwargs)
    return checkpoint(whole, *args, use_reentrant=False, context_fn=partial(_once, norms), **kwargs)


def forward(attention: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of an attention, which lies inside of what torch.compile sees: as a method, for blocks to go on sharing their
    code, and without contexts. Its name has a pickled copy fall back to the class's, which keeps everything.

    It begins with a product, which would cast the input anyway: what is kept is half as large.
    """
    whole = partial(type(attention).forward, attention)
    if not torch.is_grad_enabled():
        return whole(x, *args, **kwargs)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(device))
    return checkpoint(whole, x, *args, use_reentrant=False, **kwargs)


def _norms(part: nn.Module) -> list[_BatchNorm]:
    return [module for module in part.modules() if isinstance(module, _BatchNorm)]


def _once(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _statistics_stay(norms)


@contextmanager
def _statistics_stay(norms: list[_BatchNorm]) -> Iterator[None]:
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
