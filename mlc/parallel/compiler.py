"""torch.compile of a backbone, block by block: one block's code serves all of its shape, and what FSDP2 and ZeRO hang
on a block stays outside. Evaluations run without it, so that they measure what `mlc predict` will compute, and nothing
is compiled for them. A run that compiles again in its middle is slower than one that never does: it is counted and
said.
"""

import os
import shutil

import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.utils import calculate_time_spent, counters, get_compilation_metrics

from mlc.parallel.strategy import blocks
from shards.console import UserError


def need_compiler(device: torch.device) -> None:
    """Raises UserError where `--compile` would fall over in its first step: kernels for a CPU are C++."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"--compile on a CPU needs a C++ compiler, but there is no {compiler}; install one")


def compile_blocks(model: nn.Module, mode: str = "default") -> None:
    """torch.compile of each block, or of a model without blocks, in place; names stay as they are.

    Call it before `divide` and after the EMA is copied. Only `forward` is compiled, so that the hooks that gather and
    free weights stay outside. `mode` is torch.compile's; those with CUDA graphs do not fit blocks, each of which would
    write over what the one before gave to it. A module that is `any_length` (a text model) has one code for captions of
    all lengths.
    """
    _share_code(model)
    parts = blocks(model) or [model]
    # One limit for all that share a forward; each may be traced for training and for evaluation.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(parts))
    of_text = {id(part) for text in model.modules() if _any_length(text) for part in text.modules()}
    for part in parts:
        dynamic = id(part) in of_text or any(map(_any_length, part.modules()))
        part.forward = torch.compile(part.forward, dynamic=dynamic, mode=mode)


def _any_length(module: nn.Module) -> bool:
    return getattr(module, "any_length", False)


def eager():
    """Within this context compiled blocks run as they were written."""
    return torch.compiler.set_stance("force_eager")


class _DropPath(DropPath):
    """Stochastic depth whose rate is a tensor: a number would be a constant of the code, other in every block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = self.keep.to(x.dtype).expand(len(x), *(1,) * (x.ndim - 1))
        return x * (torch.bernoulli(keep) / keep if self.scale_by_keep else torch.bernoulli(keep))


def _share_code(model: nn.Module) -> None:
    device = next(model.parameters()).device
    for module in model.modules():
        if type(module) is DropPath:
            module.__class__ = _DropPath
            module.register_buffer("keep", torch.tensor(1 - module.drop_prob, device=device), persistent=False)


def has_own_forward(module: nn.Module) -> bool:
    """Whether its forward pass was replaced, by `compile_blocks` or by `recompute`."""
    return "forward" in vars(module)


class Compilations:
    """What this process has compiled. After the first training step it should be all."""

    def __init__(self):
        self._known = _graphs()

    def new(self) -> str | None:
        """A line about what was compiled since the last call, and why it was not the same as before; None for
        nothing."""
        before, self._known = self._known, _graphs()
        graphs = self._known - before
        if not graphs:
            return None
        reasons = [m.recompile_reason for m in get_compilation_metrics()[-graphs:] if m.recompile_reason]
        why = f"; the last because {' '.join(reasons[-1].split())}" if reasons else ""
        return f"{graphs} graphs compiled, {calculate_time_spent().get('total_wall_time', 0.0):.0f} s in all{why}"


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]
