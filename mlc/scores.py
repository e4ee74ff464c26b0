"""`mlc eval`: every metric of a prediction file, a submission or a run, with how sure it is, and whether another file
is better. A table of files is scored in seconds; a run is first predicted (mlc/evaluate.py).
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlc.data.prediction_files import class_columns, is_submission, write_probabilities
from mlc.data.truth import (
    Truth,
    add_column_flags,
    given_columns,
    labels_of,
    probabilities_of,
    truth_of_split,
    truth_of_table,
)
from mlc.metrics import bootstrap, calibration, multilabel, thresholds
from mlc.metrics.scorecard import LOWER_IS_BETTER, Scorecard
from shards.console import Parser, UserError, say, shown
from shards.json_text import to_json
from shards.table import Columns, read_classes

AVERAGES = ("_samples", "_micro", "_macro", "_weighted")
RATES = ("precision", "recall", "f1", "f2")
OF_GROUPS = ("map", "f1_samples", "f1_micro", "f1_macro", "f2_samples")
TITLES = {
    "loss": "binary cross entropy, nats",
    "map": "mean of the classes' average precision",
    "lrap": "label ranking average precision",
    "coverage_error": "labels down to the last true one",
    "ranking_loss": "share of label pairs in the wrong order",
    "ece": "expected calibration error",
    "CF1": "of CP and CR, the classes' means",
    "OF1": "of OP and OR, all decisions pooled",
    "f1_samples@tuned": "at the best threshold of these very labels",
    "threshold": "that threshold",
    "f1_samples@run": "at the thresholds of the run",
    "f1_samples@commonest": "of always the commonest labels of this split, at best",
    "map@chance": "of scores that say nothing",
    "size_mb": "weights on disk",
    "ms_per_sample": "decoding and starting included",
}


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    if any(arg.partition("=")[0] == "--run" for arg in argv):
        from mlc import evaluate  # torch and all that a model needs

        return evaluate.main(argv)
    options = _parser().parse_args(argv)
    files = [Path(name) for name in (options.pred, options.against) if name]
    columns = given_columns(options)
    submissions = [file for file in files if is_submission(file, columns)]
    if submissions and options.calibrate:
        raise UserError(f"{submissions[0]} has label sets and no probabilities; there is nothing to calibrate")
    truth = _truth(options, [file for file in files if file not in submissions], columns)
    rule = thresholds.rule_of(options.threshold)
    zero = zero_division(options, rule)
    answers = [_answer(file, truth, rule) for file in files]
    card = Scorecard(*answers[0], truth.target, truth.groups, zero)
    results: dict[str, Any] = evaluated(card, answers[0][0], truth.target, zero)
    weights = bootstrap.draws(len(card), options.bootstrap, options.seed) if options.bootstrap else None
    if weights is not None:
        results["intervals"] = {name: list(found) for name, found in bootstrap.intervals(card, weights).items()}
    results["images"] = len(card)
    results["classes"] = per_class(card, truth.classes)
    differences = None
    if options.against:
        if weights is None:
            weights = bootstrap.draws(len(card), 1000, options.seed)
        other = Scorecard(*answers[1], truth.target, truth.groups, zero)
        differences = bootstrap.compare(card, other, weights)
        results["against"] = {name: found._asdict() for name, found in differences.items()}
    if options.calibrate:
        results["calibrated"] = _calibrate(options, answers[0][0], truth)
    scores, decided = answers[0]
    what = options.pred if scores is None else thresholds.describe(rule)
    for text in multilabel.without_labels(decided, truth.target, what, zero):
        say(text)
    if options.json:
        print(to_json(results, ensure_ascii=False))
        return None
    print_metrics(results, f"{options.pred} on {truth.source}, {len(card)} images")
    if differences:
        _print_differences(differences, options)
    if options.per_class:
        _print_classes(results["classes"])
    return None


def evaluated(card: Scorecard, scores: np.ndarray | None, target: np.ndarray, zero: float = 0.0) -> dict[str, Any]:
    """{metric: value} of `Scorecard.at`, and of probabilities also f1_samples@tuned and its `threshold`.

    scores float32 or None, target bool, [N, C] each, and zero_division are those of the card.
    """
    found = {name: float(value[0]) for name, value in card.at().items()}
    if scores is not None:
        threshold, value = thresholds.best_global_threshold(scores, target, zero_division=zero)
        found |= {"f1_samples@tuned": value, "threshold": threshold}
    return found | ({"zero_division": 1} if zero else {})


def per_class(card: Scorecard, classes) -> list[dict[str, Any]]:
    """One dict per class: name, support, predicted, ap, precision, recall, f1."""
    columns = card.classes()
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [{"name": name} | dict(zip(columns, row, strict=True)) for name, row in zip(classes, rows, strict=True)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _truth(options, predictions: list[Path], columns: Columns) -> Truth:
    if bool(options.truth) == bool(options.data):
        raise UserError(
            "give the truth once: a CSV after the predictions, or --data DIR --split S of a packed data set"
        )
    if options.data:
        if options.classes:
            raise UserError("--classes belongs to TRUTH; --data knows its classes")
        truth = truth_of_split(options.data, options.split, where=options.where, fold=options.fold)
        return replace(truth, columns=columns)
    if options.where or options.fold is not None:
        raise UserError("--fold and --where choose rows of --data; TRUTH has none")
    table = Path(options.truth)
    classes, groups = read_classes(Path(options.classes)) if options.classes else (None, None)
    if predictions and not classes:
        return truth_of_table(table, columns, class_columns(predictions[0]), of=predictions[0])
    return truth_of_table(table, columns, classes, groups, of=options.classes)


def _answer(file: Path, truth: Truth, rule: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray]:
    """(probabilities or None, decisions), [N, C] each."""
    if is_submission(file, truth.columns):
        return None, labels_of(file, truth)
    scores = probabilities_of([file], truth)
    return scores, thresholds.apply(scores, rule, truth.classes)


def _calibrate(options, scores: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Writes the calibrated file; {kind, file, temperature or None, ece and loss before and after}."""
    file = Path(options.pred)
    out = Path(options.out) if options.out else file.with_name(f"{file.stem}.{options.calibrate}.csv")
    if out.resolve() == file.resolve():
        raise UserError(f"--out {out} is the file that is read; name another")
    made, curve = calibration.cross_fitted(options.calibrate, scores, truth.target, seed=options.seed)
    before, after = (Scorecard(values, values > 0.5, truth.target).at() for values in (scores, made))
    write_probabilities(out, truth.ids.to_pylist(), truth.classes, made)
    found: dict[str, Any] = {"kind": options.calibrate, "file": str(out), "temperature": curve.temperature}
    for name in ("ece", "loss"):
        found[name] = [float(before[name][0]), float(after[name][0])]
    moved = f", temperature {curve.temperature:.3f}" if curve.temperature else ""
    say(
        f"{out}: calibrated out of fold ({options.calibrate}{moved}): ECE {found['ece'][0]:.4f} -> "
        f"{found['ece'][1]:.4f}, loss {found['loss'][0]:.4f} -> {found['loss'][1]:.4f}"
    )
    return found


# ---- printing --------------------------------------------------------------------------------------------------------


def print_metrics(results: Mapping[str, Any], title: str) -> None:
    """The numbers of `results` with their `intervals`: one by one, then by average and by group."""
    spread = results.get("intervals", {})

    def cell(name: str) -> str:
        if name not in results:
            return ""
        low, high = spread.get(name, (math.nan, math.nan))
        return shown(results[name]) + ("" if math.isnan(low) else f"  {low:.4f}..{high:.4f}")

    groups = list(dict.fromkeys(name.partition("/")[2] for name in results if "/" in name))
    table = _table(title + (" (and 95 % intervals)" if spread else ""), "metric", "value", "")
    for name, value in results.items():
        if isinstance(value, float) and "/" not in name and not (name.endswith(AVERAGES) and name[0] in "prf"):
            table.add_row(name, cell(name), TITLES.get(name, ""))
    _print(table)
    table = _table("averages", "over", *RATES)
    for average in AVERAGES:
        table.add_row(average[1:], *(cell(rate + average) for rate in RATES))
    _print(table)
    if groups:
        table = _table("groups", "group", *OF_GROUPS)
        for group in groups:
            table.add_row(group, *(cell(f"{name}/{group}") for name in OF_GROUPS))
        _print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number and name else "left", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(markup=False)
    console.width = max(console.width, 140)  # rather a broken line than a number cut short
    console.print(table)


def _print_differences(differences: Mapping[str, bootstrap.Difference], options) -> None:
    table = _table(f"B, {options.against}, minus A, {options.pred}", "metric", "B - A", "95 % interval", "p", "better")
    for name, found in differences.items():
        lower = " (lower is better)" if name in LOWER_IS_BETTER else ""
        low, high, value = (shown(number, "+.4f") for number in (found.low, found.high, found.value))
        interval = "-" if low == high == "-" else f"{low}..{high}"
        table.add_row(name + lower, value, interval, shown(found.p, ".3f"), found.better or "unclear")
    _print(table)


def _print_classes(rows: list[dict[str, Any]]) -> None:
    names = ("support", "predicted", "ap", "precision", "recall", "f1")
    table = _table("classes", "class", *names)
    for row in rows:
        counts = [str(row[name]) for name in names[:2]]
        table.add_row(row["name"], *counts, *(shown(row[name]) for name in names[2:]))
    _print(table)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc eval",
        description="Scores a file of predictions, or a run: `mlc eval --run RUN --data DIR`, see `mlc eval --run -h`.",
        epilog="examples:\n"
        "  mlc eval oof.csv train.csv --bootstrap 1000\n"
        "  mlc eval a.csv --data data/demo-shards --split val --against b.csv\n"
        "  mlc eval test-submission.csv truth.csv --json\n"
        "  mlc eval --run runs/demo --data data/demo-shards --split val --bootstrap 1000",
    )
    parser.add_argument("pred", help="predictions (.csv, .arrow: ImageID and a column per class) or a submission")
    parser.add_argument("truth", nargs="?", help="CSV with the true labels, as for `mlc pack`")
    parser.add_argument("--data", help="packed data set with the true labels, in place of TRUTH")
    parser.add_argument("--split", default="val", help="split of --data (default: val)")
    parser.add_argument("--fold", type=int, help="only the rows of this fold")
    parser.add_argument("--where", default="", help="only the rows for which this is true: n_labels > 1")
    parser.add_argument("--threshold", default="0.5", help="a number or a thresholds.json (default: 0.5)")
    parser.add_argument(
        "--bootstrap", type=count, default=0, metavar="N", help="95 %% intervals from N draws of images"
    )
    parser.add_argument("--against", metavar="OTHER", help="is this file better? Compared on the same draws (or 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and the folds (default: 0)")
    parser.add_argument(
        "--calibrate", choices=calibration.KINDS, help="also write calibrated probabilities, each image's out of fold"
    )
    parser.add_argument("--out", help="file of --calibrate (default: PRED.KIND.csv beside PRED)")
    add_zero_division(parser, "that of the thresholds.json, else 0")
    parser.add_argument("--per-class", action="store_true", help="print a row per class as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--classes",
        metavar="YAML",
        help="classes and groups of TRUTH (default: those of the predictions; of submissions, the labels in TRUTH)",
    )
    add_column_flags(parser, "TRUTH and submissions")
    return parser


def add_zero_division(parser: Parser, said: str, default: int | None = None) -> None:
    """`said` of the default in the help."""
    parser.add_argument(
        "--zero-division",
        type=int,
        choices=(0, 1),
        default=default,
        help="what a precision, recall or F of nothing over nothing counts, as of an image without true and "
        f"predicted labels; scikit-learn's parameter (default: {said})",
    )


def zero_division(options: argparse.Namespace, rule: Mapping[str, Any]) -> float:
    """The flag's, else that which the thresholds were tuned with."""
    return rule.get("zero_division", 0) if options.zero_division is None else options.zero_division


def count(text: str) -> int:
    """A number of draws: at least 20, since 95 % intervals need some."""
    if not text.isdecimal() or 0 < int(text) < 20:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of draws; 1000 is usual, 20 the least")
    return int(text)
