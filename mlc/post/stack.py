"""`mlc stack OOF...`: a second-level model over the predictions of several models, with an honest score.

Its own training rows are the out-of-fold predictions. It is scored on rows that no part of it has seen: neither the
models, nor the weights between them, nor the frequencies of labels (nested cross-validation).
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import KFold

from mlc.data.prediction_files import aligned, write_probabilities
from mlc.data.truth import labelled_index
from mlc.metrics import thresholds
from mlc.metrics.multilabel import f1_samples, mean_average_precision, unlabelled
from mlc.post.pseudo import at_least_one
from mlc.post.second_level import INNER, TINY, Inputs, SecondLevel
from mlc.post.tables import by_image
from mlc.scores import add_zero_division
from shards.console import Parser, UserError, few, plural, progress, say, shown
from shards.dataset import Dataset, Index, load_dataset, open_index
from shards.files import whole
from shards.json_text import to_json


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.model == "lightgbm" and importlib.util.find_spec("lightgbm") is None:
        raise UserError('--model lightgbm needs a package: pip install "mlc[stack]"; or take --model hist')
    if options.test and len(options.test) != len(options.predictions):
        raise UserError(
            f"--test names {len(options.test)} files and there are {len(options.predictions)} out-of-fold files; give "
            "the same models' predictions in the same order"
        )
    dataset = load_dataset(options.data)
    index = labelled_index(dataset, options.split)
    target = index.targets(np.arange(len(index))) > 0.5
    _check_learnable(options, target)
    inputs = _inputs(options, dataset, index, options.predictions)
    test = open_index(dataset, options.test_split) if options.test else None
    test_inputs = _inputs(options, dataset, test, options.test) if options.test else None

    # A class that nobody or everybody has is not learnt: it keeps the mean of the models, and is told.
    learnt = target.any(0) & ~target.all(0)
    left = [name for name, yes in zip(dataset.classes, learnt, strict=True) if not yes]
    settings = {"kind": options.model, "most": options.candidates, "k": options.neighbours, "seed": options.seed}
    held_out, weights = _nested(_only(inputs, learnt), target[:, learnt], options.folds, settings)
    zero = options.zero_division
    result = _scores(held_out, target[:, learnt], options.folds, options.seed, zero)
    result |= {"weights": _named(weights), "not_learnt": left, "folds": options.folds}

    out = Path(options.out)
    _write(out / "oof.csv", index, dataset, _whole(inputs, learnt, held_out["stack"]))
    if options.test:
        final = SecondLevel(_only(inputs, learnt), target[:, learnt], **settings)
        result["final_weights"] = dict(zip(final.names, final.weights.round(4).tolist(), strict=True))
        found = final(_only(test_inputs, learnt))["stack"]
        _write(out / f"{options.test_split}.csv", test, dataset, _whole(test_inputs, learnt, found))
    with whole(out / "stack.json") as building:
        building.write_text(to_json(result, indent=1) + "\n")
    if options.json:
        print(to_json(result))
    else:
        _show(result, len(index))
    for text in unlabelled(target[:, learnt], zero):
        say(text)
    say(f"{out}: oof.csv{f', {options.test_split}.csv' if options.test else ''}, stack.json")
    return 0


def _check_learnable(options, target: np.ndarray) -> None:
    if (needed := 2 * max(options.folds, INNER)) > len(target):
        raise UserError(
            f"--split {options.split} has {plural(len(target), 'image')}, and --folds {options.folds} "
            f"needs {needed}: out-of-fold predictions of more images are needed"
        )
    if not (target.any(0) & ~target.all(0)).any():
        raise UserError(
            f"--split {options.split}: no class is on some images and not on others, so there is "
            "nothing to learn; `mlc ensemble` averages models without labels"
        )


def _nested(inputs: Inputs, target: np.ndarray, folds: int, settings: dict) -> tuple[dict[str, np.ndarray], list]:
    """({part: predictions [n, C] of rows held out}, the weights of each fold)."""
    held_out: dict[str, np.ndarray] = {}
    weights = []
    with progress("folds", folds) as advance:
        for train, held in KFold(folds, shuffle=True, random_state=settings["seed"]).split(target):
            both = target[train].any(0) & ~target[train].all(0)  # a rare class may be in the held-out part alone
            level = SecondLevel(_only(inputs.rows(train), both), target[train][:, both], **settings)
            weights.append(dict(zip(level.names, level.weights.tolist(), strict=True)))
            rows = inputs.rows(held)
            for name, part in level(_only(rows, both)).items():
                held_out.setdefault(name, np.empty(target.shape))[held] = _whole(rows, both, part)
            advance()
    return held_out, weights


def _only(inputs: Inputs, classes: np.ndarray) -> Inputs:
    """Of these classes alone; groups that have none left are closed up."""
    groups = np.unique(inputs.groups[classes], return_inverse=True)[1]
    return Inputs(inputs.probabilities[:, :, classes], groups, inputs.extra, inputs.vectors)


def _whole(inputs: Inputs, classes: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[n, C] of all classes: those that are not learnt have the mean of the models."""
    table = inputs.mean
    table[:, classes] = found
    return table


def _scores(held_out: dict[str, np.ndarray], target: np.ndarray, folds: int, seed: int, zero: float) -> dict:
    """Of each part over all held-out rows; the threshold of a fold's F1 is the best one of the other folds."""
    parts = list(KFold(folds, shuffle=True, random_state=seed).split(target))
    result: dict = {"parts": {}}
    by_fold = {}
    for name, p in held_out.items():
        safe, predicted = np.clip(p, TINY, 1 - TINY), np.empty(target.shape, bool)
        for train, held in parts:
            tuned = thresholds.best_global_threshold(p[train], target[train], zero_division=zero)
            predicted[held] = p[held] > tuned[0]
        result["parts"][name] = {
            "loss": float(-np.log(np.where(target, safe, 1 - safe)).mean()),
            "map": mean_average_precision(p, target),
            "f1_samples": f1_samples(predicted, target, zero_division=zero),
        }
        each = [f1_samples(predicted[held], target[held], zero_division=zero) for _, held in parts]
        by_fold[name] = np.array(each)
    gain = by_fold["stack"] - by_fold["mean"]
    result["f1_gain"] = {"mean": float(gain.mean()), "sd": float(gain.std(ddof=1)), "folds": gain.round(5).tolist()}
    return result


def _named(weights: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([found[name] for found in weights])), 4) for name in weights[0]}


# ---- files -----------------------------------------------------------------------------------------------------------


def _inputs(options, dataset: Dataset, index: Index, files: list[str]) -> Inputs:
    """Of a split: all files with the same rows and columns, by name."""
    probabilities = np.stack([aligned(file, index, dataset.classes) for file in files])
    groups = np.zeros(len(dataset.classes), np.int64)
    for number, columns in enumerate(dataset.group_columns.values(), 1):
        groups[columns] = number
    name = dataset.columns.image_id
    extra = by_image([Path(file) for file in options.extra], index, "--extra", name)
    vectors = by_image([Path(file) for file in options.features], index, "--features", name)
    return Inputs(probabilities, groups, extra, vectors)


def _write(path: Path, index: Index, dataset: Dataset, found: np.ndarray) -> None:
    write_probabilities(path, index.batch.column("image_id").to_pylist(), dataset.classes, found)


# ---- what is printed -------------------------------------------------------------------------------------------------


def _show(result: dict, images: int) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    title = f"on {images} images held out ({result['folds']} folds, weights by {INNER} folds inside each)"
    table = Table(title=title, title_justify="left")
    for name in ("predictions", "log loss", "mAP", "F1 samples", "weight"):
        table.add_column(name, justify="left" if name == "predictions" else "right")
    called = {"mean": "mean of the models", "stack": "stack: their weighted mean"}
    for name, row in result["parts"].items():
        weight = result["weights"].get(name)
        values = [shown(value) for value in row.values()]
        table.add_row(called.get(name, name), *values, "" if weight is None else f"{weight:.2f}")
    console.print(table)
    gain = result["f1_gain"]
    console.print(f"F1 samples of the stack less that of the mean: {gain['mean']:+.4f}, sd over folds {gain['sd']:.4f}")
    if left := result["not_learnt"]:
        console.print(f"not learnt, no or every image has them: {few(left)} (stack.json)", markup=False)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc stack",
        description="Trains a second-level model on out-of-fold predictions of several models, with an honest score.",
        epilog="example: mlc stack a/oof.csv b/oof.csv --data DIR --test a/test.csv b/test.csv --out runs/stack",
    )
    add = parser.add_argument
    add("predictions", nargs="+", metavar="OOF", help="out-of-fold predictions of the whole split, CSV or Arrow")
    add("--data", required=True, metavar="DIR", help="packed data set: a folder or a URL")
    add("--split", default="train", help="split that they are of (default: train)")
    add("--test", nargs="+", default=[], metavar="PRED", help="the same models' predictions of --test-split, in order")
    add("--test-split", default="test", help="split to predict (default: test)")
    add("--model", choices=("hist", "lightgbm"), default="hist", help="gradient boosting of scikit-learn or LightGBM")
    add("--folds", type=_folds, default=5, help="folds of the score (default: 5)")
    add_zero_division(parser, "0", default=0)
    add("--candidates", type=at_least_one, default=64, metavar="K", help="classes of an image that are looked at (64)")
    add(
        "--extra",
        action="append",
        default=[],
        metavar="FILE",
        help="numbers about each image as further columns: CSV, Arrow, Parquet or .npz with ImageID or key; repeatable",
    )
    add(
        "--features",
        action="append",
        default=[],
        metavar="FILE",
        help="a vector for each image, for nearest neighbours: the same kinds of file, such as that of `mlc features`",
    )
    add("--neighbours", type=at_least_one, default=20, metavar="K", help="how many neighbours (default: 20)")
    add("--seed", type=int, default=0, help="of the folds and the boosting (default: 0)")
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def _folds(text: str) -> int:
    if at_least_one(text) < 2:
        raise ValueError
    return int(text)
