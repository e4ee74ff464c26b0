"""Does a data set of 100 million samples open at once, and do its workers stay small? Synthetic indexes, no images.

An index is written as `mlc pack` would leave it, with keys, file names and three labels a row, but no captions. Every
number comes from a fresh process that has imported all modules before. Opening: load_dataset, open_index, has_labels,
with the file out of the page cache ("cold") and in it. A lookup: position -> row -> shard, offset, size, crc32, labels,
in batches of 64. Memory, after 20,000 lookups in a random order: "private" is what the worker has written and nobody
else can use; "USS" adds those pages of the index that no other process has looked at so far, which all workers share
when they do and which the kernel drops when it wants to. A table of weights, log-freq, is built by the parent and
shared by forked workers; here it counts as private.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import psutil
import pyarrow as pa

from mlc.data.sampler import Rows
from shards.dataset import SCHEMA, Dataset, Shard, Split, load_dataset, open_index, write_dataset
from shards.json_text import to_json

SIZES, QUICK_SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000), (100_000, 1_000_000)
BYTES_PER_ROW = 100  # of an index; it is written twice, as columns and as the file
CLASSES, LABELS = 1000, 3
LOOKUPS, BATCH = 20_000, 64
CHUNK = 1 << 20
ORDERS = {"global": {}, "block:10000": {"block": 10_000}, "log-freq": {"sampler": "log-freq"}}


# ---- an index of any size, with little memory ------------------------------------------------------------------------


def write_synthetic(folder: Path, rows: int) -> None:
    """`dataset.json` and `train.arrow`: every column goes to a file of its own, which Arrow maps and copies."""
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        buffers = {name: _spool(Path(parts) / name, rows, make) for name, make in _makers(rows).items()}
        batch = pa.RecordBatch.from_arrays([_array(name, rows, buffers) for name in SCHEMA.names], schema=SCHEMA)
        with pa.OSFile(str(folder / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(batch)
        del batch, buffers
    shards = tuple(
        Shard(f"train-{number:06d}.tar", 10_000, 10**9, f"{number:064x}") for number in range(-(-rows // 10_000))
    )
    classes = tuple(f"class {column}" for column in range(CLASSES))
    write_dataset(Dataset(folder, classes, {}, 5, {"train": Split("train", "train.arrow", rows, shards)}))


def _makers(rows: int) -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]]:
    """{buffer: (row numbers -> its bytes, how many more entries than rows)}; texts have a fixed length."""
    return {
        "key": (lambda row: _digits(row, 9), 0),
        "key offsets": (lambda row: row * 9, 1),
        "image_id": (
            lambda row: np.append(_digits(row, 9), np.tile(np.frombuffer(b".jpg", "u1"), (len(row), 1)), 1),
            0,
        ),
        "image_id offsets": (lambda row: row * 13, 1),
        "shard": (lambda row: (row // 10_000).astype("i4"), 0),
        "offset": (lambda row: row % 10_000 * 100_000, 0),
        "size": (lambda row: 40_000 + row % 1000, 0),
        "ext": (lambda row: _repeated(b"jpg", row), 0),
        "ext offsets": (lambda row: (row * 3).astype("i4"), 1),
        "labels": (_labels, 0),
        "labels offsets": (lambda row: row * LABELS, 1),
        "caption": (lambda row: np.empty(0, "u1"), 0),
        "caption offsets": (lambda row: row * 0, 1),
        "fold": (lambda row: (row % 5).astype("i2"), 0),
        "weight": (lambda row: np.ones(len(row), "f4"), 0),
        "crc32": (lambda row: row.astype("u4"), 0),
    }


def _digits(row: np.ndarray, width: int) -> np.ndarray:
    return (row[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")).astype("u1")


def _repeated(text: bytes, row: np.ndarray) -> np.ndarray:
    return np.tile(np.frombuffer(text, "u1"), (len(row), 1))


def _labels(row: np.ndarray) -> np.ndarray:
    """Ascending columns, the low ones more frequent: squares of a hash."""
    share = (row[:, None] * np.array([2654435761, 40503, 69069]) % 65_536 / 65_536) ** 2
    third = CLASSES // LABELS
    return ((share * third).astype("i4") + np.arange(LABELS, dtype="i4") * third).astype("i4")


def _spool(path: Path, rows: int, maker: tuple[Callable[[np.ndarray], np.ndarray], int]) -> pa.Buffer:
    make, more = maker
    with open(path, "wb") as file:
        for first in range(0, rows + more, CHUNK):
            file.write(np.ascontiguousarray(make(np.arange(first, min(first + CHUNK, rows + more)))))
    return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")


def _array(name: str, rows: int, buffers: dict[str, pa.Buffer]) -> pa.Array:
    kind = SCHEMA.field(name).type
    if name == "labels":
        values = pa.Array.from_buffers(pa.int32(), rows * LABELS, [None, buffers[name]])
        return pa.Array.from_buffers(kind, rows, [None, buffers["labels offsets"]], children=[values])
    if f"{name} offsets" in buffers:
        return pa.Array.from_buffers(kind, rows, [None, buffers[f"{name} offsets"], buffers[name]])
    return pa.Array.from_buffers(kind, rows, [None, buffers[name]])


# ---- measured in fresh processes -------------------------------------------------------------------------------------


def open_seconds(folder: str) -> float:
    begin = time.perf_counter()
    _ = open_index(load_dataset(folder), "train").has_labels
    return time.perf_counter() - begin


def work(folder: str, order: str) -> dict[str, float]:
    """What one worker costs that makes LOOKUPS lookups: seconds and bytes."""
    private, unique = occupied()
    begin = time.perf_counter()
    index = open_index(load_dataset(folder), "train")
    rows = Rows(index, seed=1, **ORDERS[order])
    built = time.perf_counter()
    lookups(rows, 0)
    warm = time.perf_counter()
    lookups(rows, LOOKUPS)
    done = time.perf_counter()
    at_end = occupied()
    return {
        "built": built - begin,
        "first": (warm - built) / LOOKUPS,
        "lookup": (done - warm) / LOOKUPS,
        "private": at_end[0] - private,
        "unique": at_end[1] - unique,
    }


def lookups(rows: Rows, first: int) -> None:
    index = rows.index
    for start in range(first, first + LOOKUPS, BATCH):
        row = rows.locate(np.arange(start, min(start + BATCH, first + LOOKUPS)))
        _ = index.shard[row], index.offset[row], index.size[row], index.crc32[row], index.targets(row)


def occupied() -> tuple[int, int]:
    """(bytes this process alone has written, USS: bytes that would come free if it ended)."""
    process = psutil.Process()
    return sum(m.private_dirty for m in process.memory_maps()), process.memory_full_info().uss


def fresh(function: Callable, *args):
    """The result of a call in a new interpreter that has already imported this module."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    os.sync()
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, rounds: int) -> dict[str, list]:
    path, cold = folder / "train.arrow", []
    for _ in range(rounds):
        forget(path)
        cold.append(fresh(open_seconds, str(folder)))
    warm = [fresh(open_seconds, str(folder)) for _ in range(rounds)]
    candidates = {order: partial(fresh, work, str(folder), order) for order in ORDERS}
    workers = common.interleaved(candidates, rounds)
    return {"cold": cold, "warm": warm, "workers": workers}


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the indexes are written"
    )
    options = parser.parse_args()
    sizes, rounds = (QUICK_SIZES, 1) if options.quick else (SIZES, options.rounds)
    free = shutil.disk_usage(options.folder).free
    if free < 2.2 * BYTES_PER_ROW * max(sizes):
        print(f"{options.folder} has {free / 1e9:.0f} GB free, too few for {max(sizes)} rows", file=sys.stderr)
        sizes = tuple(rows for rows in sizes if free > 2.2 * BYTES_PER_ROW * rows)
    results = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_synthetic(Path(folder), rows)
            results[rows] = measure(Path(folder), rounds) | {"bytes": (Path(folder) / "train.arrow").stat().st_size}
    report(results, rounds)
    common.write_json(options.json, results=results, versions=common.versions("numpy", "pyarrow"))
    return 0


def report(results: dict[int, dict], rounds: int) -> None:
    print(f"{common.machine()}; {to_json(common.versions('numpy', 'pyarrow'))}; {common.rounds_said(rounds)}\n")
    rows = [
        [f"{n:,}", f"{r['bytes'] / 1e9:.2f}", f"{np.median(r['cold']) * 1e3:.1f}", f"{np.median(r['warm']) * 1e3:.1f}"]
        for n, r in results.items()
    ]
    print(common.table(["rows", "index, GB", "open cold, ms", "open warm, ms"], rows), end="\n\n")
    header = ["rows", "order", "ready, s", "private, MB", "USS, MB", "first lookup, us", "lookup, us"]
    rows = []
    for n, result in results.items():
        for order, measured in result["workers"].items():
            middle = {name: np.median([one[name] for one in measured]) for name in measured[0]}
            rows.append(
                [
                    f"{n:,}",
                    order,
                    f"{middle['built']:.3f}",
                    f"{middle['private'] / 1e6:.1f}",
                    f"{middle['unique'] / 1e6:.1f}",
                    f"{middle['first'] * 1e6:.1f}",
                    f"{middle['lookup'] * 1e6:.1f}",
                ]
            )
    print(common.table(header, rows))


if __name__ == "__main__":
    sys.exit(main())
