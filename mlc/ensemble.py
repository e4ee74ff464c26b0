"""`mlc ensemble`: several models' predictions of the same images become one.

Averaging helps where models err in different places, and weights that were tuned on some samples look better on those
than they are. So next to each tuned score stands the honest one, of samples that the weights were not made for, and the
files themselves and their plain mean stand beside it: often the plain mean is as good.
"""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mlc.data.prediction_files import is_submission, write_probabilities, write_submission
from mlc.data.prediction_stack import (
    Known,
    Stack,
    read_sets,
    read_stack,
    target_of_split,
    target_of_table,
)
from mlc.data.truth import add_column_flags, given_columns, read_labels
from mlc.metrics import combine, multilabel, thresholds
from mlc.metrics.threshold_search import Metric
from mlc.scores import add_zero_division
from shards.console import Parser, UserError, did_you_mean, finite, plural, say
from shards.dataset import load_dataset, open_index
from shards.files import disk_errors, whole
from shards.json_text import to_json
from shards.table import Columns, found_classes, read_classes

METHODS = ("equal", "geometric", "rank", "tuned", "tuned-per-class", "greedy")
TUNED = METHODS[3:]
FOLDS = 5  # of the honest score
SHOWN = 6  # weights in a line of the table


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    files, out = [Path(name) for name in options.files], Path(options.out)
    _refuse(options, files, out)
    if options.vote or options.union:
        return _sets(options, files, out)
    rule = thresholds.rule_of(options.threshold) if options.threshold not in (None, "tuned") else None
    stack = read_stack(files)
    ids, classes, target = stack.ids.to_pylist(), stack.classes, _target(options, stack)
    method, weights = _asked(options, stack)
    if method in TUNED and target is None:
        raise UserError(f"--weights {method} needs the truth: --data DIR --split S, or --truth CSV")
    rows = {}
    if target is not None:
        rows = _table(options, files, stack.values, target, method, weights)
        _print(rows, options.metric, f"{len(ids)} samples, {len(classes)} classes")
        for text in multilabel.unlabelled(target, options.zero_division):
            say(text)
        weights = rows[method]["weights"]
    scores = _combined(stack.values, method, weights)
    write_probabilities(out, ids, classes, scores)
    written = [out]
    if target is not None:
        if weights is not None:
            written.append(_beside(out, "weights.json"))
            _write_weights(written[-1], files, classes, method, weights, rows[method])
        written.append(_beside(out, "thresholds.json"))
        tuned = _tune(written[-1], options, scores, target)
        rule = tuned if options.threshold == "tuned" else rule
    if rule:
        written.append(_beside(out, "submission.csv"))
        chosen = thresholds.apply(scores, rule, classes)
        write_submission(written[-1], ids, classes, chosen, given_columns(options))
    say(f"{len(files)} files, {method}: {', '.join(map(str, written))}")
    return 0


# ---- what is asked for -----------------------------------------------------------------------------------------------


def _refuse(options: Namespace, files: Sequence[Path], out: Path) -> None:
    if len(files) < 2 and not (options.vote or options.union):
        raise UserError(f"{files[0]}: one file is no ensemble; give two, or --vote --threshold T for its labels alone")
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"{file} is named twice; --weights 2,1 gives it more weight")
        if file.resolve() == out.resolve():
            raise UserError(f"--out {out} is one of the files that are combined")
    if options.vote and options.union:
        raise UserError("give --vote or --union, not both; the union is what one vote is enough for")
    if not 0 <= options.share < 1:
        raise UserError(f"--share {options.share:g}: expected a part of the weight, from 0 to below 1")
    if out.suffix.lower() not in (".csv", ".arrow"):
        raise UserError(f"--out {out}: expected a name that ends in .csv or .arrow")
    if options.data and options.truth:
        raise UserError("give --data or --truth, not both")
    if options.compare and not (options.data or options.truth):
        raise UserError("--compare needs the truth: --data DIR --split S, or --truth CSV")
    if options.threshold == "tuned" and not (options.data or options.truth):
        raise UserError("--threshold tuned needs the truth: --data DIR --split S, or --truth CSV")
    if options.metric != "map":
        Metric.of(options.metric)


def _asked(options: Namespace, stack: Stack) -> tuple[str, NDArray | None]:
    """(method, weights [M] or [M, C] where they are given)."""
    text = options.weights
    if text in METHODS:
        return text, None
    if text.endswith(".json"):
        return _read_weights(Path(text), stack)
    if "=" in text:
        return "given", _by_group(text, options, stack)
    return "given", _numbers(text, len(stack.values))


def _by_group(text: str, options: Namespace, stack: Stack) -> NDArray:
    """[M, C] of `1,0;tag=0,1`: the part without a name is for the other classes, equal where it is missing."""
    if not options.data:
        raise UserError(f"--weights {text}: --data DIR says which classes are in a group")
    groups, models, place = load_dataset(options.data).groups, len(stack.values), list(stack.classes).index
    weights = np.full((models, len(stack.classes)), 1 / models)
    for part in sorted(text.split(";"), key=lambda part: "=" in part):  # the part for all comes first
        name, named, numbers = part.rpartition("=")
        if named and name not in groups:
            raise UserError(f"--weights {text}: {options.data} has no group {name!r}{did_you_mean(name, list(groups))}")
        columns = [place(label) for label in groups[name]] if named else slice(None)
        weights[:, columns] = _numbers(numbers, models)[:, None]
    return weights


def _numbers(text: str, models: int) -> NDArray:
    """[M], of sum 1."""
    try:
        weights = np.array([float(part) for part in text.split(",")])
    except ValueError:
        hint = did_you_mean(text, METHODS)
        raise UserError(f"--weights {text}: expected numbers, a .json or one of {', '.join(METHODS)}{hint}") from None
    if len(weights) != models:
        raise UserError(
            f"--weights {text}: {len(weights)} weights for {models} files; give one for each, in their order"
        )
    return _shares(weights, text)


def _shares(weights: NDArray, text: str) -> NDArray:
    """Of sum 1 over the files."""
    if not (np.isfinite(weights).all() and (weights >= 0).all() and (weights.sum(0) > 0).all()):
        raise UserError(f"--weights {text}: weights are numbers from 0 on, not all of them 0")
    return weights / weights.sum(0)


def _rules(options: Namespace, files: Sequence[Path]) -> list[dict | None]:
    """For each file the thresholds that make labels of its probabilities; None where there are none to make."""
    if not options.threshold:
        return [None] * len(files)
    parts = options.threshold.split(",")
    if len(parts) not in (1, len(files)):
        raise UserError(
            f"--threshold {options.threshold}: {len(parts)} for {len(files)} files; one for each, or for all"
        )
    return [thresholds.rule_of(part) for part in (parts * len(files) if len(parts) == 1 else parts)]


# ---- truth -----------------------------------------------------------------------------------------------------------


def _target(options: Namespace, stack: Stack) -> NDArray[np.bool_] | None:
    """[N, C] of the images of the stack. None where no truth is given, or the split has no labels and
    none are needed: then the data set only says how a submission is written."""
    if options.truth:
        return target_of_table(stack, Path(options.truth), given_columns(options))
    if not options.data:
        return None
    needed = options.compare or options.threshold == "tuned" or options.weights in TUNED
    if not needed and not open_index(load_dataset(options.data), options.split).has_labels:
        return None
    return target_of_split(stack, options.data, options.split)


def _known_classes(options: Namespace, columns: Columns) -> Known | None:
    """Those of --data or --classes, else the labels in --truth; None without any."""
    if options.data:
        return Known(load_dataset(options.data).classes, options.data)
    if options.classes:
        return Known(read_classes(Path(options.classes))[0], options.classes)
    if not options.truth:
        return None
    labels = (row.labels for row in read_labels(Path(options.truth), columns))
    return Known(found_classes(labels), options.truth, "; --classes FILE names those that none of its images has")


# ---- probabilities ---------------------------------------------------------------------------------------------------


def _combined(stack: NDArray, method: str, weights: NDArray | None) -> NDArray:
    if method == "geometric":
        return combine.geometric(stack)
    return combine.mean(combine.ranks(stack) if method == "rank" else stack, weights)


def _table(
    options: Namespace, files: Sequence[Path], stack: NDArray, target: NDArray, method: str, weights: NDArray | None
) -> dict[str, dict[str, Any]]:
    """{name: metric and map, their honest values and the weights}: the files, their plain mean, and what is asked for;
    with --compare all methods."""
    if stack.shape[1] < FOLDS or not target.any():
        raise UserError(f"{stack.shape[1]} samples with {int(target.sum())} labels are too few to score an ensemble by")
    rows = {}
    for file, scores in zip(_names(files), stack, strict=True):
        rows[file] = _row(options, scores[None], target, lambda stack, target: np.ones(1))
        rows[file]["weights"] = None
    for name in dict.fromkeys(["equal", *(METHODS if options.compare else ()), method]):
        own = stack
        if name == "geometric":
            own = combine.geometric(stack)[None]
        elif name == "rank":
            own = combine.ranks(stack)
        rows[name] = _row(options, own, target, _fit(name, weights, options))
        rows[name]["weights"] = rows[name]["weights"] if name in (*TUNED, "given") else None
    return rows


def _fit(method: str, weights: NDArray | None, options: Namespace) -> combine.Fit:
    if method == "tuned":
        return combine.tuned
    if method == "tuned-per-class":
        return combine.tuned_per_class
    if method == "greedy":
        how = {"metric": options.metric, "zero_division": options.zero_division}
        return partial(combine.greedy, **how)
    return lambda stack, target: np.full(len(stack), 1 / len(stack)) if weights is None else weights


def _row(options: Namespace, stack: NDArray, target: NDArray, fit: combine.Fit) -> dict[str, Any]:
    metrics = tuple(dict.fromkeys((options.metric, "map")))
    weights = fit(stack, target)
    scores = combine.mean(stack, weights)
    zero = options.zero_division
    found = {metric: combine.value(scores, target, metric, zero) for metric in metrics}
    honest = combine.cross_fitted(stack, target, fit, metrics, FOLDS, zero)
    return {"weights": weights, "value": found, "honest": honest}


def _names(files: Sequence[Path]) -> list[str]:
    """Their names, with the folders in which they differ where two are the same."""
    if len({file.name for file in files}) == len(files):
        return [file.name for file in files]
    common = os.path.commonpath([file.resolve().parent for file in files])
    return [str(file.resolve().relative_to(common)) for file in files]


def _print(rows: dict[str, dict[str, Any]], metric: str, title: str) -> None:
    metrics = list(next(iter(rows.values()))["value"])
    table = Table(title=title, caption=f"honest: weights and threshold from the other samples, {FOLDS} parts")
    table.add_column("")
    for name in metrics:
        table.add_column(name, justify="right")
        table.add_column("honest", justify="right")
    table.add_column("weights")
    for name, row in rows.items():
        cells = [f"{row[kind][each]:.4f}" for each in metrics for kind in ("value", "honest")]
        table.add_row(name, *cells, _shown(row["weights"]))
    console = Console()
    console.print(table)
    best = max(rows, key=lambda name: rows[name]["honest"][metric])
    console.print(f"best honest {metric}: {best}, {rows[best]['honest'][metric]:.4f}", highlight=False)


def _shown(weights: NDArray | None) -> str:
    if weights is None:
        return ""
    if weights.ndim == 2:
        return ", ".join(f"{low:.2f}..{high:.2f}" for low, high in zip(weights.min(1), weights.max(1), strict=True))
    return ", ".join(f"{weight:.3f}" for weight in weights[:SHOWN]) + (", ..." if len(weights) > SHOWN else "")


# ---- label sets ------------------------------------------------------------------------------------------------------


def _sets(options: Namespace, files: Sequence[Path], out: Path) -> int:
    """--vote and --union."""
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out {out}: label sets are a submission, which is a .csv")
    if options.weights != "equal" and options.union:
        raise UserError(f"--weights {options.weights}: a union has none, one vote is enough")
    if options.weights in METHODS[1:] or options.weights.endswith(".json"):
        raise UserError(f"--weights {options.weights} is for probabilities; a vote takes numbers, or equal")
    if options.threshold == "tuned":
        raise UserError("--threshold tuned is for a mean; tune each file by itself and give its thresholds here")
    columns = given_columns(options)
    pairs = zip(files, _rules(options, files), strict=True)
    rules = [None if is_submission(file, columns) else rule for file, rule in pairs]
    stack = read_sets(files, rules, columns, _known_classes(options, columns))
    target = _target(options, stack)
    equal = np.full(len(files), 1 / len(files))
    weights = equal if options.weights == "equal" else _numbers(options.weights, len(files))
    if options.vote and len(files) > 1 and weights.max() > options.share >= 1 - weights.max():
        say(f"note: {files[int(weights.argmax())]} has {weights.max():.3f} of the weight and decides alone")
    chosen = stack.values.any(0) if options.union else combine.vote(stack.values, weights, options.share)
    if target is not None:
        for name, sets in [*zip(_names(files), stack.values, strict=True), ("together", chosen)]:
            how = {"zero_division": options.zero_division}
            parts = {
                kind: multilabel.fbeta(sets, target, average=kind, **how) for kind in ("samples", "micro", "macro")
            }
            print(f"{name}: " + ", ".join(f"f1_{kind} {value:.4f}" for kind, value in parts.items()))
    write_submission(out, stack.ids.to_pylist(), stack.classes, chosen, columns)
    say(f"{plural(len(files), 'label set')}, {chosen.sum(1).mean():.2f} labels per image: {out}")
    return 0


# ---- files -----------------------------------------------------------------------------------------------------------


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}")


def _tune(path: Path, options: Namespace, scores: NDArray, target: NDArray) -> dict:
    """Writes the best single threshold of the combination, and returns what was written."""
    f1 = "f1_samples" if options.metric == "map" else options.metric
    how = {"metric": f1, "zero_division": options.zero_division}
    threshold, value = thresholds.best_global_threshold(scores, target, **how)
    thresholds.save(path, threshold=threshold, value=value, **how)
    return thresholds.load(path)


def _write_weights(
    path: Path, files: Sequence[Path], classes: Sequence[str], method: str, weights: NDArray, row: dict[str, Any]
) -> None:
    each = weights.tolist()
    if weights.ndim == 2:
        each = {name: column.tolist() for name, column in zip(classes, weights.T, strict=True)}
    content = {"files": [str(file) for file in files], "method": method, "weights": each}
    content |= {"value": row["value"], "honest": row["honest"]}
    with disk_errors(path), whole(path) as building:
        building.write_text(to_json(content, indent=1) + "\n")


def _read_weights(path: Path, stack: Stack) -> tuple[str, NDArray]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        each, files = content["weights"], content["files"]
        named = isinstance(each, dict)
        if named and set(each) != set(stack.classes):
            odd = sorted(set(each) ^ set(stack.classes))[0]
            raise UserError(f"--weights {path}: it or the predictions have no class {odd!r}; tune on the same classes")
        weights = np.array([each[name] for name in stack.classes] if named else each, np.float64).T
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--weights {path} cannot be read as what `mlc ensemble` wrote: {error}") from None
    if weights.shape[:1] != stack.values.shape[:1]:
        raise UserError(f"--weights {path} is for {len(files)} files ({', '.join(files)}); give as many, in that order")
    return "given", _shares(weights, str(path))


def _parser() -> Parser:
    parser = Parser(
        prog="mlc ensemble",
        description="Combines prediction files, or label sets, of the same images and classes; rows and columns are "
        "matched by name.",
        epilog="examples:\n"
        "  mlc ensemble a.csv b.csv --weights 0.901,0.885 --out mean.csv --threshold 0.5\n"
        "  mlc ensemble a-oof.csv b-oof.csv --weights tuned --compare --data DIR --split train --out oof.csv\n"
        "  mlc ensemble a.csv b.csv --weights oof-weights.json --threshold oof-thresholds.json --out test.csv\n"
        "  mlc ensemble --vote s1.csv s2.csv s3.csv --weights 0.90125,0.9009,0.885 --out test-submission.csv\n"
        "  mlc ensemble --vote stack/test.csv --threshold stack/thresholds.json --data DIR --split test \\\n"
        "      --out test-submission.csv\n"
        "  mlc ensemble --union image.csv text.csv --threshold 0.8,0.4 --out test-submission.csv",
    )
    add = parser.add_argument
    add(
        "files", nargs="+", metavar="FILE", help="predictions (.csv or .arrow); with --vote and --union submissions too"
    )
    add("--out", required=True, metavar="FILE", help="the combined predictions; --vote and --union: the submission")
    add(
        "--weights",
        default="equal",
        metavar="W",
        help="0.9,0.8: of each file, in their order; equal (default), geometric, rank: means of equals; with a truth "
        "tuned (one weight per file, least cross-entropy), tuned-per-class, greedy (hill climbing on --metric); "
        "'0.9,0.8;tag=0,1': others for the classes of a group of --data; or the NAME-weights.json of an earlier call",
    )
    add("--vote", action="store_true", help="labels that have more than --share of the weight, from label sets")
    add("--union", action="store_true", help="labels that any file has, each above its own --threshold")
    add("--share", type=finite, default=0.5, help="of the weight that a voted label must exceed (default: 0.5)")
    add(
        "--threshold",
        metavar="T",
        help="write a submission: a number, a thresholds.json, or tuned (on the truth); with --vote and --union one "
        "for each file of probabilities, comma-separated, or one for all",
    )
    add("--data", help="packed data set (folder or URL) with the true labels and the columns of submissions")
    add("--split", default="val", help="split of --data (default: val); one without labels gives no scores")
    add("--truth", metavar="CSV", help="true labels, ImageID,Labels as `mlc pack` reads them")
    add("--classes", metavar="YAML", help="classes of --vote and --union (default: of --data, else all labels found)")
    add_column_flags(parser, "--truth and of submissions, read and written")
    add(
        "--metric",
        default="f1_samples",
        help="what greedy climbs and the table shows: map, or any F-beta at its best threshold, f2_samples, f1_micro "
        "(default: f1_samples)",
    )
    add_zero_division(parser, "0", default=0)
    add("--compare", action="store_true", help="table of all kinds of weights; greedy takes a while on large files")
    return parser
