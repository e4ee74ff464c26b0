"""What turns probabilities into labels, tuned on images with known labels that the model was not trained on.

Every rule is fitted to all of the images, and once more to four fifths of them at a time: what it gives on the last
fifth is the honest value, and the rule that is written is the one with the best of those.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlc.data.truth import Truth, add_column_flags, given_columns, probabilities_of, truth_of_split, truth_of_table
from mlc.metrics import multilabel, thresholds
from mlc.metrics.decision_rules import Setup, cross_fitted, fit, with_rest
from mlc.metrics.threshold_search import Metric
from mlc.report import threshold_curves
from mlc.scores import add_zero_division
from shards.console import Parser, UserError, progress, say
from shards.files import disk_errors, whole
from shards.json_text import to_json
from shards.table import read_classes

BEST = "best"  # --rule: the one with the best honest value


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    metric = Metric.of(options.metric, _zero_division(options))

    # ---- What is true, what was predicted
    truth = _truth(options)
    files = [Path(name) for name in options.predictions] or [_own_predictions(options)]
    scores = probabilities_of(files, truth)
    if not truth.target.any():
        raise UserError(f"{truth.source}: no image has a label, so there is nothing to tune for")
    if len(scores) < options.folds:
        raise UserError(f"--folds {options.folds}: there are only {len(scores)} images")
    groups = with_rest(truth.groups, len(truth.classes))
    setup = Setup(metric, truth.classes, groups, options.shrink, options.min_positives)
    if options.rule != BEST and options.rule not in setup.rules:
        raise UserError(f"--rule {options.rule}: {truth.source} has no groups of classes; --classes FILE may name some")
    out = _out(options, truth)

    # ---- Fit, and fit without a fold
    rules = setup.rules if options.rule == BEST else [options.rule]
    fitted = fit(rules, scores, truth.target, setup)
    with progress("folds", options.folds) as advance:
        held_out = cross_fitted(rules, scores, truth.target, setup, options.folds, options.seed, advance)

    # ---- Compare
    found: dict[str, dict[str, Any]] = {}
    for rule in rules:
        predicted = thresholds.apply(scores, fitted[rule], truth.classes)
        own = {"in_sample": _value(predicted, truth, metric), "honest": _value(held_out[rule], truth, metric)}
        found[rule] = own | {"labels": float(predicted.sum(1).mean()), "found_by": setup.search(rule)}
    chosen = max(rules, key=lambda rule: found[rule]["honest"])  # of equals the first, which is the simplest
    content = fitted[chosen] | {"value": found[chosen]["in_sample"], "honest": found[chosen]["honest"]}
    half = _value(scores > 0.5, truth, metric)

    # ---- Write and show
    if options.json:
        shape = {"metric": metric.name, "images": len(scores), "classes": len(truth.classes), "folds": options.folds}
        shape["at_half"] = half
        print(to_json(shape | {"rules": found, "chosen": chosen, "thresholds": content}))
    else:
        _print_table(found, fitted, chosen, truth, metric, options.folds)
        say(f"with a threshold of 0.5: {half:.4f}; labels per image in truth: {truth.target.sum(1).mean():.2f}")
    for text in multilabel.unlabelled(truth.target, metric.zero_division):
        say(text)
    if out:
        _write(out, content, scores, truth, setup, found, chosen)
        if options.run and not (options.predictions or options.out):
            _note_in_run(options, thresholds.apply(scores, content, truth.classes), truth)
    else:
        say("nothing written: --out FILE or --run RUN takes the chosen rule")
    return 0


# ---- truth and predictions -------------------------------------------------------------------------------------------


def _truth(options: Namespace) -> Truth:
    if options.data:
        return truth_of_split(options.data, options.split, where=options.where, fold=options.fold)
    classes, groups = read_classes(Path(options.classes)) if options.classes else (None, None)
    columns = given_columns(options)
    return truth_of_table(Path(options.truth), columns, classes, groups, of=options.classes)


def _zero_division(options: Namespace) -> float:
    """The flag's, else that of the thresholds that the run has."""
    file = Path(options.run or "") / options.weights / "thresholds.json"
    known = options.zero_division is None and options.run and file.is_file()
    return thresholds.load(file).get("zero_division", 0) if known else options.zero_division or 0


def _own_predictions(options: Namespace) -> Path:
    """What `mlc eval` and `mlc predict` left in the run."""
    file = Path(options.run) / "predictions" / f"{options.split}.csv"
    if not file.is_file():
        raise UserError(f"{file} is missing; `mlc eval --run {options.run} --data DIR` with this split makes it")
    return file


# ---- results ---------------------------------------------------------------------------------------------------------


def _value(predicted: NDArray[np.bool_], truth: Truth, metric: Metric) -> float:
    return multilabel.value_of(metric, predicted, truth.target)


def _out(options: Namespace, truth: Truth) -> Path | None:
    """Where the result goes; a run must have the same classes. In its own folder when there is no run."""
    if not options.run:
        return Path(options.out) if options.out else None
    from mlc.predict import weights_folder  # it imports torch, for seconds, which nothing else here needs

    folder = weights_folder(options.run, options.weights)
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("label_names", [])
    if odd := sorted(set(names) ^ set(truth.classes)):
        raise UserError(f"--run {options.run} has other classes than {truth.source}, such as {odd[0]!r}")
    return Path(options.out) if options.out else folder / "thresholds.json"


def _write(
    out: Path, content: dict, scores: NDArray, truth: Truth, setup: Setup, found: Mapping[str, Any], chosen: str
) -> None:
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    found_curves = threshold_curves.curves(scores, truth.target, setup.metric, setup.groups)
    with whole(out.with_name(f"{out.stem}-curves.json")) as building:
        building.write_text(to_json(found_curves | {"rules": found, "chosen": chosen}) + "\n")
    threshold_curves.plot(out.with_suffix(".png"), found_curves, found, chosen)
    thresholds.write(out, content)
    say(f"{out}: {chosen}, {thresholds.describe(content)}; {out.with_suffix('.png').name} beside it")


def _note_in_run(options: Namespace, predicted: NDArray[np.bool_], truth: Truth) -> None:
    """`mlc compare` shows what `mlc eval` left in the run, which is that of the rule before."""
    file = Path(options.run) / "predictions" / f"{options.split}.json"
    if options.weights == "best" and options.data and not options.where and options.fold is None and file.is_file():
        results = json.loads(file.read_text(encoding="utf-8"))
        zero = results.get("zero_division", 0)
        results["f1_samples@run"] = multilabel.f1_samples(predicted, truth.target, zero_division=zero)
        with whole(file) as building:
            building.write_text(to_json(results, indent=1) + "\n")


def _print_table(
    found: Mapping[str, Mapping[str, Any]],
    fitted: Mapping[str, Mapping[str, Any]],
    chosen: str,
    truth: Truth,
    metric: Metric,
    folds: int,
) -> None:
    images, classes = truth.target.shape
    title = f"{metric.name} of {images} images x {classes} classes; honest: on images left out, {folds} folds"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for name in ("rule", "in sample", "honest", "labels", "found by", "setting"):
        table.add_column(name, justify="right" if name in ("in sample", "honest", "labels") else "left", no_wrap=True)
    for rule, own in found.items():
        style = "bold" if rule == chosen and len(found) > 1 else ""
        numbers = (f"{own['in_sample']:.4f}", f"{own['honest']:.4f}", f"{own['labels']:.2f}")
        setting = thresholds.describe(fitted[rule])
        shown = setting if len(setting) < 70 else f"{setting[:66]} ..."
        table.add_row(f"{rule}{' *' if style else ''}", *numbers, own["found_by"], shown, style=style)
    console = Console()
    console.width = max(console.width, 130)  # rather a broken line than a number cut short
    console.print(table)


# ---- command line ----------------------------------------------------------------------------------------------------


def _options(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="mlc tune",
        description="Tunes what turns probabilities into labels, and says what each rule is worth on other images.\n"
        "Predictions must be of images that the model was not trained on: a validation split, or out of fold.",
        epilog="examples:\n"
        "  mlc tune --run runs/demo --data data/demo-shards --split val\n"
        "  mlc tune oof-0.csv oof-1.csv --truth train.csv --metric f2_samples --out thresholds.json\n"
        "  mlc tune oof.arrow --data DIR --split train --rule class --shrink 50 --out class.json\n\n"
        "rules:\n"
        "  global         one threshold: the very best\n"
        "  group          one for each group of classes\n"
        "  class          one for each class, drawn towards the global one, see --shrink\n"
        "  max-fraction   above a fraction of the image's highest probability (p > max / 7)\n"
        "  top-k          a threshold, a least and a most number of labels for each group\n"
        "  balance        for each class as many false positives as false negatives\n"
        "  label-count    one threshold: as many labels as there are in truth\n"
        "  expected       the labels with the highest expected F-beta; takes probabilities at their word",
    )
    add = parser.add_argument
    add("predictions", nargs="*", metavar="PRED", help=".csv or .arrow; several are parts (default: those of --run)")
    add("--data", help="packed data set with the true labels: a folder or a URL")
    add("--split", default="val", help="split of --data (default: val)")
    add("--fold", type=int, help="only the rows of this fold")
    add("--where", default="", help="only the rows for which this is true: n_labels > 1")
    add("--truth", metavar="CSV", help="true labels as `mlc pack` reads them, in place of --data")
    add("--classes", metavar="YAML", help="classes and groups of --truth (default: the labels found, no groups)")
    add_column_flags(parser, "--truth")
    add("--metric", default="f1_samples", help="f1_samples, f2_micro, f0.5_macro: any beta (default: f1_samples)")
    add_zero_division(parser, "that of the run, else 0")
    add("--rule", choices=(BEST, *thresholds.RULES), default=BEST, help="only this one (default: the best of all)")
    add("--shrink", type=_number_from(0), default=20.0, help="weight of a class's own threshold: n / (n + this) (20)")
    add("--min-positives", type=_number_from(0, int), default=10, help="rarer classes take the global threshold (10)")
    add("--folds", type=_number_from(2, int), default=5, help="parts of the cross-fit (5)")
    add("--seed", type=_number_from(0, int), default=0, help="of the parts (0)")
    add("--run", help="write it into this run, whose predictions then use it")
    add("--weights", choices=("best", "last"), default="best", help="which weights of --run (default: best)")
    add("--out", metavar="FILE", help="write it here; plot and curves come beside it")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    if bool(options.data) == bool(options.truth):
        raise UserError("give either --data DIR (packed shards) or --truth CSV")
    if not options.predictions and not options.run:
        raise UserError("give prediction files, or --run RUN that has some")
    if options.truth and (options.where or options.fold is not None):
        raise UserError("--fold and --where choose rows of --data; --truth has none")
    if options.classes and options.data:
        raise UserError("--classes belongs to --truth; --data knows its classes")
    return options


def _number_from(least: int, kind: type = float):
    def parsed(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < float("inf"):
            number = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {number} from {least} up")
        return value

    return parsed
