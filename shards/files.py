"""Writing files so that a crash or a full disk never leaves half of one under its name, and is one line to the user."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.console import UserError

ABANDONED = 3600.0  # seconds that nobody has written to a file under construction: its program was killed


def open_to_read(path: Path | str) -> int:
    """A descriptor for `read_at`."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows reads text else


def read_at(file: int, size: int, offset: int) -> bytes:
    """`os.pread`, also on Windows, where there is none and a descriptor belongs to one thread."""
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, size)


@contextmanager
def whole(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """Yields the name to write to; the file takes its place when it is whole, and is deleted when it is not.

    failures: what else than OSError the writing raises when the disk fails.

    Raises:
        UserError: the disk is full, read-only or broken.
    """
    with disk_errors(path, *failures), replacing(path) as building:
        yield building


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`whole`, for who has an answer of its own to an OSError.

    The file has the mode that the umask (or the folder) gives a new one, whatever the library that writes it thinks:
    safetensors lets nobody but the owner read.
    """
    _forget_abandoned(path)
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        building.touch()
        mode = building.stat().st_mode
        yield building
        if building.stat().st_mode != mode:
            building.chmod(mode)
        with open(building, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut must not outlive its data
        building.replace(path)
    except BaseException:
        with suppress(OSError):
            building.unlink(missing_ok=True)
        raise


def _forget_abandoned(path: Path) -> None:
    prefix = f".{path.name}."
    with suppress(OSError):
        for name in os.listdir(path.parent):
            file = path.with_name(name)
            if name.startswith(prefix) and name.endswith(".tmp") and time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


@contextmanager
def disk_errors(path: Path, *failures: type[Exception]) -> Iterator[None]:
    """Around anything that writes to `path`; see `whole`."""
    try:
        yield
    except (OSError, *failures) as error:
        raise UserError(
            f"{path} could not be written ({getattr(error, 'strerror', None) or error}); make room or mend the disk, "
            "then start again (a training with --resume auto)"
        ) from error


PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml[^>]*>\s*<Error)",
    re.IGNORECASE,
)


def check_download(file: Path, given: str = "") -> None:
    """Raises UserError where `download_problem` knows why a file cannot be what it is called;
    `given`: the flag that names it."""
    if problem := download_problem(file):
        raise UserError(f"{given} {file} {problem}".strip())


def check_downloads(folder: Path, pattern: str, given: str = "") -> None:
    """The same of the files in a folder whose names match a regular expression."""
    for file in sorted(folder.iterdir()):
        if re.fullmatch(pattern, file.name) and file.is_file():
            check_download(file, given)


def download_problem(file: Path | bytes) -> str:
    """How to go on where a file, or its first bytes, is only what stands in for another: `is ...,
    and what to do`; "" for any other, and for what cannot be read."""
    start = _start(file) if isinstance(file, Path) else file[:512]
    if start is None:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not yet the file itself: run `git lfs pull` in its repository"
    if PAGE.match(start):
        return "is a web page (HTML) and not the file itself: download it again, perhaps with a login"
    return "" if start else "is empty: download or copy it again"


def _start(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError:
        return None
