"""One process decides, all are told.

Whatever a process finds out by itself (a file, the clock, its environment, a sum of floats, which depends on the number
of threads) may differ from what another finds. A process may fail by it: then all end. It must not take another way
than the others by it, or they wait for each other in different collectives. So the first one looks, and what it found
is the same everywhere.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shards.console import UserError
from shards.json_text import to_json

T = TypeVar("T")


def from_first(find: Callable[[], T]) -> T:
    """What `find` returns on the first process, on all. Its UserError is raised on all; every process calls this."""
    if not dist.is_initialized():
        return find()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def gathered(value: T) -> list[T]:
    """The value of each process, on all; every process calls this."""
    values = [value]
    if dist.is_initialized():
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def require_same(facts: dict[str, Any]) -> None:
    """Every process calls this with what must be the same on all of them, as JSON can say it.

    Raises:
        UserError: another process has another value than the first, with both and the name.
    """
    own = {name: to_json(value, sort_keys=True, default=str) for name, value in facts.items()}
    first, *others = gathered(own)
    for rank, other in enumerate(others, 1):
        for name in dict.fromkeys([*first, *other]):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {rank} was started with another {name}: {other.get(name)}, the first one has "
                    f"{first.get(name)}; all need the same command, files and versions"
                )
