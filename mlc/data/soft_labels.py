"""Soft labels on disk: what teachers said about the training images, once and for all, as `mlc predict --split train`
wrote it. A student then costs no more than one without a teacher.

The rows of a file belong to images by their id and its columns to classes by their name, so a file serves every packing
of the images, several data sets together, and folds. Soft labels ride in the batch as `soft`, beside the targets.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlc.data.prediction_files import places, read_predictions, refuse_missing
from mlc.data.sampler import Rows


class SoftLabels:
    """Probabilities for the rows of a stream. Memory: 4 bytes for each image and class of each file, in each training
    process; worker processes that are forked share it."""

    def __init__(self, files: Sequence[str], sources: Sequence[Rows], classes: Sequence[str]):
        """Reads all files; each must have every class, and every row of `sources` that takes part in the training.

        Raises:
            UserError: naming the file and what is missing or wrong in it.
        """
        self._tables = []  # (probabilities float32 [N, C], its row for each row of each source, -1 for none)
        for file in files:
            ids, probabilities = read_predictions(Path(file), classes)
            self._tables.append((probabilities, [_places(file, ids, rows) for rows in sources]))

    def __len__(self) -> int:
        """The number of files."""
        return len(self._tables)

    def __call__(self, source: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Number of the data set and row in it, int64 [B] each -> probabilities float32 [B, files, C]."""
        soft = np.empty((len(row), len(self), self._tables[0][0].shape[1]), np.float32)
        for number, (probabilities, own_rows) in enumerate(self._tables):
            for which, place in enumerate(own_rows):
                own = source == which
                soft[own, number] = probabilities[place[row[own]]]
        return soft


def _places(file: str, ids: pa.Array, rows: Rows) -> np.ndarray:
    """int32 [rows of the index]: which row of the file each is, -1 for one that has none and takes no part."""
    names = rows.index.batch.column("image_id")
    place = places(names, ids)
    taking_part = np.arange(len(place)) if rows.rows is None else np.unique(rows.rows)
    fix = f"`mlc predict --split {rows.index.path.stem}` makes them"
    refuse_missing(file, names.take(pa.array(taking_part)), place[taking_part] < 0, "training images", fix)
    return place
