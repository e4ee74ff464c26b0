"""ZeRO-1, 2 and 3 by DeepSpeed's engine, set up to compute what the other strategies compute.

Left to itself DeepSpeed divides the loss by its own accumulation count, hides a gradient that is not finite (its norm
becomes -1), and after a change of the number of processes mixes up parameter groups (`_undo`).
"""

import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mlc.parallel.compiler import has_own_forward
from shards.console import UserError, say

FILES, _CONVERTED = "zero", "universal"  # folders in a checkpoint


class Zero:
    """Optimizer state is divided (1), gradients too (2), weights too (3). See `strategy.divide`."""

    def __init__(self, choice, accelerator, model, averaged, make_optimizer, *, clip, batch_size, accumulation):
        if accelerator.mixed_precision == "fp16":
            raise UserError(
                f"--amp-dtype fp16 does not go with {choice.name}, where DeepSpeed clips the scaled gradient; use bf16"
            )
        deepspeed = _deepspeed(accelerator.device)
        for module in (model, averaged):  # an average that teaches may be compiled as well
            for block in filter(has_own_forward, module.modules() if module is not None else ()):
                # Stage 3 gathers it whole, from outside; by default each layer inside does, which torch.compile cannot
                # see.
                deepspeed.utils.set_z3_leaf_module(block, True)
                block.register_forward_pre_hook(_with_gradient)
        config = _config(
            choice,
            bf16=accelerator.mixed_precision == "bf16",
            clip=clip,
            batch_size=batch_size,
            accumulation=accumulation,
        )
        self.optimizer = make_optimizer(model)
        self.model = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]
        assert self.model.gradient_accumulation_steps() == accumulation
        self._averaged = None
        if averaged is not None and choice.zero_stage == 3:
            # Nothing of the average may stay whole after its forward pass: it would not follow the next update.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            del config["gradient_clipping"]
            self._averaged = deepspeed.initialize(model=averaged, config=config)[0]
        self.groups = (self.model.data_parallel_group,)  # DeepSpeed's copy of the group of all
        self.saved: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "ema": averaged}

    def accumulate(self, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        norm = self._norm()
        if norm.isfinite():  # it waits for the device; so does DeepSpeed in every step
            self.model.step()
        if self._averaged is not None:
            self._averaged.empty_partition_cache()
        return norm

    def _norm(self) -> Tensor:
        """The gradient's norm from this process's part of it, before DeepSpeed looks at it."""
        zero = self.model.optimizer
        norms = getattr(zero, "norm_for_param_grads", None)  # with the optimizer on the CPU
        if norms is None:
            norms = {i: torch.nn.utils.get_total_norm(part) for i, part in zero.averaged_gradients.items()}
        device = self.model.device
        parts = [torch.as_tensor(norm, dtype=torch.float32, device=device) for norm in norms.values()]
        square = torch.stack(parts).square().sum() if parts else torch.zeros((), device=device)
        dist.all_reduce(square)
        return square.sqrt()


def _with_gradient(module: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """DeepSpeed sees the end of a backward pass by the gradient of the input, which after frozen layers has none."""
    x, *rest = inputs  # masks and the like need none
    return (x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(), *rest)


def _deepspeed(device: torch.device):
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", "0")  # which it asks for even in a process that nobody launched
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"ZeRO needs DeepSpeed ({error}); pip install 'mlc[deepspeed]'") from error
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # or it compiles a C++ collective, for minutes, which is not used here
    return deepspeed


def _config(choice, *, bf16: bool, clip: float | None, batch_size: int, accumulation: int) -> dict[str, Any]:
    offload = {
        name: {"device": where}
        for name, where in (("offload_optimizer", choice.offload_optimizer), ("offload_param", choice.offload_weights))
        if where != "none" and (name == "offload_optimizer" or choice.zero_stage == 3)
    }
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip or 0.0,
        "zero_optimization": {"stage": choice.zero_stage, **offload},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Not bf16.enabled, which casts the model and breaks what it computes in float32 (SwinV2's position network).
        # No modules are `safe`: gradients are summed in float32, as in the other strategies.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": sys.maxsize,
    }


def gather(parameter: nn.Parameter) -> Tensor:
    """A ZeRO-3 parameter as a whole, on the CPU. All ranks call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def is_engine(model: nn.Module) -> bool:
    """Whether it is DeepSpeed's wrapper, which saves and loads itself."""
    return hasattr(model, "save_checkpoint")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_engine(engine, folder: Path) -> None:
    """Writes DeepSpeed's files into `folder/zero`. They leave out buffers, frozen parameters and the EMA, and nobody
    but DeepSpeed can read them: `parts` has the weights for everybody else. All ranks call it.
    """
    engine.save_checkpoint(str(folder), tag=FILES, save_latest=False)


def parts(model: nn.Module, averaged: nn.Module | None) -> dict[str, dict[str, Tensor]]:
    """{"model", "ema"}: this process's part of all weights and buffers, sharing memory with them; those of ZeRO-3 as
    flat DTensors.
    """
    modules = {"model": model} | ({"ema": averaged} if averaged is not None else {})
    return {
        key: {name: _part(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
        for key, module in modules.items()
    }


def shapes(model: nn.Module, averaged: nn.Module | None) -> dict[str, list[int]]:
    """{name in a checkpoint: shape} of what is flat there."""
    modules = {"model": model} | ({"ema": averaged} if averaged is not None else {})
    return {
        f"{key}.{name}": list(tensor.ds_shape)
        for key, module in modules.items()
        for name, tensor in module.named_parameters()
        if hasattr(tensor, "ds_tensor")
    }


def rest(model: nn.Module, averaged: nn.Module | None) -> dict[str, Tensor]:
    """{name in a checkpoint: tensor} of what `load_engine` does not restore."""
    trained = {f"model.{name}" for name, tensor in model.named_parameters() if tensor.requires_grad}
    found = parts(model, averaged)
    everything = {f"{key}.{name}": tensor for key in found for name, tensor in found[key].items()}
    return {name: tensor for name, tensor in everything.items() if name not in trained}


def load_engine(engine, folder: Path, processes: int) -> None:
    """Restores in place what `save_engine` wrote with so many processes; with another number now, rank 0 converts the
    files first. All ranks call it.

    Raises:
        UserError: the conversion failed.
    """
    groups = engine.basic_optimizer.param_groups
    ours = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    converted = processes != dist.get_world_size()
    if converted:
        _convert(folder, processes)
        engine._config.load_universal_checkpoint = True  # read when it loads; there is no other way to say so late
    engine.load_checkpoint(str(folder), tag=_CONVERTED if converted else FILES, load_lr_scheduler_states=False)
    engine._config.load_universal_checkpoint = False
    _undo(engine.basic_optimizer, ours)
    dist.barrier()
    if converted and dist.get_rank() == 0:
        shutil.rmtree(folder / _CONVERTED)


def _undo(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Puts right what a universal checkpoint does to AdamW: every group has the first one's options, and with ZeRO-3
    all share one step counter, which each of them then advances.
    """
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        state["step"] = torch.as_tensor(state["step"]).clone()


def _convert(folder: Path, processes: int) -> None:
    """`folder/zero` -> `folder/universal`, by rank 0; what it is good for is over once it is loaded."""
    failure = [None]
    if dist.get_rank() == 0:
        say(f"{folder} was written by {processes} processes: converting it for {dist.get_world_size()} ...")
        shutil.rmtree(folder / _CONVERTED, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / FILES), "--output_folder", str(folder / _CONVERTED)]
        done = subprocess.run(command, capture_output=True, text=True)
        (folder / "latest_universal").unlink(missing_ok=True)
        if done.returncode:
            failure = [(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise UserError(
            f"{folder} was written by {processes} processes and cannot be converted for {dist.get_world_size()}: "
            f"{failure[0]}; resume with {processes} processes"
        )


def _part(tensor: Tensor) -> Tensor:
    """A tensor that torch.distributed.checkpoint can divide anew: a ZeRO-3 parameter as a flat DTensor over its part.

    DeepSpeed cuts the flat parameter into equal parts of ceil(numel / processes), the last ones padded; that is
    DTensor's Shard(0) but for the padding.
    """
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach()
    size, part = tensor.ds_numel, tensor.ds_tensor.numel()
    own = min(part, max(0, size - dist.get_rank() * part))
    mesh = init_device_mesh(tensor.ds_tensor.device.type, (dist.get_world_size(),))
    local = tensor.ds_tensor.detach().flatten()[:own]
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(size,), stride=(1,))
