"""Any of timm's optimizers by name, with the fused kernels where torch has them.

A fused kernel reads on the device whether the gradient is finite; the others must be asked before, and the host waits.
"""

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch.distributed.tensor import DTensor

from shards.console import UserError, did_you_mean

FUSED = ("adamw", "adam", "sgd", "momentum", "nesterov")
_FUSED_ON_DTENSORS = ("adamw", "adam")  # torch has no sharding rule for the others' kernels
# What updates each number by its own history alone, so that it does not matter how parameters are cut into parts.
ELEMENTWISE = (*FUSED, "nadamw", "nadam", "radamw", "radam", "adamax", "lion", "rmsprop", "adagrad")


def make_optimizer(
    groups: list[dict],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    only_elementwise: bool = False,
) -> torch.optim.Optimizer:
    """timm's optimizer `name` (`sgd` is Nesterov's); betas, eps and momentum where it takes them.

    groups: as `param_groups` makes them.
    only_elementwise: refuse those that look at a parameter as a whole (LAMB), for code that cuts it into parts.
    UserError for an unknown name, one whose package is missing, and one that is refused.
    """
    known = list_optimizers()
    if name not in known:
        raise UserError(f"--opt {name}: timm has no such optimizer{did_you_mean(name, known)}")
    if only_elementwise and name not in ELEMENTWISE:
        raise UserError(
            f"--opt {name} looks at a parameter as a whole, which ZeRO cuts into parts; use --strategy ddp or fsdp2, "
            f"or one of {', '.join(ELEMENTWISE)}"
        )
    info = get_optimizer_info(name)
    settings = {"betas": betas} if info.has_betas and info.num_betas == 2 else {}
    settings |= {"eps": eps} if info.has_eps else {}
    divided = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    settings |= {"fused": True} if name in (_FUSED_ON_DTENSORS if divided else FUSED) else {}
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr, momentum=momentum, **settings)
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"--opt {name} cannot be made: {text or type(error).__name__}; use another") from error


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """LAMB and Adan count their steps in the groups, which no checkpoint holds: after loading one, the steps so far."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = torch.full_like(torch.as_tensor(group["step"]), steps)
