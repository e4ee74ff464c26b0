"""The ways in which a data set breaks, to be done to a copy of one."""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from shards.dataset import load_dataset, open_index

Members = list[tuple[str, bytes]]


def opened(folder: Path, split: str = "train"):
    return open_index(load_dataset(folder), split)


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def write_members(path: Path, content: Members) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def change_bytes(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip_image(folder: Path, *rows: int) -> None:
    """One bit in the middle of each image: mostly it still decodes."""
    index = opened(folder)
    for row in rows:
        path, offset = index.shard_path(int(index.shard[row])), int(index.offset[row] + index.size[row] // 2)
        change_bytes(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def flip_caption(folder: Path, row: int) -> None:
    index = opened(folder)
    path = index.shard_path(int(index.shard[row]))
    at = path.read_bytes().index(index.caption(row).encode(), int(index.offset[row]))
    change_bytes(path, at, b"#")


def truncate(folder: Path, row: int) -> None:
    """The row's shard ends ten bytes into its image."""
    index = opened(folder)
    path = index.shard_path(int(index.shard[row]))
    path.write_bytes(path.read_bytes()[: int(index.offset[row]) + 10])


def append_samples(folder: Path, shard: int, count: int) -> None:
    """The shard is replaced by one with `count` more samples in front, so that all others move."""
    path = opened(folder).shard_path(shard)
    old = members(path)
    first = old[0][0].split(".")[0]
    new = [
        (name.replace(first, f"new{number}"), picture(number) if name.endswith(".jpg") else data)
        for number in range(count)
        for name, data in old
        if name.split(".")[0] == first
    ]
    write_members(path, new + old)


def swap_samples(folder: Path, row: int) -> None:
    """The row and the next change places in their shard, whose size stays the same."""
    index = opened(folder)
    path = index.shard_path(int(index.shard[row]))
    content, keys = members(path), (index.key(row), index.key(row + 1))
    one, two = ([item for item in content if item[0].split(".")[0] == key] for key in keys)
    at = content.index(one[0])
    size = path.stat().st_size
    write_members(path, content[:at] + two + one + content[at + len(one) + len(two) :])
    assert path.stat().st_size == size


def change_members(path: Path, change: Callable[[Members], Members]) -> Path:
    return write_members(path, change(members(path)))


def with_image(content: Members, key: str, data: bytes) -> Members:
    return [(name, data if name == f"{key}.jpg" else old) for name, old in content]


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    noise = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def jpeg_bomb() -> bytes:
    """A few hundred bytes that announce 60,000 x 60,000 pixels."""
    data = bytearray(picture(0, (8, 8)))
    at = data.index(b"\xff\xc0")  # start of frame: length 2, precision 1, height 2, width 2
    data[at + 5 : at + 9] = (60_000).to_bytes(2, "big") * 2
    return bytes(data)


def png_bomb() -> bytes:
    out = io.BytesIO()
    Image.new("1", (8, 8)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR: length 4, name 4, width 4, height 4, 5 more, crc32
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def long_image() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((2000, 30), 60).resize((20_000, 300)).convert("RGB").save(out, "JPEG")
    return out.getvalue()
