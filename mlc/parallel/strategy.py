"""What the processes divide among them: the batch (DDP), or weights, gradients and optimizer state too (FSDP2, ZeRO).

Accelerate starts and connects the processes, but wraps nothing that is divided: its own FSDP falls back to DDP on a
CPU without a word, and its DeepSpeed rewrites the accumulation. What the accelerate configuration asks for is read from
the environment it sets, and one code divides the model on CPUs and GPUs. All strategies look the same to the story:

    with strategy.accumulate(last): strategy.backward(loss)     a mean over the processes, communicated when `last`
    norm = strategy.step()                          clip, optimizer; no update where the norm is not finite
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shards.console import UserError

NAMES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # Accelerate's names
_STACK = re.compile(r"blocks|layers|stages|layer\d*|albert_layers")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A strategy and what the accelerate configuration says about it.

    Attributes:
        reshard: FSDP2 frees a block's weights after its forward pass and gathers them again for the backward pass.
        offload_optimizer, offload_weights: where ZeRO keeps them between uses, `none` or `cpu`.
    """

    name: str
    reshard: bool = True
    offload_optimizer: str = "none"
    offload_weights: str = "none"

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3; 0 for DDP and FSDP2."""
        return int(self.name[4:]) if self.name.startswith("zero") else 0

    @property
    def divided(self) -> bool:
        """Whether it needs a process group even in one process."""
        return self.name != "ddp"


def choose(asked: str = "auto") -> Choice:
    """The strategy of `--strategy`, `auto` for that of the accelerate configuration this process was launched with.

    Raises:
        UserError: the configuration asks for what there is not here.
    """
    name = _launched() if asked == "auto" else asked
    if name == "fsdp2":
        if _env("FSDP_VERSION", "2") != "2":
            raise UserError("the accelerate configuration asks for FSDP 1; write `fsdp_version: 2` into fsdp_config")
        if _env("FSDP_OFFLOAD_PARAMS") == "true":
            raise UserError(
                "fsdp_offload_params is not supported; mlc/launch/zero3-offload.yaml keeps weights on the CPU"
            )
    choice = Choice(
        name=name,
        reshard=_env("FSDP_RESHARD_AFTER_FORWARD", "true") != "false",
        offload_optimizer=_env("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        offload_weights=_env("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
    )
    if choice.zero_stage and {choice.offload_optimizer, choice.offload_weights} - {"none", "cpu"}:
        raise UserError("ZeRO keeps optimizer state and weights on the device or on the `cpu`, nowhere else here")
    return choice


def _launched() -> str:
    if _env("ACCELERATE_USE_FSDP") == "true":
        return "fsdp2"
    if _env("ACCELERATE_USE_DEEPSPEED") == "true":
        if _env("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise UserError("deepspeed_config_file is not read; the accelerate configuration's own zero_stage is")
        stage = _env("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if f"zero{stage}" not in NAMES:
            raise UserError(f"zero_stage {stage} in the accelerate configuration: choose 1, 2 or 3")
        return f"zero{stage}"
    return "ddp"


def _env(name: str, default: str = "") -> str:
    return os.environ.get(name, default).lower()


def divide(
    choice: Choice,
    accelerator: Accelerator,
    model: nn.Module,
    averaged: nn.Module | None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    clip: float | None,
    batch_size: int,
    accumulation: int,
):
    """The strategy, ready to train: `Ddp`, `Fsdp2` or `Zero`.

    model, averaged: the bare model and its EMA, the same on every process and on the device; divided in place.
    make_optimizer: called once the parameters are what the optimizer must see.
    clip: largest global gradient norm, None for no clipping.
    batch_size, accumulation: samples of a micro-batch on one device, micro-batches of a step.

    The result has `model` (for the forward pass in training), `optimizer` (its `param_groups`), `saved` (what
    `checkpoint.save` and `load` take), `groups` (of processes, beside the one of all), `accumulate`, `backward` and
    `step`.
    """
    if choice.zero_stage:
        from mlc.parallel.zero import Zero  # DeepSpeed is an extra, and slow to import

        return Zero(
            choice,
            accelerator,
            model,
            averaged,
            make_optimizer,
            clip=clip,
            batch_size=batch_size,
            accumulation=accumulation,
        )
    if choice.name == "fsdp2":
        for module in (model, averaged):
            if module is not None:
                _shard(module, accelerator, reshard=choice.reshard or module is averaged)
        return Fsdp2(accelerator, model, averaged, make_optimizer, clip=clip)
    return Ddp(accelerator, model, averaged, make_optimizer, clip=clip)


class Ddp:
    """Every process has the whole model; gradients are averaged while the last micro-batch goes backward."""

    groups: tuple[torch.distributed.ProcessGroup, ...] = ()

    def __init__(self, accelerator, model, averaged, make_optimizer, *, clip):
        self._accelerator, self._clip, self._bare = accelerator, clip, make_optimizer(model)
        self.saved: dict[str, Any] = {"model": model, "optimizer": self._bare, "ema": averaged}
        self.model, self.optimizer = self._prepare(model, self._bare)

    def _prepare(self, model, optimizer):
        return self._accelerator.prepare(model, optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> Tensor:
        """The gradient's norm over all parameters before clipping, 0-dim. Where it is not finite, nothing changes but
        the gradient, which is gone. The host waits for the device under fp16, whose scaler does, and for an optimizer
        without a fused kernel.
        """
        self._accelerator.unscale_gradients()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        if self._accelerator.scaler is not None:  # which says it itself
            self.optimizer.step()
        elif self._bare.defaults.get("fused"):
            self._bare.found_inf = (~norm.isfinite()).float()  # read on the device
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class Fsdp2(Ddp):
    """Every parameter is a DTensor in equal parts; a block's weights are whole only while it computes."""

    def _prepare(self, model, optimizer):
        return model, self._accelerator.prepare(optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()


def _shard(model: nn.Module, accelerator: Accelerator, *, reshard: bool) -> None:
    """Divides the parameters of each block, then the rest, in place.

    Under autocast weights travel in its type. What enters a block is not cast: the residual stream stays in float32
    and autocast chooses each operation's type, as under DDP.
    """
    mesh = init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),))
    dtype = AUTOCAST.get(accelerator.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks(model), model):
        module.register_forward_hook(_not_a_view)
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)


def _not_a_view(module: nn.Module, inputs: Any, output: Any) -> Any:
    """FSDP2 hangs the gathering for the backward pass on the output, and an in-place operation on a view drops it."""
    if isinstance(output, tuple):  # of text models
        return tuple(_not_a_view(module, inputs, part) for part in output)
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def refuse_other_files(then: str, now: str, *, path: object, weights_only: bool) -> None:
    """Raises UserError when a strategy cannot read another's checkpoint: DDP and FSDP2 share one format, each ZeRO
    stage has its own.
    """
    zero = any(name.startswith("zero") for name in (then, now))
    if zero and then != now and not weights_only:
        raise UserError(
            f"{path} was written by {then}, this run is {now}; go on with --strategy {then}, or start a new "
            "--experiment with --resume-weights-only"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a timm backbone: members of a list that is called `blocks`, `layers`, `stages` or `layerN`
    (SwinV2 `layers.0.blocks.1`, ViT `blocks.3`, ResNet `layer2.0`), or `layer` in a text model (BERT `encoder.layer.3`,
    ALBERT `albert_layers.0`), the innermost where such lists are nested. A label head's are not among them.
    """
    members = [
        member
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and _STACK.fullmatch(name.rpartition(".")[2])
        if "label_head" not in name.split(".")
        for member in module
        if next(member.parameters(), None) is not None
    ]
    outer = {
        id(m) for m in members for part in m.modules() if part is not m and any(part is other for other in members)
    }
    return [member for member in members if id(member) not in outer]


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on rank 0, gathered to the CPU one tensor at a time; {} elsewhere. All ranks call it."""
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        whole = _whole(tensor.detach() if isinstance(tensor, DTensor) else tensor)
        if keep:
            state[name] = whole
    return state


def _whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_tensor"):  # ZeRO-3's mark on a parameter
        from mlc.parallel.zero import gather

        return gather(tensor)
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.detach()
