"""`mlc submit`: the labels of one file of probabilities, by a number or a rule that `mlc tune` wrote."""

from argparse import Namespace
from pathlib import Path

from mlc.data.prediction_files import read_predictions, write_submission
from mlc.data.truth import add_column_flags, given_columns
from mlc.metrics import thresholds
from shards.console import Parser, UserError, say
from shards.dataset import load_dataset


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    rule, file, out = thresholds.rule_of(options.rule), Path(options.predictions), Path(options.out)
    if file.resolve() == out.resolve():
        raise UserError(f"--out {out} is the file of probabilities itself")
    dataset = load_dataset(options.data)
    ids, scores = read_predictions(file, dataset.classes)
    predicted = thresholds.apply(scores, rule, dataset.classes)
    write_submission(out, ids.to_pylist(), dataset.classes, predicted, given_columns(options))
    say(f"{out}: {len(ids)} samples, {predicted.sum(1).mean():.2f} labels each, {thresholds.describe(rule)}")
    return 0


def _options(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="mlc submit",
        description="Writes the labels of one file of probabilities.",
        epilog="example: mlc submit test.csv --rule runs/demo/best/thresholds.json --data DIR --out submission.csv",
    )
    parser.add_argument("predictions", metavar="PRED", help="probabilities: .csv or .arrow")
    parser.add_argument("--rule", required=True, help="a threshold, or the thresholds.json of a run or of `mlc tune`")
    parser.add_argument("--data", required=True, help="packed data set, for its classes and the submission's columns")
    parser.add_argument("--out", required=True, metavar="CSV", help="the submission")
    add_column_flags(parser, "--out")
    return parser.parse_args(argv)
