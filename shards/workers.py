"""Work spread over processes that start fresh, so that no thread or lock is copied, and that end with their parent.

A pool's workers normally outlive a parent that was killed, and would go on writing into the folder that the next run
has already taken over.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.console import UserError

LOCKS = 8  # of a worker and its queues, about

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yields `function(task)` in the order of the tasks; in this process where one worker is enough.

    `function` must be importable by name. What it raises is raised here, and what has not begun by then is dropped.
    """
    tasks = list(tasks)
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    need_locks("-j", workers, alone=1)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; run again with a smaller -j") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def need_locks(flag: str, workers: int, *, alone: int) -> None:
    """Processes that work together need locks, which are files of /dev/shm (sem_open).

    Raises:
        UserError: a container has none, or has it full or read-only. `flag` asked for the processes; its value `alone`
            does without.
    """
    context = multiprocessing.get_context("spawn")
    try:
        _ = [context.Lock() for _ in range(LOCKS * (workers + 1))]
    except OSError as error:
        raise UserError(
            f"{flag} {workers}: /dev/shm cannot be written ({error.strerror}; {free_shm()}), and processes need it to "
            f"work together; mount it writable and with room, or {flag} {alone}"
        ) from error


def free_shm() -> str:
    """`12 of 64 MB free`, of /dev/shm."""
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError:
        return "there is none"
    return f"{space.free / 1e6:.0f} of {space.total / 1e6:.0f} MB free"


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
