"""Pictures for people: what the model saw and what it said."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import ImageOps

from shards.files import disk_errors, whole
from shards.image import BadImage, open_image, to_rgb

COLUMNS, ROWS = 6, 4
CELL = 200  # pixels of a picture's side
WIDTH = 32  # characters below a picture, as many as fit


Caption = Iterable[tuple[str, str]]  # (text, colour), a line each


def contact_sheet(path: Path, reader, rows: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> None:
    """Random rows of those given, the same each time, with their labels: found (green), missed (orange), wrong (red).

    rows int64 [N] and predicted bool [N, C].
    """
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[: COLUMNS * ROWS])
    captions = [
        _verdict(reader.index.labels(row), said, classes)
        for row, said in zip(rows[drawn].tolist(), predicted[drawn], strict=True)
    ]
    sheet(path, reader, rows[drawn], captions)


def sheet(path: Path, reader, rows: np.ndarray, captions: Sequence[Caption]) -> None:
    """The pictures of these rows, at most COLUMNS x ROWS, with a caption below each; one that cannot be read is left
    blank and says so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(2 * COLUMNS, 2.5 * ROWS))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.07, wspace=0.08, hspace=0.42)
    for axis in axes.flat:
        axis.axis("off")
    for row, caption, axis in zip(rows.tolist(), captions, axes.flat, strict=False):
        try:
            image = to_rgb(ImageOps.exif_transpose(open_image(reader.read(row))))
            axis.imshow(ImageOps.pad(image, (CELL, CELL), color="white"))  # so that all labels begin at one height
        except (BadImage, OSError, ValueError, SyntaxError) as problem:  # the last three: Pillow's of damaged bytes
            axis.text(
                0.5, 0.5, fill(f"image {problem}", WIDTH // 2), transform=axis.transAxes, ha="center", fontsize=7.5
            )
        for place, (text, color) in enumerate(caption):
            below = -0.04 - 0.12 * place
            axis.text(0.5, below, text, transform=axis.transAxes, ha="center", va="top", fontsize=7.5, color=color)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as building:
        figure.savefig(building, dpi=110, format="png")
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
            yield _line(mark, [classes[c] for c in sorted(columns)]), color


def _line(mark: str, names: list[str]) -> str:
    """As many of the names as fit, at least part of the first."""
    text = f"{mark} {' '.join(names)}"
    if len(text) <= WIDTH:
        return text
    words = text[: WIDTH - 2].rpartition(" ")[0]
    return f"{words} …" if words != mark else cut(text)


def cut(text: str) -> str:
    """To what fits below a picture."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
