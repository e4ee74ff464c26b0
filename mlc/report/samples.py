"""Some samples of the validation split with what the model says of them: where people look when a number surprises."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mlc.data.decode import upright
from mlc.data.reader import TarReader
from mlc.validation import Evaluation
from shards.image import BadImage, open_image, to_rgb

PIXELS = 192  # longest side of a thumbnail
SHOWN_CLASSES = 5


def sample_table(
    reader: TarReader, evaluation: Evaluation, classes: Sequence[str], count: int
) -> list[dict[str, Any]] | None:
    """Columns image (PIL), key, labels, predicted (above the tuned threshold) and scores of the likeliest classes.

    The same `count` samples at each evaluation, spread over the split; None for 0.
    """
    places = np.unique(np.linspace(0, len(evaluation.rows) - 1, min(count, len(evaluation.rows))).astype(int))
    table = []
    for place in places:
        with suppress(BadImage):  # far away, and gone since it was evaluated
            row, scores = int(evaluation.rows[place]), evaluation.scores[place]
            table.append(_sample(reader, row, scores, classes, evaluation.metrics["threshold"]))
    return table or None


def _sample(
    reader: TarReader, row: int, scores: np.ndarray, classes: Sequence[str], threshold: float
) -> dict[str, Any]:
    image = to_rgb(upright(open_image(reader.read(row))))
    image.thumbnail((PIXELS, PIXELS))
    likeliest = np.argsort(-scores, kind="stable")[:SHOWN_CLASSES]
    return {
        "image": image,
        "key": reader.index.key(row),
        "labels": " ".join(classes[c] for c in reader.index.labels(row)),
        "predicted": " ".join(classes[c] for c in np.flatnonzero(scores > threshold)),
        "scores": "  ".join(f"{classes[c]} {scores[c]:.2f}" for c in likeliest),
    }
