"""The files that a table means by its names.

Tables come from other machines than the images: without the extension, with `.jpg` for a file
`.JPG`, or with the other of the two ways to write an `é`, which only a file system tells apart.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from shards.cells import nfc
from shards.console import UserError
from shards.image import IMAGE_SUFFIXES

HARDLY = 20  # one image found in so many rows is hardly any
LOOKED_UP = 100  # images that are looked for elsewhere
FOLDERS = 1000  # and in how many folders, at most


class ImageFolder:
    """Finds images below `root` by name; a folder is listed once, when a name is not in it as it stands."""

    def __init__(self, root: Path):
        self.root = root
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, image_id: str) -> Path | None:
        """The file of that name, else the one that differs from it in the case of its extension, in
        having one (in the order of IMAGE_SUFFIXES), or in Unicode's form; None without such a file."""
        try:
            path = self.root / image_id
            return path if path.is_file() else self._alike(PurePosixPath(image_id).parts)
        except (OSError, ValueError):  # a name too long, or with a zero byte
            return None

    def _alike(self, parts: Sequence[str]) -> Path | None:
        folder = self.root
        for part in parts[:-1]:
            folder = folder / self._names(folder).get(_key(part), part)
        names = self._names(folder)
        for ext in ("", *IMAGE_SUFFIXES):
            name = names.get(_key(parts[-1] + ext)) if parts else None
            if name and (folder / name).is_file():
                return folder / name
        return None

    def _names(self, folder: Path) -> dict[str, str]:
        """By key; of names with one key the last: `a.jpg` and not `a.JPG`."""
        if folder not in self._listed:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            self._listed[folder] = {_key(name): name for name in names}
        return self._listed[folder]


def _key(name: str) -> str:
    stem, dot, ext = nfc(name).rpartition(".")
    return stem + dot + ext.lower() if dot else ext


def refuse_other_folder(images: Path, missing: Sequence[str], found: int) -> None:
    """Raises UserError where (nearly) all of a table's images are missing; it names the folder near by
    that has them. `found`: how many are there."""
    total = len(missing) + found
    if not missing or found * HARDLY >= total:
        return
    has = f"only {found}" if found else "none"
    sample = missing[:: -(-len(missing) // LOOKED_UP)]
    hits, folder, name = max(_elsewhere(images, sample), key=lambda hit: hit[0], default=(0, images, ""))
    fix = "give the folder that the names in the table are relative to"
    if 2 * hits >= len(sample):
        fix = f"{folder} has {hits} of {len(sample)} that were looked up: give --images {folder}"
    elif hits:
        fix = f"{name!r} is in {folder}: write names relative to --images into the table"
    raise UserError(f"--images {images} has {has} of the {total} images, such as {missing[0]!r}; {fix}")


def _elsewhere(images: Path, names: Sequence[str]) -> Iterator[tuple[int, Path, str]]:
    """(how many of the names it has, the folder, one of them), of folders near by."""
    for folder in _near(images):
        files = ImageFolder(folder)
        there = [name for name in names if files.find(name)]
        if there:
            yield len(there), folder, there[0]


def _near(images: Path) -> Iterator[Path]:
    yield images.parent
    for number, (folder, below, _) in enumerate(os.walk(images)):
        below.sort()
        if number == FOLDERS:
            return
        if number:
            yield Path(folder)
