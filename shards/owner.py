"""One owner at a time of what only one program may write: a run's folder, a data set being packed, a shard in a cache.

The lock is a file that says who holds it. flock would forget a dead holder by itself, but Lustre and many NFS mounts
do not have it; that a file can be created only once holds everywhere. What a kill leaves behind is told from a lock
that is held by asking the kernel for the process (its number and when it started, as numbers come again), and on
another machine or in another container by its heartbeat, the file's time, which the holder moves on every few seconds.

    PATH.1  PATH.2  ...    the lock PATH; mostly there is one, or none when it is free

A dead holder's file is followed by the next number. To delete it and create the same name again would let two who do
so at the same time both win; of two who create the next number, one does.
"""

import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.console import say
from shards.json_text import to_json

RUN_LOCK = ".training"  # in a run's folder
BEAT = 5.0  # seconds
PATIENCE = 60.0  # seconds without a beat that make a holder elsewhere dead: NFS may tell of a file's time so late
LOOK = 0.1  # seconds between two looks at a lock that is waited for


@dataclass(frozen=True)
class Holder:
    """A process; `place` is the same for those that see each other's numbers, `started` tells two of one number apart,
    `since` is a Unix time."""

    host: str
    place: str
    pid: int
    started: str
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        where = "this machine" if self.place == _place() else self.host
        return f"process {self.pid} on {where}, since {since}"


class Held(Exception):
    """Somebody else, `holder`, has the lock and is alive."""

    def __init__(self, holder: Holder):
        super().__init__(str(holder))
        self.holder = holder

    @property
    def fix(self) -> str:
        """What to do if it should be dead: nothing but to wait, and only on another machine."""
        if self.holder.place == _place():
            return f"`kill {self.holder.pid}` ends it"
        return f"if {self.holder.host} is gone, the same command goes on {PATIENCE:.0f} s after its last sign of life"


class Lock:
    """Held from `take` until `close`; a thread moves the file's time on.

    A process that was suspended until another took the lock over ends as soon as it finds out: it may not write.
    """

    def __init__(self, path: Path, file: Path, holder: Holder):
        self._path, self._file, self._holder = path, file, holder
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def close(self) -> None:
        """Releases. Does nothing in a fork, or where the file's folder has gone."""
        self._released.set()
        if os.getpid() == self._holder.pid and _read(self._file)[0] == self._holder:
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a disk that does not answer for a moment
                if _read(self._file)[0] == self._holder:
                    os.utime(self._file)
                elif (others := _files(self._path)) and not self._released.is_set():
                    _lost(self._path, _read(others[-1])[0])


def _lost(path: Path, holder: Holder | None) -> None:
    print(f"error: {path} was taken over by {holder or 'another process'}", file=sys.stderr, flush=True)
    os._exit(1)


def take(path: Path) -> Lock:
    """Takes the lock `path`, of whose folder it is a name, from nobody or from one who is dead.

    Raises:
        Held: by a process that lives; to find that out of another machine may take `PATIENCE` seconds.
    """
    while True:
        dead = _files(path)
        for file in dead:
            if holder := _alive(file):
                raise Held(holder)
        number = max((int(file.suffix[1:]) for file in dead), default=0) + 1
        mine, me = path.with_name(f"{path.name}.{number}"), _myself()
        if not _created(mine, me):
            continue
        if set(_files(path)) <= {mine, *dead}:
            for file in dead:
                file.unlink(missing_ok=True)
            return Lock(path, mine, me)
        mine.unlink(missing_ok=True)  # another began from another state of things: neither is sure
        time.sleep(random.uniform(0, LOOK))


def holder(path: Path) -> Holder | None:
    """Who has the lock, if anybody who lives."""
    return next(filter(None, map(_alive, _files(path))), None)


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """With the lock, which is waited for."""
    while True:
        try:
            lock = take(path)
            break
        except Held:
            time.sleep(LOOK)
    try:
        yield
    finally:
        lock.close()


# ---- who lives -------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The lock's files, by number."""
    prefix = f"{path.name}."
    numbers = [name.removeprefix(prefix) for name in os.listdir(path.parent) if name.startswith(prefix)]
    return [path.with_name(f"{prefix}{number}") for number in sorted(filter(str.isdecimal, numbers), key=int)]


def _created(file: Path, holder: Holder) -> bool:
    """False where the file is there already: another was faster."""
    try:
        with file.open("x") as stream:
            stream.write(to_json(asdict(holder)))
    except FileExistsError:
        return False
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _alive(file: Path) -> Holder | None:
    """Who holds the lock by this file; None where that process is dead."""
    holder, touched = _read(file)
    if holder and holder.place == _place() and os.name == "posix":  # elsewhere `os.kill` with 0 is no question
        return holder if _running(holder) else None
    return _beating(file, touched) if touched else None


def _beating(file: Path, touched: int) -> Holder | None:
    """A holder whom no question reaches: alive if the file's time moves on before it is `PATIENCE` old."""
    deadline, told = time.monotonic() + PATIENCE - _age(file, touched), False
    while time.monotonic() < deadline:
        holder, now = _read(file)
        if not now or (holder and now != touched):
            return holder
        if holder and not told:
            say(f"looking for a sign of life of {holder}, for at most {deadline - time.monotonic():.0f} s")
            told = True
        time.sleep(LOOK)
    return None


def _read(file: Path) -> tuple[Holder | None, int]:
    """(who wrote it, None while it is being written; its time in ns, 0 where it is gone). NFS looks at its server when
    a file is opened, not for a `stat`."""
    try:
        with file.open() as stream:
            return _parse(stream.read()), os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def _parse(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _age(file: Path, touched: int) -> float:
    """Seconds since the file's time by the clock that gave it: the disk's own, not this machine's."""
    probe = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    probe.touch()
    now = probe.stat().st_mtime_ns
    probe.unlink(missing_ok=True)
    return max(0.0, (now - touched) / 1e9)


def _myself() -> Holder:
    return Holder(socket.gethostname(), _place(), os.getpid(), _started(os.getpid()), round(time.time(), 3))


def _place() -> str:
    """Process numbers mean the same in one container of one boot."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


def _running(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return _started(holder.pid) in (holder.started, "")


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; "-" of one that has ended, "" where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "-" if state in "ZX" else fields[18]
