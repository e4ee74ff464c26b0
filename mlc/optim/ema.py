"""A moving average of the weights is worth a longer training run, but it is easily lost: matched by name it silently
stops updating once torch.compile puts `_orig_mod.` in front of every name. Tensors are therefore matched by position.

Where weights are divided among processes (FSDP2, ZeRO-3), the average is divided in the same way, and each process
averages its own part: nothing is gathered.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """The averaged copy is `ema.module`: in eval mode, without gradients, saved and loaded as any module is.

    Make it from the bare model, once that is on its device and before it is wrapped, compiled or divided; then let
    the strategy divide it as it divides the model.
    """

    def __init__(self, model: nn.Module):
        self.module = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """`ema = decay ema + (1 - decay) model` for floating tensors, buffers such as BatchNorm's statistics included;
        a plain copy for the others (counters). As timm's ModelEmaV3. `model` may be wrapped (DDP, torch.compile).
        """
        averaged, current = _tensors(self.module), _tensors(model)
        assert [t.shape for t in averaged] == [t.shape for t in current], "the EMA is a copy of another model"
        floating = [i for i, tensor in enumerate(averaged) if tensor.is_floating_point()]
        torch._foreach_lerp_([averaged[i] for i in floating], [current[i] for i in floating], 1 - decay)
        for mine, theirs in zip(averaged, current, strict=True):
            if not mine.is_floating_point():
                mine.copy_(theirs)


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update number `step` (from 0): with warm-up min(decay, (1 + step) / (10 + step)), so that the random
    start is forgotten quickly (TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers in order, this process's part of each; a tied tensor once, or it would be
    averaged twice."""
    return [_local(tensor) for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()]


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's name for the part of a ZeRO-3 parameter
