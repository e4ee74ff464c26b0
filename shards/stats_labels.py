"""`mlc stats --labels`: which labels go together, which exclude each other, and which nobody can learn.

A class without a sample in the first split is no mistake of the data, but every prediction of it is one: it is named
here, `mlc train` names it, and `mlc pseudo`, `mlc noise` and `mlc stack` leave it alone.
"""

import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shards.console import UserError
from shards.dataset import Dataset, Index, open_index
from shards.json_text import to_json
from shards.stats_facts import alone, label_matrix, together

MOST = 12  # pairs of each kind that a table shows
LEAST_EXPECTED = 5  # images with both, were the labels independent: fewer say nothing about a pair that never meets


def correlations(both: np.ndarray, images: int) -> np.ndarray:
    """float64 [C, C]: Pearson's correlation of two labels over the images (the phi coefficient), from how many images
    have both, int [C, C]; nan where no image or every image has one of them."""
    count = both.diagonal().astype(np.float64)
    spread = np.sqrt(count * (images - count))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (both * float(images) - np.outer(count, count)) / np.outer(spread, spread)


def pairs(both: np.ndarray, images: int, names: Sequence[str]) -> list[dict]:
    """All pairs of classes that could be expected to meet or do, the most correlated first."""
    phi, count = correlations(both, images), both.diagonal()
    one, other = np.triu_indices(len(both), 1)
    expected = count[one] * count[other] / max(1, images)
    told = np.isfinite(phi[one, other]) & ((expected >= LEAST_EXPECTED) | (both[one, other] > 0))
    one, other, expected = one[told], other[told], expected[told]
    order = np.argsort(-phi[one, other], kind="stable")
    return [
        {
            "one": names[one[i]],
            "other": names[other[i]],
            "correlation": round(float(phi[one[i], other[i]]), 4),
            "images": int(both[one[i], other[i]]),
            "expected": round(float(expected[i]), 1),
        }
        for i in order.tolist()
    ]


def study(dataset: Dataset, index: Index) -> dict:
    """Of one labelled split: `never` (classes without a sample), `alone` (share of a class's images with no other
    label), `pairs`."""
    matrix = label_matrix(index)
    both = together(matrix).toarray()
    count = both.diagonal()
    share = alone(matrix) / np.maximum(count, 1)
    return {
        "samples": len(index),
        "never": [name for name, n in zip(dataset.classes, count, strict=True) if not n],
        "alone": {name: round(float(s), 4) for name, s, n in zip(dataset.classes, share, count, strict=True) if n},
        "pairs": pairs(both, len(index), dataset.classes),
    }


def show(data: str, dataset: Dataset, names: Sequence[str], *, as_json: bool) -> None:
    """Prints the study of every labelled split. Raises UserError where none has labels."""
    indexes = {name: open_index(dataset, name) for name in names}
    found = {name: study(dataset, index) for name, index in indexes.items() if len(index) and index.has_labels}
    if not found:
        raise UserError(f"{data}: no labels in {', '.join(names)}")
    if as_json:
        print(to_json({"data": data, "fingerprint": dataset.fingerprint, "splits": found}, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    first = next(iter(found))
    elsewhere = {name: split["pairs"] for name, split in found.items() if name != first}
    for what, chosen in _kinds(found[first]["pairs"]):
        console.print(_table(f"{what} in {escape(first)}", chosen, elsewhere))
    for name, split in found.items():
        if split["never"]:
            console.print(
                f"no sample in {name}, so nothing can be learnt or measured there: {', '.join(split['never'])}",
                markup=False,
            )
    console.print("mostly alone on their images: " + _mostly_alone(found[first]["alone"]), markup=False)


def _kinds(found: list[dict]) -> list[tuple[str, list[dict]]]:
    with_each_other = [pair for pair in found if pair["correlation"] > 0][:MOST]
    against = [pair for pair in found if pair["correlation"] < 0][: -MOST - 1 : -1]
    return [("labels that go together", with_each_other), ("labels that avoid each other", against)]


def _table(title: str, chosen: list[dict], elsewhere: dict[str, list[dict]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("one", "other", "correlation", "images", "by chance", *(f"in {name}" for name in elsewhere)):
        table.add_column(escape(name), justify="left" if name in ("one", "other") else "right")
    known = {name: {(p["one"], p["other"]): p["correlation"] for p in split} for name, split in elsewhere.items()}
    for pair in chosen:
        there = [known[name].get((pair["one"], pair["other"])) for name in known]
        values = [f"{pair['correlation']:+.3f}", str(pair["images"]), f"{pair['expected']:.0f}"]
        values += ["-" if value is None else f"{value:+.3f}" for value in there]
        table.add_row(Text(pair["one"]), Text(pair["other"]), *values)
    return table


def _mostly_alone(shares: dict[str, float]) -> str:
    found = sorted((item for item in shares.items() if item[1] > 0.5), key=lambda item: -item[1])[:MOST]
    return ", ".join(f"{name} {share:.0%}" for name, share in found) or "none"
