"""Pictures for people: what the model saw and what it said."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlc.data.transforms import upright
from shards.image import open_image, to_rgb

COLUMNS, ROWS = 6, 4


def contact_sheet(path: Path, reader, rows: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> None:
    """The first of some rows of a split, each with its labels: found (green), missed (orange), wrong (red).

    rows int64 [N] and predicted bool [N, C].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMNS, 2.5 * ROWS))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.07, wspace=0.08, hspace=0.42)
    for axis in axes.flat:
        axis.axis("off")
    for row, said, axis in zip(rows.tolist(), predicted, axes.flat, strict=False):
        axis.imshow(to_rgb(upright(open_image(reader.read(row)))))
        for place, (text, color) in enumerate(_verdict(reader.index.labels(row), said, classes)):
            below = -0.04 - 0.12 * place
            axis.text(0.5, below, text, transform=axis.transAxes, ha="center", va="top", fontsize=8, color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _verdict(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(text, colour) of the classes found, missed and wrongly predicted; long lists are cut to a line."""
    true, said = set(labels.tolist()), set(np.flatnonzero(predicted).tolist())
    for mark, columns, color in (
        ("✓", true & said, "#1a7f37"),
        ("missed", true - said, "#b35900"),
        ("wrong", said - true, "#cf222e"),
    ):
        if columns:
            names = " ".join(classes[c] for c in sorted(columns))
            yield f"{mark} {textwrap.shorten(names, 30, placeholder=' …')}", color
