"""Scores a run on a split that has labels: a table, `--json`, and a picture of what it predicts. Files that are already
there are scored by mlc/scores.py, which `mlc eval` comes through.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np

from mlc.batch_size import in_prediction
from mlc.captions import captions_of
from mlc.data.loader import readers
from mlc.data.prediction_files import write_probabilities
from mlc.data.prediction_sources import note, of_split, refuse_others
from mlc.inference import tta_views
from mlc.metrics import bootstrap, constant, multilabel, thresholds
from mlc.metrics.scorecard import Scorecard
from mlc.models.build import on_device
from mlc.parallel import launch
from mlc.predict import (
    add_compute_flags,
    add_data_flags,
    features_of,
    load_everywhere,
    open_rows,
    predict,
    weights_folder,
)
from mlc.report.plots import contact_sheet
from mlc.scores import add_zero_division, count, print_metrics, zero_division
from shards.console import Parser, UserError, say
from shards.files import whole
from shards.json_text import to_json


@launch.peers()
@readers()
@in_prediction()
def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    views = tta_views(options.tta)
    dataset, reader, rows = open_rows(options, labelled=True)
    accelerator = launch.start(options.amp_dtype)
    weights = weights_folder(options.run, options.weights)
    ((model, info),) = load_everywhere([weights])
    if info["label_names"] != list(dataset.classes):
        raise UserError(
            f"{options.data} has other classes than the run {options.run}; evaluate on the data it was trained for"
        )
    folder, file = Path(options.run) / "predictions", f"{options.split}.csv"
    source = of_split(dataset, options.split)
    refuse_others(folder, [file], source, splits=False)

    begin = time.perf_counter()
    scores, seen = predict(
        on_device(model, accelerator.device),
        info,
        reader,
        rows,
        accelerator,
        options,
        views=views,
        captions=captions_of(weights, info, reader),
        features=features_of(options, [info], reader, rows),
        title=f"evaluate {options.split}",
    )
    seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        rule = thresholds.load(weights / "thresholds.json")
        scores, rows = scores[seen], rows[seen]
        target = reader.index.targets(rows) > 0.5
        zero = zero_division(options, rule)
        card = Scorecard(scores, scores > 0.5, target, dataset.group_columns, zero)
        results = {name: float(value[0]) for name, value in card.at().items()}
        results |= score(scores, target, dataset, rule, zero) | ({"zero_division": 1} if zero else {})
        results["size_mb"] = (weights / "model.safetensors").stat().st_size / 1e6
        results["ms_per_sample"] = 1e3 * seconds / max(1, len(seen))
        if options.bootstrap:
            drawn = bootstrap.draws(len(card), options.bootstrap)
            results["intervals"] = {name: list(found) for name, found in bootstrap.intervals(card, drawn).items()}
        ids = [reader.image_id(row) for row in rows]
        note(folder, [file], source)
        write_probabilities(folder / file, ids, dataset.classes, scores)
        predicted = thresholds.apply(scores, rule, dataset.classes)
        contact_sheet(folder / f"{options.split}.png", reader, rows, predicted, dataset.classes)
        with whole(folder / f"{options.split}.json") as building:
            building.write_text(to_json(results, indent=1) + "\n")
        if options.json:
            print(to_json(results))
        else:
            print_metrics(results, f"{options.run} on {options.split}, {len(rows)} samples")
        for text in multilabel.without_labels(predicted, target, "the run's rule", zero):
            say(text)
        say(f"pictures with predictions: {folder / f'{options.split}.png'}")
    accelerator.end_training()


def score(scores: np.ndarray, target: np.ndarray, dataset, rule: dict, zero: float = 0.0) -> dict[str, float]:
    """All metrics at threshold 0.5, at the best threshold of this split (`@tuned`) and at the run's own (`@run`), and
    what needs no model: always the commonest labels of this very split, so many as are best (`commonest`; an upper
    bound, as `@tuned` is one), and mAP by chance.

    scores float32 and target bool, both [N, C].
    """
    how = {"groups": dataset.group_columns, "zero_division": zero}
    results = dict(multilabel.evaluate(scores, target, threshold=0.5, **how))
    f1 = partial(multilabel.f1_samples, target=target, zero_division=zero)
    results["f1_samples@run"] = f1(thresholds.apply(scores, rule, dataset.classes))
    owner, columns = np.nonzero(target)
    size, value = constant.best_constant(target.mean(0), columns, owner, len(target), zero)
    results |= {"f1_samples@commonest": value, "commonest": size}
    results["map@chance"] = constant.chance_map(columns, len(target))
    return results


def _parser() -> Parser:
    parser = Parser(
        prog="mlc eval",
        description="Scores a run on a split that has labels.",
        epilog="example: mlc eval --run runs/demo --data data/demo-shards --split val --json",
    )
    parser.add_argument("--run", required=True, help="folder of the run, or of exported weights")
    parser.add_argument(
        "--weights", choices=("best", "last"), default="best", help="which weights of the run (default: best)"
    )
    parser.add_argument("--data", required=True, help="packed data set: a folder or a URL")
    parser.add_argument("--split", default="val", help="split of --data (default: val)")
    add_data_flags(parser)
    parser.add_argument(
        "--bootstrap", type=count, default=0, metavar="N", help="95 %% intervals from N draws of images"
    )
    add_zero_division(parser, "that of the run")
    parser.add_argument("--tta", default="", help="views to average, comma-separated: hflip, scale")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_compute_flags(parser)
    return parser
