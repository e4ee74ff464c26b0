"""Joining the other processes, on GPUs or on a CPU, and refusing to train apart by mistake.

`accelerate launch` with a multi-GPU file on a machine without GPUs starts processes that never meet (each trains alone
and overwrites the other's files), unless ACCELERATE_USE_CPU is set; so it is set here, before Accelerate looks at it.
"""

import logging
import os
import random
import re
import sys
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from mlc.parallel import agree
from mlc.parallel.preempt import stop_with_launcher
from mlc.parallel.srun import join_srun
from shards import owner
from shards.console import UserError
from shards.files import disk_errors
from shards.workers import default_workers

# By these Accelerate would divide the model itself; see mlc/parallel/strategy.py.
_OF_ACCELERATE = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
FIRST_TIMEOUT = 30 * 60.0  # seconds, until a first step is done: compiling, cold caches, converting a checkpoint
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "timeout caused pair closure")  # gloo's words


def start(amp_dtype: str = "auto", *, group: bool = False) -> Accelerator:
    """The Accelerator of this process, connected to all others that the launcher started.

    group: give a process that is alone a group of its own, for code that divides among however many there are.

    Raises:
        UserError: fewer processes are connected than the launcher started, or there are more than GPUs.
    """
    world, local_world = _from_env("WORLD_SIZE"), _from_env("LOCAL_WORLD_SIZE")
    on_cpu = uses_cpu(world, group=group)
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {world}, but MASTER_ADDR is not set: the processes cannot meet; "
            "start them with `accelerate launch` or torchrun"
        )
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if local_world > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1 whatever the machine has
            torch.set_num_threads(max(1, default_workers() // local_world))
    elif torch.cuda.is_available() and local_world > torch.cuda.device_count():
        raise UserError(
            f"{local_world} processes were started on a machine with {torch.cuda.device_count()} GPU(s); "
            f"launch with --num_processes {torch.cuda.device_count()}"
        )
    for name in _OF_ACCELERATE:
        os.environ.pop(name, None)
    if group and world == 1 and not torch.distributed.is_initialized():
        alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", **alone)
    met = torch.distributed.is_initialized()  # in an earlier stage of the run
    accelerator = Accelerator(
        mixed_precision=_precision(amp_dtype, on_cpu),
        cpu=on_cpu,
        kwargs_handlers=[
            # Rank 0's running statistics are the model's: sent out before each forward pass and before each save.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=FIRST_TIMEOUT)),
        ],
    )
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes, but {accelerator.num_processes} are connected; each would train "
            "alone. Check `distributed_type` in the accelerate configuration (MULTI_GPU for GPUs and for a CPU)"
        )
    if world > 1 and not met:
        _say_rank(accelerator.process_index)
    set_timeout(FIRST_TIMEOUT)
    return accelerator


def uses_cpu(world: int, *, group: bool = False) -> bool:
    """Whether there is no GPU for this process, or none is wanted. Apple's is for one that is
    alone and in no group: neither gloo nor NCCL moves its tensors."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return True
    alone = world == 1 and not group
    return not (torch.cuda.is_available() or (alone and torch.backends.mps.is_available()))


def _say_rank(rank: int) -> None:
    """Warnings and log lines of libraries, which come from any process, begin with its rank."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: f"[rank {rank}] {plain(*args, **kwargs)}"
    logging.basicConfig(level=logging.WARNING, format=f"[rank {rank}] %(name)s: %(message)s")


def _from_env(name: str) -> int:
    return int(os.environ.get(name, 1))


def _precision(amp_dtype: str, on_cpu: bool) -> str | None:
    """Accelerate's name of the autocast type; None leaves it to the launcher's setting."""
    if amp_dtype == "auto":
        return "no" if on_cpu else None
    return {"none": "no"}.get(amp_dtype, amp_dtype)


def seed_everything(seed: int) -> None:
    """Seeds every library's generator, 0 <= seed < 2^63."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def set_timeout(seconds: float, *groups: torch.distributed.ProcessGroup) -> None:
    """From now on a collective of all processes, or of these groups, fails when another keeps it waiting so long.

    On GPUs NCCL's watchdog ends the process then, with a report of its own.
    """
    if torch.distributed.is_initialized():
        of_torch = torch.distributed.distributed_c10d
        change = getattr(of_torch, "set_timeout", None) or of_torch._set_pg_timeout  # its name in older torch
        for group in (None, *groups):
            change(timedelta(seconds=seconds), group)


@contextmanager
def peers():
    """Around a program: knows the other processes when `srun` started them, and when one of them fails or hangs, this
    one says so in a line and ends; as it does when the launcher is killed. What it came to own it owns no longer after.
    """
    join_srun()
    stop_with_launcher()
    try:
        yield
    except RuntimeError as error:
        if reason := _lost(str(error)):
            print(f"[rank {os.environ.get('RANK', 0)}] stopped: {reason}", file=sys.stderr, flush=True)
            os._exit(1)  # the process group is broken: an orderly exit would wait for the others
        raise
    finally:
        _disown()


_owned: dict[Path, list[Path]] = {}  # {a run's folder: the folders that had to be made for its lock}
_locks: list[owner.Lock] = []  # of the first process


def own(folder: Path) -> None:
    """From here to the end of the program (`peers`) this run alone writes into its folder; all processes call it.

    Raises:
        UserError: on all of them, where another run is training there.
    """
    if folder not in _owned:
        _owned[folder] = [path for path in (folder, *folder.parents) if not path.exists()]
        agree.from_first(lambda: _take(folder))


def _take(folder: Path) -> None:
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _locks.append(owner.take(folder / owner.RUN_LOCK))
    except owner.Held as held:
        raise UserError(
            f"{folder} is in training already, by {held}; `touch {folder}/STOP` saves and stops that ({held.fix}), or "
            "choose another --experiment"
        ) from None


def _disown() -> None:
    """A folder that stayed empty, for want of a run that could begin, is taken away again."""
    while _locks:
        _locks.pop().close()
    made = [path for paths in _owned.values() for path in paths]
    _owned.clear()
    for path in made if os.environ.get("RANK", "0") == "0" else ():
        with suppress(OSError):
            path.rmdir()


def _lost(error: str) -> str:
    """What the failure of a collective means, '' for any other error."""
    if found := re.search(r"Timed out waiting (\d+)ms", error):
        return (
            f"waited {int(found[1]) / 1000:g} s for another process, which hangs or was itself stopped "
            "(--collective-timeout); --resume auto goes on from the last checkpoint"
        )
    return "another process failed, its error is the one to read" if any(word in error for word in _LOST) else ""


def only_deterministic() -> None:
    """Operations give the same bits every time on the same device, or an error that names the one that cannot.

    On CUDA cuBLAS reads its variable when the device is first used, so call it before that.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # which costs time and is for finding mistakes
    torch.use_deterministic_algorithms(True)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; the tensor itself where there is one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


class Fetched:
    """Tensors on their way to the host, copied as soon as the device has made them: nobody waits before `read`."""

    def __init__(self, *tensors: torch.Tensor):
        cuda = tensors[0].is_cuda  # Apple's GPU would still be writing when somebody reads
        self._host = [tensor.to("cpu", non_blocking=cuda) for tensor in tensors]
        self._copied = torch.cuda.Event() if cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> list[np.ndarray]:
        if self._copied:
            self._copied.synchronize()
        return [tensor.numpy() for tensor in self._host]


class Arriving:
    """The sum of `values` [N] over all processes, on its way to the host.

    The copy is queued right behind the sum. A `.tolist()` later on would queue behind all that was started meanwhile.
    """

    def __init__(self, values: torch.Tensor):
        self.values = all_sum(values)
        self._fetched = Fetched(self.values)

    def read(self) -> list[float]:
        return self._fetched.read()[0].tolist()


def same_buffers(*models: torch.nn.Module | None) -> None:
    """Gives every process rank 0's floating-point buffers (running statistics of batch norm)."""
    if torch.distributed.is_initialized():
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                if buffer.is_floating_point():
                    torch.distributed.broadcast(buffer, 0)
