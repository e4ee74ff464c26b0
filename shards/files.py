"""Writing files so that a crash or a full disk never leaves half of one under its name, and is one line to the user."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.console import UserError

ABANDONED = 3600.0  # seconds that nobody has written to a file under construction: its program was killed


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
