"""Image bytes by row when the shards are far away: range requests straight from the index, or whole shards kept on
local disk (`--cache-dir`).

Both give the bytes that were packed or an error: lengths and crc32 are checked here because a transfer can fail where a
disk does not, and a downloaded shard is compared with its sha256 before it gets its name. Shards on a slow network disk
can be cached as well.
"""

import errno
import functools
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from mlc.data.reader import TarReader
from shards import owner, urls
from shards.console import UserError
from shards.dataset import JSON_NAME, Index, Shard
from shards.files import open_to_read, read_at
from shards.image import BadImage
from shards.tar import file_sha256

AT_ONCE = 16  # range requests in flight per process: hides a latency of 16 decoding times
TRIES = 3  # of a range whose crc32 is wrong; a whole shard is downloaded twice at most
CHANGED = "its crc32 or length is not the index's: the image has changed, or the index is older than the shard"
TOUCH_SECONDS = 10  # how exactly the cache knows what was used last
WAIT_SECONDS = 0.2  # between two looks for room in a cache that other processes are filling


def open_reader(
    index: Index, *, cache_dir: str | Path = "", cache_gb: float = 100.0, check_crc: bool = True
) -> TarReader:
    """The reader for where the shards of a split are: local, behind a URL, or behind a cache on local disk.

    `check_crc` as in TarReader; what comes in ranges is always checked.

    Raises:
        UserError: a server without range requests needs `--cache-dir`.
    """
    ranges = not index.url.startswith("http") or urls.has_ranges(f"{index.url}/{JSON_NAME}")
    if cache_dir:
        cache = ShardCache(Path(cache_dir) / "shards", int(cache_gb * 1e9), ranges=ranges)
        return CachedReader(index, cache, check_crc=check_crc)
    if not index.url:
        return TarReader(index, check_crc=check_crc)
    if not ranges:
        raise UserError(
            f"--data {index.url}: the server sends whole files only, it ignores range requests; --cache-dir DIR "
            "downloads each shard once"
        )
    return RangeReader(index)


class RangeReader(TarReader):
    """Each image is one range request. `expect` starts those of a batch together, so that latencies overlap."""

    def __init__(self, index: Index):
        super().__init__(index)
        self._coming: dict[int, Future] = {}

    def __getstate__(self):
        return super().__getstate__() | {"_coming": {}}

    def expect(self, rows: Sequence[int]) -> None:
        """Starts reading the rows that will be asked for next; what an earlier call expected is forgotten."""
        pool = _pool(os.getpid())
        self._coming = {int(row): pool.submit(self._fetch, int(row)) for row in rows}

    def read(self, row: int) -> bytes:
        coming = self._coming.pop(row, None)
        return coming.result() if coming else self._fetch(row)

    def _fetch(self, row: int) -> bytes:
        index = self.index
        start, size, url = int(index.offset[row]), int(index.size[row]), index.shard_url(int(index.shard[row]))
        for _ in range(TRIES):
            try:
                data = urls.read_range(url, start, start + size)
            except urls.TooShort as error:
                raise BadImage("the shard ends inside this image; it is truncated") from error
            if zlib.crc32(data) == index.crc32[row] and data:
                return data
        raise BadImage(CHANGED)


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One per process: threads do not outlive a fork."""
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ranges")


class CachedReader(TarReader):
    """Reads from shards in a `ShardCache`, which are downloaded when they are first needed."""

    def __init__(self, index: Index, cache: "ShardCache", *, check_crc: bool = True):
        super().__init__(index, check_crc=check_crc)
        self.cache = cache

    def read(self, row: int) -> bytes:
        index, shard, size = self.index, int(self.index.shard[row]), int(self.index.size[row])
        source = index.shard_url(shard) or index.shard_path(shard)
        file = self.cache.open(index.shards[shard], source)
        try:
            data = read_at(file, size, int(index.offset[row]))
        finally:
            os.close(file)  # nothing stays open: a shard that makes room for another gives its space back at once
        if len(data) != size or not data or (self.check_crc and zlib.crc32(data) != index.crc32[row]):
            raise BadImage(CHANGED)
        return data


class ShardCache:
    """Whole shards in one folder, shared by all processes of a node; the longest unused make room for new ones.

    A shard is called by the start of its sha256, so that it can never be mistaken for another version of it. While it
    is downloaded it is called `.part`, with its final size in the name, and locked: a killed download leaves a `.part`
    that nobody locks, and the next process goes on from its end. Files and `.part`s at their final sizes together stay
    below `max_bytes`.
    """

    def __init__(self, folder: Path, max_bytes: int, *, ranges: bool = True):
        self.folder, self.max_bytes, self.ranges = folder, max_bytes, ranges

    def open(self, shard: Shard, source: str | Path) -> int:
        """A descriptor of the local copy of `shard`, whose original is at `source`, a URL or a path.

        Raises:
            UserError: it cannot be downloaded, is another file than was packed, or does not fit.
        """
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # it becomes a file name, and may come from outside
            raise UserError(f"{source}: dataset.json has no sha256 of this shard; pack or index the data set again")
        path = self.folder / f"{shard.sha256[:24]}.tar"
        try:
            file = open_to_read(path)
        except FileNotFoundError:
            return self._bring(shard, source, path)
        if time.time() - os.fstat(file).st_mtime > TOUCH_SECONDS:
            os.utime(file if os.utime in os.supports_fd else path)
        return file

    def _bring(self, shard: Shard, source: str | Path, path: Path) -> int:
        part = path.with_name(f"{path.stem}.{shard.size}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with owner.owned(_lock(path)):
                if not path.exists():
                    self._reserve(shard, part)
                    self._download(shard, source, part)
                    os.utime(part)
                    file = open_to_read(part)  # before others can see it and make room of it
                    part.replace(path)
                    return file
        except OSError as error:
            hint = "; choose another --cache-dir or a smaller --cache-gb" if error.errno == errno.ENOSPC else ""
            raise UserError(f"--cache-dir: {self.folder} cannot be written: {error.strerror}{hint}") from error
        return self.open(shard, source)

    def _download(self, shard: Shard, source: str | Path, part: Path) -> None:
        for _ in range(2):  # the rest of a killed download may be damaged: then once more from the start
            if urls.is_url(source):
                urls.download(str(source), part, shard.size, ranges=self.ranges)
            else:
                copy_rest(Path(source), part)
            if part.stat().st_size == shard.size and file_sha256(part) == shard.sha256:
                return
            part.write_bytes(b"")
        part.unlink()
        raise UserError(
            f"{source} is not the file that was packed (its sha256 differs); upload it again or run `mlc verify` on "
            "the original"
        )

    def _reserve(self, shard: Shard, part: Path) -> None:
        """Makes room for the shard and begins its `.part`, which keeps the room; waits while others fill the cache."""
        if shard.size > self.max_bytes:
            raise UserError(
                f"--cache-gb {self.max_bytes / 1e9:g} is smaller than the shard {shard.name} "
                f"({shard.size / 1e9:.3g} GB); give at least that for every process"
            )
        while True:
            with owner.owned(self.folder / "room.lock"):
                if part.exists() or self._make_room(shard.size):
                    part.touch()
                    return
            time.sleep(WAIT_SECONDS)

    def _make_room(self, size: int) -> bool:
        """Deletes what was not used for the longest time until `size` more bytes fit; False where they never do."""
        files = sorted(_status(path) for path in self.folder.iterdir() if path.suffix in (".tar", ".part"))
        used = sum(bytes for _, bytes, _ in files)
        for _, bytes, path in files:
            if used + size <= self.max_bytes:
                break
            if _delete(path):
                used -= bytes
        return used + size <= self.max_bytes


def _status(path: Path) -> tuple[float, int, Path]:
    """(last use, bytes that the cache reckons with, path); a file that has just gone takes no room."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0.0, 0, path
    return status.st_mtime, int(path.name.split(".")[1]) if path.suffix == ".part" else status.st_size, path


def _delete(path: Path) -> bool:
    """False for a download that is going on; one whose lock nobody holds was killed."""
    if path.suffix == ".tar":
        path.unlink(missing_ok=True)  # who has it open reads on
        return True
    try:
        with closing(owner.take(_lock(path.with_name(f"{path.name.split('.')[0]}.tar")))):
            path.unlink(missing_ok=True)
        return True
    except owner.Held:
        return False


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def copy_rest(source: Path, to: Path) -> None:
    """Appends to `to` what `source` has beyond its length. Raises UserError where `source` cannot be read."""
    if not os.access(source, os.R_OK):
        raise UserError(f"shard {source} cannot be read; does it exist?")
    with open(source, "rb") as original, open(to, "ab") as copy:
        original.seek(copy.tell())
        shutil.copyfileobj(original, copy, urls.CHUNK)
        copy.flush()
        os.fsync(copy.fileno())
