"""Image bytes by row: one `pread` straight from the index for a packed split, no tar walking, no state.

Files are opened lazily, once per process, which makes a reader cheap to send to a worker.
"""

import os
from collections import OrderedDict
from pathlib import Path

from shards.console import UserError
from shards.dataset import Index

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OPEN_FILES = 128  # shards kept open per process


class TarReader:
    """Image bytes of the rows of one split."""

    def __init__(self, index: Index):
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self):
        return {"index": self.index, "_files": OrderedDict()}  # descriptors do not travel between processes

    def name(self, row: int) -> str:
        """For people: the shard and the key."""
        return f"{self.index.shard_path(int(self.index.shard[row])).name}:{self.index.key(row)}"

    def image_id(self, row: int) -> str:
        return self.index.image_id(row)

    def read(self, row: int) -> bytes:
        size = int(self.index.size[row])
        data = os.pread(self._open(int(self.index.shard[row])), size, int(self.index.offset[row]))
        if len(data) != size:
            raise UserError(
                f"{self.name(row)}: the shard ends inside this image; it is truncated (`mlc verify` lists the damage)"
            )
        return data

    def _open(self, shard: int) -> int:
        if shard not in self._files:
            path = self.index.shard_path(shard)
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


class FolderReader:
    """Image bytes of the files below a folder, in the order of their names: data that nobody packed."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--images {folder}: no such folder")
        self.names = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not self.names:
            raise UserError(f"--images {folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    image_id = name

    def read(self, row: int) -> bytes:
        return (self.folder / self.names[row]).read_bytes()
