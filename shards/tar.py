"""Tars as byte ranges: writing shards that come out the same every time, and finding the members of any tar.

Everything that reads samples by position rests on (offset, size) of plain members, so the offsets are taken from the
finished file by the same scan that indexes tars of other people.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from shards.console import UserError, few
from shards.files import download_problem
from shards.image import is_image_name

IMAGE_EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
META = re.compile(r"__[^/]*__($|/)")  # names that webdataset skips
LINKS = {
    tarfile.LNKTYPE: ("a hard link", "--hard-dereference"),
    tarfile.SYMTYPE: ("a symbolic link", "--dereference"),
}
MAX_KEY = 80  # with its extension it fits the 100 bytes of a ustar name, so no extra header is ever written


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: `offset` is where its bytes begin; `problem` says that it is a link."""

    name: str
    offset: int
    size: int
    problem: str = ""


@dataclass
class Group:
    """The members of one sample by extension (lower case), in WebDataset's sense: all that shares the key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    def image(self) -> tuple[str, Member] | None:
        """(jpg, png or webp; member), or None. Raises UserError where there are two, or only images
        of longer names: stock webdataset makes one sample of `v1.0001.jpg` and `v1.0002.jpg`, in
        which timm finds no image."""
        found = [(IMAGE_EXTENSIONS[ext], member) for ext, member in self.members.items() if ext in IMAGE_EXTENSIONS]
        dotted = [] if found else [ext for ext in self.members if "." in ext and is_image_name(ext)]
        if dotted:
            raise UserError(
                f"{few([self.members[ext].name for ext in dotted], 3)}: a WebDataset key ends at "
                f"the first dot, so these are one sample {self.key!r} without an image; rename "
                "them, such as v1_0001.jpg for v1.0001.jpg"
            )
        if len(found) > 1:
            raise UserError(
                f"sample {self.key!r} has {len(found)} images ({', '.join(m.name for _, m in found)}); "
                "which one to use is not known"
            )
        return found[0] if found else None

    def other_images(self) -> list[Member]:
        """Images by their names that are not the sample's own: `KEY.mask.png`, `KEY.bmp`."""
        others = (member for ext, member in self.members.items() if ext not in IMAGE_EXTENSIONS)
        return [member for member in others if is_image_name(member.name)]


class _Hashing:
    """A file that is hashed while it is written, so that a shard is not read again for its checksum."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def write_tar(file: BinaryIO, samples: Iterable[Mapping[str, bytes | str]]) -> tuple[int, str]:
    """Writes WebDataset samples (`__key__` and bytes per extension) as plain ustar; returns (bytes, sha256).

    Owner, mode and time are fixed: the same samples give the same file.
    """
    from webdataset import TarWriter  # here, because it loads torch where that is installed

    hashing = _Hashing(file)
    with TarWriter(hashing, user="mlc", group="mlc", mode=0o644, mtime=0, compress=False) as writer:
        for sample in samples:
            writer.write(sample)
    return hashing.size, hashing.sha256.hexdigest()


def scan(path: Path) -> Iterator[Member]:
    """The files and links of an uncompressed tar, by reading headers only. Raises UserError for
    anything else."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # a tar of millions of members must not be held in memory
                if info.issparse():
                    raise UserError(f"{path}: {info.name} is a sparse file; pack it again without sparse files")
                if info.isreg() or info.type in LINKS:
                    yield Member(info.name, info.offset_data, info.size, _link_problem(info))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except tarfile.TarError as error:
        hint = "; it is compressed: unpack it first (gunzip, zstd -d)" if _is_compressed(path) else ""
        if known := download_problem(path):
            raise UserError(f"{path} {known}") from None
        raise UserError(f"{path} is damaged or not a plain tar ({error}){hint}") from None


def _link_problem(info: tarfile.TarInfo) -> str:
    """Why a link is no file of a sample: stock webdataset skips it without a word. "" for a file."""
    if info.type not in LINKS:
        return ""
    what, flag = LINKS[info.type]
    fix = f"make the tar again with `tar {flag}`"
    return f"{info.name} is {what} to {info.linkname}, which WebDataset readers skip; {fix}"


def _is_compressed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case): the name is cut at the first dot behind the last slash, as
    WebDataset cuts it; None for what it does not read."""
    if META.match(name):
        return None
    folder, slash, file = name.rpartition("/")
    stem, dot, ext = file.partition(".")
    return (folder + slash + stem, ext.lower()) if stem and dot else None


def groups(path: Path) -> Iterator[Group]:
    """The samples of a tar. Raises UserError where a key comes again after another, or has an
    extension twice, or where a member is a link."""
    current: Group | None = None
    seen: set[str] = set()
    for member in scan(path):
        parts = split_name(member.name)
        if parts is None:
            continue
        if member.problem:
            raise UserError(f"{path}: {member.problem}")
        key, ext = parts
        if current is None or key != current.key:
            if current is not None:
                yield current
            if key in seen:
                raise UserError(
                    f"{path}: the files of sample {key!r} are not next to each other, or the key is there "
                    "twice; WebDataset readers would cut it in two: sort the tar by name"
                )
            seen.add(key)
            current = Group(key)
        if ext in current.members:
            raise UserError(f"{path}: {member.name} is there twice")
        current.members[ext] = member
    if current is not None:
        yield current


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
