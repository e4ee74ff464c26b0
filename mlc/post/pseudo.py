"""`mlc pseudo PRED`: the most confident predictions of images without labels become labels to train on.

An image is as confident as its classes are on average: the mean of |p - 0.5|. What is chosen goes into an overlay of
the index, for `--data DIR --data pseudo:FILE`; no image is copied.
"""

from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np

from mlc.data.overlay import PREFIX, write_overlay
from mlc.data.prediction_files import aligned
from mlc.data.truth import filled_index
from mlc.metrics import thresholds
from shards.console import Parser, UserError, few, say
from shards.dataset import Dataset, load_dataset, open_index
from shards.json_text import to_json


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    dataset = load_dataset(options.data)
    found = choose(
        options.predictions,
        dataset,
        split=options.split,
        train_split=options.train_split,
        rule=thresholds.rule_of(options.threshold),
        share=options.share,
        per_class=options.per_class,
    )
    rows, labels, probabilities, never = found
    out = Path(options.out) if options.out else Path(options.predictions).with_suffix(".pseudo.arrow")
    write_overlay(out, dataset, options.split, rows, labels, probabilities if options.soft else None)
    counts = dict(zip(dataset.classes, labels.sum(0).tolist(), strict=True))
    summary = {"images": len(rows), "of": len(open_index(dataset, options.split)), "classes": counts, "never": never}
    if options.json:
        print(to_json(summary))
    if never:
        say(f"never seen in {options.train_split}, so never given here: {few(never)}")
    without = [name for name, count in counts.items() if not count and name not in never]
    if without:
        say(f"no chosen image has: {few(without)}")
    kind = "soft" if options.soft else "hard"
    say(f"{len(rows)} of {summary['of']} images, {labels.sum(1).mean():.2f} labels each, {kind}: --data {PREFIX}{out}")
    return 0


def choose(
    predictions: str | Path,
    dataset: Dataset,
    *,
    split: str,
    train_split: str,
    rule: dict,
    share: float,
    per_class: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(rows int64 [n] ascending, labels bool [n, C], probabilities float32 [n, C], names of classes never seen).

    A class without a single training sample has predictions that nothing has taught: it is never given.

    Raises:
        UserError: an image without a prediction, an unknown split, nothing chosen.
    """
    index = filled_index(dataset, split)
    probabilities = aligned(predictions, index, dataset.classes)
    never = open_index(dataset, train_split).class_counts() == 0
    probabilities[:, never] = 0
    labels = thresholds.apply(probabilities, rule, dataset.classes) & ~never
    rows = most_confident(probabilities[:, ~never], labels, most=round(share * len(index)), per_class=per_class)
    if not len(rows):
        raise UserError(f"--share {share} of {len(index)} images is less than one; take a larger one")
    return (
        rows,
        labels[rows],
        probabilities[rows],
        [name for name, no in zip(dataset.classes, never, strict=True) if no],
    )


def most_confident(
    probabilities: np.ndarray, labels: np.ndarray, *, most: int, per_class: int | None = None
) -> np.ndarray:
    """Row numbers int64, ascending: the `most` rows with the highest mean |p - 0.5|, equal ones in their order.

    With `per_class` a row is passed over when each of its labels has been given so often already; rows without labels
    count as one more class. So common classes do not take all the places. probabilities [N, K], labels bool [N, C].
    """
    order = np.argsort(-np.abs(probabilities - 0.5).mean(1, dtype=np.float64), kind="stable")
    if per_class is None:
        return np.sort(order[:most])
    with_none = np.column_stack([labels, ~labels.any(1)])
    given, chosen = np.zeros(with_none.shape[1], np.int64), []
    for row in order.tolist():
        if len(chosen) == most:
            break
        if (given[with_none[row]] < per_class).any():
            chosen.append(row)
            given += with_none[row]
    return np.sort(np.array(chosen, np.int64))


def share_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"expected a share of the images above 0 and up to 1, not {text!r}")
    return value


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 up, not {text!r}")
    return int(text)


def add_choice_flags(parser: Parser) -> None:
    """The flags that `mlc selftrain` has as well."""
    add = parser.add_argument
    add("--split", default="test", help="split whose images get labels (default: test)")
    add(
        "--share",
        type=share_of,
        default=0.5,
        help="share of its images to take, the most confident ones (default: 0.5)",
    )
    add(
        "--per-class",
        type=at_least_one,
        metavar="K",
        help="pass an image over when each of its labels has K images already (default: no quota)",
    )
    add("--soft", action="store_true", help="train on the probabilities instead of on labels that are there or not")


def _parser() -> Parser:
    parser = Parser(
        prog="mlc pseudo",
        description="Turns the most confident predictions of a split into labels to train on.",
        epilog="example: mlc pseudo runs/demo/predictions/test.csv --data data/demo-shards --split test --share 0.3\n"
        "         mlc train ... --data data/demo-shards --data pseudo:runs/demo/predictions/test.pseudo.arrow",
    )
    parser.add_argument("predictions", metavar="PRED", help="predictions of the split, CSV or Arrow")
    parser.add_argument("--data", required=True, metavar="DIR", help="packed data set: a folder or a URL")
    add_choice_flags(parser)
    parser.add_argument(
        "--threshold", default="0.5", metavar="T|FILE", help="a label is given above it; or a thresholds.json (0.5)"
    )
    parser.add_argument(
        "--train-split", default="train", help="classes without a sample in this split are never given (train)"
    )
    parser.add_argument("--out", metavar="FILE", help="overlay to write (default: PRED with .pseudo.arrow)")
    parser.add_argument("--json", action="store_true", help="print how many images have which class")
    return parser
