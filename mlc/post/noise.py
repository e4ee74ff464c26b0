"""`mlc noise OOF`: which training labels are likely wrong, so that a person looks at them or a run leaves them out.

Two lists, since they are two questions: labels to add (the image has it, and nobody said so) and labels to remove.

Predictions must come from models that did not see the image (out of fold): a model has learnt the labels it was trained
on by heart, wrong ones included.
"""

import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score, precision_recall_curve

from mlc.data.prediction_files import aligned, places, submission_columns, write_csv
from mlc.data.remote import open_reader
from mlc.data.truth import ids_of, labelled_index, multi_hot, read_labels
from mlc.post.label_errors import METHODS, errors, mean_errors, scores, suspects
from mlc.report.plots import COLUMNS, ROWS, cut, sheet
from shards.console import Parser, UserError, did_you_mean, few, say
from shards.dataset import Dataset, Index, load_dataset
from shards.files import disk_errors, whole
from shards.json_text import to_json

SHOWN = 12  # rows of the table of classes
DRAWN = COLUMNS * ROWS
SIDES = {"add": False, "remove": True}  # and whether their labels are given
COLORS = {"add": "#1a7f37", "remove": "#cf222e"}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    dataset = load_dataset(options.data)
    index = labelled_index(dataset, options.split)
    columns = _columns(dataset, options.group)
    given = index.targets(np.arange(len(index))) > 0.5
    probabilities = aligned(options.predictions, index, dataset.classes)

    # What is not looked at takes no part in the ranking; a class nobody has cannot be told from one that is missing.
    looked_at = columns & given.any(0) & ~given.all(0)
    score = scores(probabilities, given, options.method)
    score[:, ~looked_at] = -np.inf
    found = suspects(errors(probabilities, given), given) & looked_at
    worst = score.max(1)
    dropped = np.argsort(-worst, kind="stable")[: round(options.drop * len(worst))]

    folder = Path(options.out) if options.out else Path(options.predictions).parent / "noise"
    lists = {
        name: Entries.likeliest(np.where(given == side, score, -np.inf), options.most) for name, side in SIDES.items()
    }
    for name, of in lists.items():
        _write_list(folder / f"{name}.csv", index, dataset.classes, of, probabilities, found)
    try:
        reader = open_reader(index)
        for name, of in lists.items():
            _draw_list(folder, name, reader, dataset.classes, of, probabilities)
    except UserError as problem:  # a server that is gone; the lists are there all the same
        say(f"no pictures: {problem}")
    ids = index.batch.column("image_id")
    write_csv(
        folder / "drop.csv", ["ImageID", "score"], ((ids[int(row)].as_py(), f"{worst[row]:.6g}") for row in dropped)
    )
    summary = {
        "images": len(index),
        "suspicious_labels": int(found.sum()),
        "suspicious_images": int(found.any(1).sum()),
        "dropped": len(dropped),
        "not_judged": [dataset.classes[c] for c in np.flatnonzero(columns & ~looked_at)],
    }
    if options.against:
        wrong = recorded(Path(options.against), index, dataset, given)
        summary["against"] = _judge(folder, *(part[:, looked_at] for part in (score, wrong, given)), dropped)
    if options.json:
        print(to_json(summary | {"classes": _by_class(dataset, given, probabilities, found, looked_at)}))
    else:
        _show(summary, _by_class(dataset, given, probabilities, found, looked_at))
    say(
        f"{folder}: add.csv, remove.csv (the {options.most} likeliest), add.png, remove.png (the first {DRAWN}), "
        f"drop.csv ({len(dropped)} images, for --drop-rows)"
    )
    return 0


def _columns(dataset: Dataset, group: str) -> np.ndarray:
    """bool [C]: the classes of the group, all without one."""
    if not group:
        return np.ones(len(dataset.classes), bool)
    if group not in dataset.groups:
        there = ", ".join(dataset.groups) or "none"
        raise UserError(
            f"--group {group}: the data set has the groups {there}{did_you_mean(group, list(dataset.groups))}"
        )
    return np.isin(dataset.classes, dataset.groups[group])


class Entries(NamedTuple):
    """Some (row, column) of a table, int64 each, and their scores."""

    rows: np.ndarray
    columns: np.ndarray
    scores: np.ndarray

    @classmethod
    def likeliest(cls, score: np.ndarray, most: int) -> "Entries":
        """The `most` highest that are finite, the highest first, equal ones by their place."""
        flat = score.reshape(-1)
        most = min(most, int(np.isfinite(flat).sum()))
        best = np.argpartition(-flat, most - 1)[:most] if most else np.arange(0)
        best = best[np.lexsort((best, -flat[best]))]
        return cls(*np.divmod(best, score.shape[1]), flat[best])


def _write_list(path: Path, index: Index, classes: Sequence[str], of: Entries, probabilities, found) -> None:
    """One entry a line."""
    lines = (
        (
            index.key(row),
            index.image_id(row),
            classes[column],
            f"{probabilities[row, column]:.6g}",
            f"{score:.6g}",
            int(found[row, column]),
        )
        for row, column, score in zip(*(part.tolist() for part in of), strict=True)
    )
    write_csv(path, ["key", "ImageID", "label", "probability", "score", "suspect"], lines)


def _draw_list(folder: Path, name: str, reader, classes: Sequence[str], of: Entries, probabilities) -> None:
    """The first pictures of a list, each with its label and what the model thinks of it."""
    captions = [
        [(cut(f"{name} {classes[column]}"), COLORS[name]), (f"p {probabilities[row, column]:.3f}", "#57606a")]
        for row, column in zip(of.rows[:DRAWN].tolist(), of.columns[:DRAWN].tolist(), strict=True)
    ]
    sheet(folder / f"{name}.png", reader, of.rows[:DRAWN], captions)


# ---- against what is known to be wrong -------------------------------------------------------------------------------


def recorded(path: Path, index: Index, dataset: Dataset, given: np.ndarray) -> np.ndarray:
    """bool [N, C]: the entries that a file `ImageID,Labels,TrueLabels` says are wrong, such as the
    demo data's wrong_labels.csv; the first two columns may have the names that the data set knows.
    Images of other splits are passed over.

    Raises:
        UserError: no image of the split, a label that the data set does not have, or labels that are not its own.
    """
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file")
    columns = submission_columns(path, dataset.columns) or dataset.columns
    tables = [read_labels(path, replace(columns, labels=name)) for name in (columns.labels, "TrueLabels")]
    found = places(ids_of(tables[0]), index.batch.column("image_id"))
    there, rows = np.flatnonzero(found >= 0), found[found >= 0]
    own = [[table[number] for number in there] for table in tables]
    then, true = (multi_hot(part, dataset.classes, of=index.path.parent) for part in own)
    other = (then != given[rows]).any(1)
    if other.any():
        row = own[0][int(other.argmax())]
        raise UserError(f"{path} line {row.line}: {row.image_id} has other labels in {index.path.parent}")
    wrong = np.zeros(given.shape, bool)
    wrong[rows] = then ^ true
    if not wrong.any():
        raise UserError(
            f"{path}: none of its {len(found)} images with wrong labels is in the split {index.path.stem!r}"
        )
    return wrong


def _judge(folder: Path, score: np.ndarray, wrong: np.ndarray, given: np.ndarray, dropped: np.ndarray) -> dict:
    """Precision and recall of both lists, of the ranking over images, and of the images that are dropped; plotted."""
    if not wrong.any():
        raise UserError("--against: none of its wrong labels is of a class that was looked at")
    images = wrong.any(1)
    ranked = {name: (wrong[given == side], score[given == side]) for name, side in SIDES.items()}
    ranked["images"] = images, score.max(1)
    result: dict[str, float] = {"wrong_labels": int(wrong.sum()), "wrong_images": int(images.sum())}
    curves = {}
    for name, (truth, by) in ranked.items():
        if truth.any():
            curves[name] = precision_recall_curve(truth, by, drop_intermediate=True)[:2]
            result[f"{name}_ap"] = float(average_precision_score(truth, by))
            first = np.argsort(-by, kind="stable")[:DRAWN]
            result[f"{name}_first_{DRAWN}"] = int(truth[first].sum())
            result[f"chance_{name}"] = float(truth.mean())
    result["dropped_precision"] = float(images[dropped].mean()) if len(dropped) else 0.0
    result["dropped_recall"] = float(images[dropped].sum() / images.sum())
    _plot(folder / "against.png", curves, result)
    return result


def _plot(path: Path, curves: dict, result: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5))
    for name, (precision, recall) in curves.items():
        (line,) = axis.step(recall, precision, where="post", label=f"{name}, AP {result[name + '_ap']:.3f}")
        axis.axhline(result["chance_" + name], color=line.get_color(), linestyle=":", linewidth=1)
    axis.plot(result["dropped_recall"], result["dropped_precision"], "ko", label="drop.csv (images)")
    axis.set(xlabel="recall: wrong ones found", ylabel="precision: found ones wrong", xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title("against the recorded wrong labels (dotted: chance)", fontsize=10)
    axis.legend(loc="upper right")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as building:
        figure.savefig(building, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)


# ---- what is printed -------------------------------------------------------------------------------------------------


def _by_class(dataset: Dataset, given, probabilities, found, looked_at) -> list[dict]:
    """A row per class that was looked at, the most suspicious labels first."""
    mean = mean_errors(errors(probabilities, given), given)
    group_of = {name: group for group, members in dataset.groups.items() for name in members}
    rows = [
        {
            "class": dataset.classes[c],
            "group": group_of.get(dataset.classes[c], ""),
            "given": int(given[:, c].sum()),
            "suspicious": int((found & given)[:, c].sum()),
            "perhaps_missing": int((found & ~given)[:, c].sum()),
            "error_given": round(float(mean[1, c]), 4),
            "error_not_given": round(float(mean[0, c]), 4),
        }
        for c in np.flatnonzero(looked_at)
    ]
    return sorted(rows, key=lambda row: -row["suspicious"] - row["perhaps_missing"])


def _show(summary: dict, classes: list[dict]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    found = f"{summary['suspicious_labels']} suspicious labels on {summary['suspicious_images']}"
    table = Table(title=f"{found} of {summary['images']} images", title_justify="left")
    for name in ("class", "group", "given", "of these suspicious", "perhaps missing", "mean error", "of the others"):
        table.add_column(name, justify="left" if name in ("class", "group") else "right")
    for row in classes[:SHOWN]:
        table.add_row(*map(str, row.values()))
    if len(classes) > SHOWN:
        table.caption = f"and {len(classes) - SHOWN} more classes (--json has all)"
    console.print(table)
    if summary["not_judged"]:
        console.print(f"not judged, since no image or every image has them: {few(summary['not_judged'])}", markup=False)
    if known := summary.get("against"):
        console.print(f"against {known['wrong_images']} images with {known['wrong_labels']} recorded wrong labels:")
        for name, title in {"add": "add.csv", "remove": "remove.csv", "images": "images"}.items():
            if f"{name}_ap" in known:
                console.print(
                    f"  {title}: {known[f'{name}_first_{DRAWN}']} of the first {DRAWN} are wrong, average precision "
                    f"{known[f'{name}_ap']:.3f} (chance {known[f'chance_{name}']:.3f})"
                )
        console.print(
            f"  drop.csv: {summary['dropped']} images, precision {known['dropped_precision']:.3f}, "
            f"recall {known['dropped_recall']:.3f}; against.png has the curves"
        )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ArgumentTypeError(f"expected a share of the images between 0 and 1, such as 0.04, not {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 up, not {text!r}")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc noise",
        description="Ranks the labels of a split by how likely they are wrong, and lists images to leave out.",
        epilog="example: mlc noise runs/kfold/oof.csv --data data/demo-shards --against data/demo/wrong_labels.csv\n"
        "         mlc train ... --drop-rows runs/kfold/noise/drop.csv",
    )
    add = parser.add_argument
    add("predictions", metavar="OOF", help="out-of-fold predictions of the whole split, CSV or Arrow")
    add("--data", required=True, metavar="DIR", help="packed data set: a folder or a URL")
    add("--split", default="train", help="split of --data (default: train)")
    add(
        "--method",
        choices=METHODS,
        default="relative",
        help="order of the lists: `relative` odds, of a given label next to what is usual for its class (default); "
        "`error` |label - p|; `class` in units of the class's mean error; `confident` the suspects of confident "
        "learning first, then the others, by their error",
    )
    add("--group", default="", metavar="NAME", help="look only at the labels of this group")
    add(
        "--drop",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="share of the images to put into drop.csv, those with the likeliest wrong label (default: 0.05)",
    )
    add("--most", type=_count, default=1000, metavar="N", help="lines of add.csv and of remove.csv (default: 1000)")
    add("--against", metavar="CSV", help="ImageID,Labels,TrueLabels of labels known to be wrong: scores the ranking")
    add("--out", metavar="DIR", help="folder to write (default: noise/ beside OOF)")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser
