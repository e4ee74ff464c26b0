"""Index files without tars: rows with labels that are as uneven as real ones, for what only looks at the index."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlc.data.order import uniform
from shards.dataset import Dataset, Index, Shard, Split, open_index, write_dataset, write_index

CLASSES = ("cat", "dog", "owl", "tag::a=b", "nothing")
FREQUENCY = (0.6, 0.25, 0.01, 0.1, 0.0)


def make_index(folder: Path, rows: int, seed: int, captions: Sequence[str] | None = None) -> Index:
    """Split `train` of a data set: five classes, the last without samples; some rows without labels, some weights 0."""
    row = np.arange(rows)
    draw = [uniform(seed, 999, row, column) for column in range(8)]  # golden values rest on it: no library's stream
    has = np.stack(draw[: len(CLASSES)], 1) < FREQUENCY
    has[:2, 2] = True
    columns = {
        "key": [f"k{row:05d}" for row in range(rows)],
        "image_id": [f"{row}.jpg" for row in range(rows)],
        "shard": [0] * rows,
        "offset": [512 * row for row in range(rows)],
        "size": (10 + draw[5] * 990).astype(int).tolist(),
        "ext": [("jpg", "png")[row % 2] for row in range(rows)],
        "labels": [np.flatnonzero(row).tolist() for row in has],
        "caption": captions or [f"caption {row % 7}" for row in range(rows)],
        "fold": [row % 5 for row in range(rows)],
        "weight": np.where(draw[6] < 0.1, 0, draw[7] * 3).tolist(),
        "crc32": [0] * rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_index(folder / "train.arrow", columns)
    split = Split("train", "train.arrow", rows, (Shard("train-000000.tar", rows, 1, "0" * 64),))
    dataset = Dataset(folder, CLASSES, {}, 5, {"train": split})
    write_dataset(dataset)
    return open_index(dataset, "train")
