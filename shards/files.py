"""Writing files so that a crash or a full disk never leaves half of one under its name, and is one line to the user."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.console import UserError


@contextmanager
def whole(path: Path, *failures: type[Exception]) -> Iterator[Path]:
    """Yields the name to write to; the file takes its place when it is whole, and is deleted when it is not.

    failures: what else than OSError the writing raises when the disk fails.

    Raises:
        UserError: the disk is full, read-only or broken.
    """
    building = path.with_name(f".{path.name}.tmp")
    with disk_errors(path, *failures):
        try:
            yield building
            building.replace(path)
        except BaseException:
            with suppress(OSError):
                building.unlink(missing_ok=True)
            raise


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
