"""Image bytes by row: one `pread` straight from the index for a packed split, no tar walking, no state.

Files are opened lazily, once per process, which makes a reader cheap to send to a worker. Bytes are compared with the
index before anybody decodes them: a JPEG with a flipped bit mostly still decodes, to another picture.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path

from shards.console import UserError
from shards.dataset import Dataset, Index
from shards.files import download_problem, open_to_read, read_at
from shards.image import SUFFIXES, BadImage, find_images

OPEN_FILES = 128  # shards kept open per process


class TarReader:
    """Image bytes of the rows of one split; `check_crc` compares each image with the index's crc32."""

    def __init__(self, index: Index, *, check_crc: bool = True):
        self.index, self.check_crc = index, check_crc
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self):
        return self.__dict__ | {"_files": OrderedDict()}  # descriptors do not travel between processes

    def expect(self, rows: Sequence[int]) -> None:
        """These rows will be asked for next: a hint for readers that have far to go."""

    def name(self, row: int) -> str:
        """For people: the shard and the key."""
        return f"{self.index.shard_path(int(self.index.shard[row])).name}:{self.index.key(row)}"

    def image_id(self, row: int) -> str:
        return self.index.image_id(row)

    def read(self, row: int) -> bytes:
        """Raises BadImage where the bytes cannot be had, or are not those of the index."""
        size = int(self.index.size[row])
        try:
            data = read_at(self._open(int(self.index.shard[row])), size, int(self.index.offset[row]))
        except (OSError, ValueError, OverflowError, MemoryError) as error:  # the last three: a damaged index
            raise BadImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if len(data) != size:
            raise BadImage("the shard ends inside this image; it is truncated")
        if not data:
            raise BadImage("the image is empty")
        if self.check_crc and zlib.crc32(data) != self.index.crc32[row]:
            raise BadImage("its crc32 is not the index's: the image has changed, or the index is older than the shard")
        return data

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = open_to_read(self.index.shard_path(shard))
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


class FolderReader:
    """Image bytes of the files below a folder, of one file or of a glob, in the order of their
    names: data that nobody packed."""

    def __init__(self, source: str | Path):
        self.folder, self.names = find_images(source)
        if not self.names:
            nowhere = not Path(source).exists() and not has_magic(str(source))
            none = f"no images in it (looked for {', '.join(SUFFIXES)})"
            raise UserError(f"--images {source}: {'no such folder' if nowhere else none}")

    def __len__(self) -> int:
        return len(self.names)

    def expect(self, rows: Sequence[int]) -> None:
        """See TarReader."""

    def name(self, row: int) -> str:
        return self.names[row]

    image_id = name

    def read(self, row: int) -> bytes:
        """Raises BadImage where the file cannot be read."""
        try:
            return (self.folder / self.names[row]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error


def check_shards(dataset: Dataset, split: str) -> None:
    """One `stat` per local tar: what is gone, cut short or replaced is said before hours of training, not within them.

    Raises:
        UserError: a tar is missing, or has another size than `dataset.json` says.
    """
    shards = () if dataset.url else dataset.split(split).shards
    problems = [problem for shard in shards if (problem := _misfit(dataset.root / shard.name, shard.size))]
    if problems:
        raise UserError(
            f"{dataset.root}: {problems[0]}"
            + (f" (and {len(problems) - 1} more of {len(shards)} tars of {split!r})" if len(problems) > 1 else "")
            + f"; copy the tars again, or `mlc verify {dataset.root} --repair` makes the index fit what is there"
        )


def _misfit(path: Path, size: int) -> str:
    try:
        now = path.stat().st_size
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if now == size:
        return ""
    if problem := download_problem(path):
        return f"{path.name} {problem}"
    how = "is truncated" if now < size else "has been replaced or grown since it was indexed"
    return f"{path.name} {how}: {now} bytes, dataset.json says {size}"
