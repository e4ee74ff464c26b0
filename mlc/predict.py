"""Prediction: every sample once, whatever the number of processes, as a table of probabilities and a submission.

`runs/NAME/predictions/SPLIT.csv` has `ImageID` and one probability per class, `submission.csv` beside it
`ImageID,Labels`.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlc.data.dataset import BadSamples, EvalDataset, open_split
from mlc.data.reader import FolderReader, TarReader
from mlc.data.transforms import EvalTransform
from mlc.inference import logits_of_rows, probabilities, tta_views
from mlc.metrics import thresholds
from mlc.models.export import load_exported
from mlc.parallel import launch
from shards.console import Parser, UserError, say
from shards.dataset import load_dataset


@launch.peers()
def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if bool(options.data) == bool(options.images):
        raise UserError("give either --data DIR (packed shards) or --images DIR (a folder of images)")
    views = tta_views(options.tta)

    # ---- Launch: one CPU thread per process, since the rounding of a product may depend on the number of threads
    accelerator = launch.start(options.amp_dtype)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)

    # ---- Model and data
    model, info = load_exported(weights_folder(options.run, options.weights))
    classes = info["label_names"]
    reader, name = _open(options, classes)

    # ---- Predict
    scores, seen = predict(
        model.to(accelerator.device),
        info,
        reader,
        accelerator,
        batch_size=options.batch_size,
        workers=options.workers,
        views=views,
        bad=BadSamples(options.max_bad_samples),
        title=f"predict {name}",
    )
    scores[~seen] = 0.0  # a submission needs its row; nothing was seen, so nothing is predicted

    # ---- Write
    if accelerator.is_main_process:
        folder = Path(options.out) if options.out else Path(options.run) / "predictions"
        rule = _rule(options)
        ids = [reader.image_id(row) for row in range(len(reader))]
        write_probabilities(folder / f"{name}.csv", ids, classes, scores)
        write_submission(folder / "submission.csv", ids, classes, thresholds.apply(scores, rule))
        if bad := (~seen).sum():
            say(f"{bad} bad image{'s' * (bad > 1)}: probability 0 for every class")
        say(
            f"{len(ids)} samples x {len(views)} view{'s' * (len(views) > 1)}, threshold {rule['global']:.4f}: "
            f"{folder / f'{name}.csv'} and {folder / 'submission.csv'}"
        )
    accelerator.end_training()


def predict(
    model, info, reader, accelerator, *, batch_size, workers, views, bad, title=""
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities float32 [N, C] averaged over the views, seen bool [N]), the same on every process.

    Rows whose image could not be read are counted in `bad`, not seen, and NaN.
    """
    config = info["pretrained_cfg"]
    crop = "squish" if config["crop_mode"] == "squash" else "center"
    transform = EvalTransform(size=config["input_size"][-1], crop=crop, crop_pct=config["crop_pct"])
    seen = np.zeros(len(reader), bool)
    scores = np.full((len(reader), len(info["label_names"])), np.nan, np.float32)
    for rows, logits in logits_of_rows(
        [model],
        EvalDataset(reader, transform),
        accelerator,
        batch_size=batch_size,
        workers=workers,
        mean=config["mean"],
        std=config["std"],
        bad=bad,
        views=views,
        title=title,
    ):
        assert not seen[rows].any(), "a row was predicted twice"
        seen[rows] = True
        scores[rows] = probabilities(logits[:, 0])
    missing = np.isnan(scores).any(axis=1) & seen
    if missing.any():
        raise UserError(
            f"{reader.name(int(missing.argmax()))}: the model's output is not a number ({missing.sum()} samples); "
            f"try --amp-dtype none"
        )
    return scores, seen


def weights_folder(run: str, which: str = "best") -> Path:
    """The exported weights of a run, or the folder itself when it holds a config.json."""
    folder = Path(run)
    if (folder / "config.json").is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"--run {run}: no such folder")
    if not (folder / which).is_dir():
        raise UserError(f"--run {run}: no {which}/ in it; a run has one after its first evaluation")
    return folder / which


def _open(options, classes: Sequence[str]):
    if options.images:
        return FolderReader(options.images), Path(options.images).resolve().name
    dataset = load_dataset(options.data)
    if list(dataset.classes) != list(classes):
        say(f"note: {options.data} has other classes than the run; the columns are the run's")
    return TarReader(open_split(dataset, options.split)), options.split


def _rule(options) -> dict:
    """The thresholds to apply: the flag's, else the run's own."""
    if options.threshold is not None:
        return {"metric": None, "global": options.threshold, "value": None}
    return thresholds.load(weights_folder(options.run, options.weights) / "thresholds.json")


def write_probabilities(path: Path, ids: Sequence[str], classes: Sequence[str], scores: np.ndarray) -> None:
    """`ImageID` and a column per class, nine digits (a float32 to the last bit), in row order; written whole."""
    _write(
        path,
        ["ImageID", *classes],
        ([image_id, *(f"{p:.9g}" for p in row)] for image_id, row in zip(ids, scores, strict=True)),
    )


def write_submission(path: Path, ids: Sequence[str], classes: Sequence[str], predicted: np.ndarray) -> None:
    """`ImageID,Labels`, the predicted classes joined by blanks."""
    labels = (" ".join(classes[c] for c in np.flatnonzero(row)) for row in predicted)
    _write(path, ["ImageID", "Labels"], zip(ids, labels, strict=True))


def _write(path: Path, header: list[str], rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_suffix(".tmp")
    with building.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    building.replace(path)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc predict",
        description="Predicts every sample of a split, or every image of a folder, exactly once.",
        epilog="example: accelerate launch --config_file accelerate_config.yaml -m mlc predict --run runs/demo "
        "--data data/demo-shards --split test --tta hflip",
    )
    parser.add_argument("--run", required=True, help="folder of the run, or of exported weights")
    parser.add_argument(
        "--weights", choices=("best", "last"), default="best", help="which weights of the run (default: best)"
    )
    parser.add_argument("--data", help="packed data set")
    parser.add_argument("--split", default="test", help="split of --data (default: test)")
    parser.add_argument("--images", help="folder of images that nobody packed, instead of --data")
    parser.add_argument(
        "--tta",
        default="",
        help="views to average, comma-separated, every combination: hflip, scale (the middle, 1.15 x larger)",
    )
    parser.add_argument(
        "--threshold", type=float, help="predict a class above this probability (default: the run's thresholds.json)"
    )
    parser.add_argument("--out", help="folder of the output (default: predictions/ in the run)")
    add_compute_flags(parser)
    return parser


def add_compute_flags(parser: Parser) -> None:
    parser.add_argument(
        "-b", "--batch-size", type=int, default=32, help="images per device and forward pass (default: 32)"
    )
    parser.add_argument(
        "-j", "--workers", type=int, default=2, help="processes that decode images, per device (default: 2)"
    )
    parser.add_argument(
        "--max-bad-samples", type=int, default=10, help="images that may be unreadable before it stops (default: 10)"
    )
    parser.add_argument(
        "--amp-dtype",
        choices=("auto", "none", "bf16", "fp16"),
        default="auto",
        help="autocast; auto takes the launcher's --mixed_precision on a GPU and none on a CPU",
    )
