"""`--batch-size auto`: the largest micro-batch that fits, found by a few trials before the first step.

The micro-batch decides how fast a step is and nothing else: accumulation makes up the same global batch. It is the same
on all processes, so the one with the least memory decides. What a process finds out alone must not leave the others
waiting: trials run on the bare model, without communication, and after each the processes agree on the worst result.

A micro-batch needs a fixed amount and as much again for each image. Two small trials give both, a third one on a GPU
tries what they promise; so memory hardly ever runs out on the way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlc.config import Config
from mlc.data.loader import BatchPlan, batch_sizes, plan_batches
from mlc.data.mixing import together
from mlc.models.freeze import learning_norms, train_mode
from mlc.parallel import memory
from mlc.parallel.compiler import has_own_forward
from mlc.parallel.strategy import Choice, blocks
from shards.console import UserError

LESS = "--grad-checkpointing all, a smaller --img-size or --strategy fsdp2 take less"


def plan(config: Config, choice: Choice, world: int) -> BatchPlan:
    """The division of the global batch; for `auto` with the smallest micro-batch, until `find` knows better.

    Raises:
        UserError: it cannot be divided in this way.
    """
    if config.batch_size != "auto":
        return plan_batches(config.global_batch_size, config.batch_size, world, together=together(config))
    if choice.zero_stage:
        raise UserError(
            f"--batch-size auto does not go with {choice.name}, whose buffers only a run can measure; give a number "
            "(`mlc plan` estimates it, --dry-run tries it)"
        )
    smallest = batch_sizes(config.global_batch_size, world, together=together(config))[0]
    return BatchPlan(config.global_batch_size, smallest, world)


def find(
    plan: BatchPlan,
    trial: Callable[[int], None],
    *,
    together: int,
    choice: Choice,
    model: nn.Module,
    averaged: nn.Module | None,
    device: torch.device,
    before: int | None = None,
) -> tuple[BatchPlan, str]:
    """(the plan with the largest micro-batch that fits on every device, a line for the log). All processes call it.

    trial: does one forward and backward pass of the bare model with so many images; leaves nothing changed here.
    together: samples that must share a micro-batch, which is then a multiple of it.
    model, averaged: not divided yet, on the device.
    before: the micro-batch of the checkpoint to go on from, kept if it fits: dropout depends on it.

    Raises:
        UserError: not even the smallest fits.
    """
    room, later = memory.room(device), _later(choice, model, averaged, plan.world_size)

    def share(size: int) -> float:
        taken = _taken(trial, size, model, device) + later
        return _worst(max(taken, 0) / room if room > 0 else math.inf, device)

    sizes = batch_sizes(plan.global_batch, plan.world_size, together=together)
    if sizes == [1]:
        check_one_image(plan, trial, model, device)
    elif sizes[0] == 1 and _refuses_one_image(trial, model, device):
        sizes = sizes[1:]
    whole = choice.name == "ddp" and device.type == "cuda"  # a trial is what the run will be
    size, shares = search(sizes, share, confirm=whole)
    limit = f"{room / 2**30:.1f} GiB ({memory.USABLE[device.type]:.0%} of what is free)"
    if not size:
        early = ", tried before the weights are divided (a number may fit)" if choice.divided else ""
        raise UserError(f"--batch-size auto: {sizes[0]} per device is too much for {limit}{early}; {LESS}")
    kept = before in sizes and before < size
    found = replace(plan, batch_size=before if kept else size)
    why = f"as before; {size} would fit" if kept else _why(sizes, size, shares)
    return found, (
        f"batch size auto: {found.batch_size} per device ({why}), accumulation {found.accumulation}; "
        f"{size} take{'s' * (size == 1)} {shares[size]:.0%} of {limit}"
    )


def check_one_image(plan: BatchPlan, trial: Callable[[int], None], model: nn.Module, device: torch.device) -> None:
    """Raises UserError where the plan gives a model one image at a time and its batch norm needs two."""
    if plan.batch_size == 1 and (norm := _refuses_one_image(trial, model, device)):
        raise UserError(
            f"--batch-size: 1 image per device and pass is too few for batch norm ({norm}), which "
            f"needs 2 to learn from; use --batch-size 2 and a --global-batch-size that is a multiple of "
            f"{2 * plan.world_size}, or --freeze its weights"
        )


def _refuses_one_image(trial: Callable[[int], None], model: nn.Module, device: torch.device) -> str:
    """A batch norm that is in the way of a pass with one image, "" where there is none. A map of
    features has many values for each channel, but pooled features have one."""
    norms = learning_norms(model)
    if not norms:
        return ""
    train_mode(model)
    try:
        with _unchanged(model, device):
            trial(1)
    except (ValueError, RuntimeError, MemoryError) as error:
        if "more than 1 value per channel" in str(error):
            return norms[-1]
        if not memory.is_out_of_memory(error):
            raise
    return ""


def search(sizes: Sequence[int], share: Callable[[int], float], *, confirm: bool) -> tuple[int, dict[int, float]]:
    """(the largest size whose share of the memory is at most 1, or 0; {size: share} of all that are known).

    sizes: ascending.
    share: size -> the share it takes, inf where memory ran out; may be asked for sizes that are not in `sizes`.
    confirm: ask for the result itself; else what two small ones promise is believed.
    """
    smallest = min(max(2, sizes[0]), sizes[-1])  # some layers (batch norm) refuse a single image
    shares = {size: share(size) for size in sorted({smallest, min(2 * smallest, sizes[-1])})}
    while True:
        fits = max((size for size in sizes if shares.get(size, math.inf) <= 1), default=0)
        fails = min((size for size, taken in shares.items() if taken > 1), default=math.inf)
        left = [size for size in sizes if fits < size < fails]
        promised = _promised(shares)
        hopeful = [size for size in left if promised(size) <= 1]
        if not left or (fits and not hopeful):
            return fits, {size: promised(size) for size in sizes} | shares
        guess = hopeful[-1] if hopeful else left[0]
        if hopeful and not confirm:
            shares[guess] = promised(guess)
            return guess, {size: promised(size) for size in sizes} | shares
        shares[guess] = share(guess)


def _promised(shares: dict[int, float]) -> Callable[[int], float]:
    """The line through the two largest trials that ended well; inf for all where there are no two."""
    known = sorted((size, taken) for size, taken in shares.items() if math.isfinite(taken))[-2:]
    if len(known) < 2:
        return lambda size: math.inf
    (a, low), (b, high) = known
    return lambda size: high + (size - b) * (high - low) / (b - a)


def _why(sizes: Sequence[int], size: int, shares: dict[int, float]) -> str:
    above = [other for other in sizes if other > size]
    if not above:
        return "all of its share"
    taken = shares[above[0]]
    return f"{above[0]} would take {taken:.0%}" if math.isfinite(taken) else f"{above[0]} ran out of memory"


# ---- a trial ---------------------------------------------------------------------------------------------------------


def _taken(trial: Callable[[int], None], size: int, model: nn.Module, device: torch.device) -> float:
    """Bytes that so many images and the gradients take at the peak; inf where memory runs out."""
    try:
        with memory.peak(device) as peak, _unchanged(model, device):
            for parameter in filter(_trained, model.parameters()):
                parameter.grad = torch.zeros_like(parameter)  # as they are from the second micro-batch on
            trial(size)
        return peak.bytes
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
    return math.inf


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores buffers (running statistics) and random states, drops gradients and what was compiled for this size."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            model.zero_grad(set_to_none=True)
            if any(map(has_own_forward, model.modules())):
                torch._dynamo.reset()


def _later(choice: Choice, model: nn.Module, averaged: nn.Module | None, world: int) -> float:
    """Bytes that a device has in training and not in the trial: AdamW's moments.

    With FSDP2 less, since weights and moments are divided. Not divided is the gradient, which stays whole while it
    accumulates, and what is gathered: the parts outside of blocks, a block and the next one, and their gradients.
    """
    trained = _bytes(filter(_trained, model.parameters()))
    if choice.name != "fsdp2":
        return 2 * trained
    weights = _bytes(model.parameters())
    of_blocks = [_bytes(block.parameters()) for block in blocks(model)]
    gathered = weights - sum(of_blocks) + 4 * max(of_blocks, default=0) if choice.reshard else 2 * weights
    whole = weights + (_bytes(averaged.parameters()) if averaged is not None else 0)
    return 3 * trained / world + gathered - whole * (1 - 1 / world)


def _trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _worst(share: float, device: torch.device) -> float:
    """The largest of all processes."""
    value = torch.tensor(share, dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


# ---- when memory runs out all the same -------------------------------------------------------------------------------


def in_training(config: Config):
    """Around a training: out of memory is one line, with the settings that make the same run fit."""
    return memory.out_of_memory(lambda: f"{_smaller(config)}; --resume auto goes on from the last checkpoint")


def in_evaluation(config: Config):
    """Around an evaluation while training. There a smaller batch is nothing but slower."""
    size = config.validation_batch_size or config.batch_size
    return memory.out_of_memory(
        lambda: (
            f"in the evaluation with {size} images at a time: --validation-batch-size {max(1, size // 2)}, then "
            "--resume auto goes on from the last checkpoint"
        )
    )


def in_prediction():
    return memory.out_of_memory(lambda: "a smaller --batch-size takes less")


def _smaller(config: Config) -> str:
    if config.batch_size == "auto":
        return f"the model itself does not fit; {LESS}"
    world = dist.get_world_size() if dist.is_initialized() else 1
    total = config.global_batch_size or config.batch_size * world
    fit = [size for size in batch_sizes(total, world, together=together(config)) if 2 * size <= config.batch_size]
    if not fit:
        return f"with --batch-size {config.batch_size}; {LESS}"
    return (
        f"with --batch-size {config.batch_size}: --batch-size {fit[-1]} --global-batch-size {total} is the same run in "
        "less memory, --grad-checkpointing all too"
    )
