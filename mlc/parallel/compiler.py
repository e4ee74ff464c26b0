"""torch.compile of a backbone, block by block: one block's code serves all of its shape, and what FSDP2 and ZeRO hang
on a block stays outside. A run that compiles again and again in its middle is slower than one that never does, so it
is counted and said.
"""

import os
import shutil

import torch
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
    write over what the one before gave to it.
    """
    parts = blocks(model) or [model]
    # One limit for all that share a forward: each block is traced for training and for evaluation.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False, mode=mode)


def is_compiled(module: nn.Module) -> bool:
    """Whether it is one of those that `compile_blocks` has compiled."""
    return "forward" in vars(module)


class Compilations:
    """What this process has compiled. After the first training step and the first evaluation it should be all."""

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
