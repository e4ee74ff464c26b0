"""Pictures for people: what the model saw and what it said."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlc.data.transforms import upright
from shards.image import open_image, to_rgb

COLUMNS, ROWS = 6, 4


def contact_sheet(path: Path, reader, predicted: np.ndarray, classes: Sequence[str]) -> None:
    """The first images of a split, each with its labels: found (green), missed (orange), wrongly predicted (red).

    Args:
        predicted: bool [N, C].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMNS, 2.3 * ROWS), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for row, axis in enumerate(axes.flat[: len(reader)]):
        axis.imshow(to_rgb(upright(open_image(reader.read(row)))))
        true = set(reader.index.labels(row).tolist())
        said = set(np.flatnonzero(predicted[row]).tolist())
        lines = [
            ("✓ ", sorted(true & said), "#1a7f37"),
            ("missed ", sorted(true - said), "#b35900"),
            ("wrong ", sorted(said - true), "#cf222e"),
        ]
        shown = [(mark + " ".join(f"{classes[c]}" for c in labels), color) for mark, labels, color in lines if labels]
        for place, (text, color) in enumerate(shown):
            axis.text(
                0.5,
                -0.04 - 0.12 * place,
                text,
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color=color,
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
