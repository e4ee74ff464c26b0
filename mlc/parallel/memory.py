"""How much memory there is, how much a piece of work takes at its peak, and one line when it was not enough.

A GPU's allocator counts for us and raises when there is nothing left. A CPU's does neither: the system kills a process
that takes too much. There every tensor is counted as it is made, and only half of what is free may be used; the other
half is for what nobody counts: workers, libraries, files being read.
"""

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shards.console import UserError

# Share of what is free; fragments and communication buffers live in the rest.
USABLE = {"cuda": 0.9, "cpu": 0.5, "mps": 0.5}
_SAID = re.compile("can't allocate memory|out of memory|ALLOC_FAILED")  # by a CPU's allocator, CUDA, cuBLAS and cuDNN
_CGROUPS = "/sys/fs/cgroup"


# ---- how much there is -----------------------------------------------------------------------------------------------


def room(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        mine = torch.cuda.memory_reserved(device)
        return int(USABLE["cuda"] * (free + mine)) - torch.cuda.memory_allocated(device)
    return int(USABLE["cpu"] * host_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def host_memory(system: Path = Path("/")) -> int:
    """Free bytes of the machine, or of the container or job where that may have less."""
    free = [int(line.split()[1]) * 1024 for line in _lines(system / "proc/meminfo") if line.startswith("MemAvailable:")]
    if not free:
        import psutil  # which comes with accelerate

        free = [psutil.virtual_memory().available]
    for line in _lines(system / "proc/self/cgroup"):  # `0::/job/step`, and `4:memory:/job/step` in version 1
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        root = system / _CGROUPS.lstrip("/") / kind
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                free += _left_in(folder)
    return max(0, min(free))


def _left_in(group: Path) -> list[int]:
    """What a control group may still take, [] where it has no limit. The kernel gives cached files up first."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (most := "".join(_lines(group / limit))).isdigit():
            files = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[0] == cached]
            return [int(most) - int("".join(_lines(group / usage))) + sum(files)]
    return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that a CUDA device makes while the host goes on. Apple's would read memory that may
    have been freed by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


# ---- how much is taken -----------------------------------------------------------------------------------------------


class Peak:
    """`bytes`: the most that was held at a time, beyond what was there before; known after the `with`."""

    bytes = 0


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Counts the tensors made inside; memory that the program freed is given back before and after."""
    found = Peak()
    if device.type != "cuda":
        with _Counter() as counter:
            yield found
        found.bytes = counter.most
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
    finally:
        torch.cuda.reset_peak_memory_stats(device)  # the log's peak is that of the training


class _Counter(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._alive:  # neither a view nor changed in place
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


# ---- when it was not enough ------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this process asked for memory in vain; a worker process that did has an error of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error))) and "DataLoader worker" not in str(error)


@contextmanager
def out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Around work on a device: no memory left is one line, which ends with what to do about it.

    advice: called when it has happened.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        raise UserError(f"out of memory{f' for another {asked[1]}' if asked else ''}; {advice()}") from None
