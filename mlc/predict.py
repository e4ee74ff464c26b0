"""Prediction: every sample once, whatever the number of processes, as a table of probabilities and a submission.

`runs/NAME/predictions/SPLIT.csv` has `ImageID` and one probability per class, `SPLIT-submission.csv`
beside it the labels, in the columns of the data set's tables. Several runs share one pass over the
data: reading and decoding often cost more than a model.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlc.batch_size import in_prediction
from mlc.captions import captions_of, reading_of, sees_images
from mlc.data.dataset import BadSamples, EvalDataset
from mlc.data.features import Features, refuse_other_encoders
from mlc.data.filters import select_rows
from mlc.data.loader import readers
from mlc.data.prediction_files import separator_of, write_probabilities, write_submission
from mlc.data.prediction_sources import note, of_images, of_split, refuse_others
from mlc.data.reader import FolderReader, TarReader
from mlc.data.remote import open_reader
from mlc.data.sources import open_split
from mlc.data.transforms import EvalTransform
from mlc.inference import logits_of_rows, non_finite, probabilities, tta_views
from mlc.metrics import thresholds
from mlc.models.build import on_device
from mlc.models.export import exported_crop, load_exported
from mlc.parallel import agree, launch
from shards.console import Parser, UserError, finite, plural, say
from shards.dataset import Dataset, columns_of, load_dataset
from shards.table import Columns


@launch.peers()
@readers()
@in_prediction()
def main(argv: list[str] | None = None, load: Callable[[], tuple[torch.nn.Module, dict]] | None = None) -> None:
    """load: what gives (model, its description) in place of the exported weights of `--run`."""
    options = _parser().parse_args(argv)
    if bool(options.data) == bool(options.images):
        raise UserError("give either --data DIR (packed shards) or --images DIR (a folder of images)")
    if len(options.run) > 1 and not options.out:
        raise UserError(f"--run comes {len(options.run)} times: give --out DIR, where their mean goes")
    views = tta_views(options.tta)

    # ---- Launch: one CPU thread per process, since the rounding of a product may depend on the number of threads
    accelerator = launch.start(options.amp_dtype)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)

    # ---- Models and data
    names = run_names(options.run)
    weights = None if load else [weights_folder(run, options.weights) for run in options.run]
    loaded = [load()] if load else load_everywhere(weights)
    classes = loaded[0][1]["label_names"]
    order = [_columns(run, info, options.run[0], classes) for run, (_, info) in zip(options.run, loaded, strict=True)]
    asked = _open(options, classes, loaded[0][1])
    reader, rows, name = asked.reader, asked.rows, asked.name
    rule = _rule(options)

    # ---- Where it goes, before anything is done for it
    folder = Path(options.out or Path(options.run[0]) / "predictions")
    mean, submission = folder / f"{name}.csv", folder / f"{name}-submission.csv"
    single = [folder / f"{name}-{run}.csv" for run in names] if len(loaded) > 1 else []
    files = [file.name for file in (*single, mean, submission)]
    if submission in single:
        raise UserError(f"--run {options.run[single.index(submission)]}: {submission} is taken; rename the run")
    refuse_others(folder, files, asked.source)

    # ---- Predict
    scores = np.empty((len(loaded), len(rows), len(classes)), np.float32)
    seen = np.ones(len(rows), bool)
    passes = list(_passes(loaded, weights))
    for numbers in passes:
        info = loaded[numbers[0]][1]
        found, able = predict_each(
            [on_device(loaded[number][0], accelerator.device) for number in numbers],
            info,
            reader,
            rows,
            accelerator,
            options,
            views=views,
            captions=weights and captions_of(weights[numbers[0]], info, reader),
            features=features_of(options, [loaded[number][1] for number in numbers], reader, rows),
            title=f"predict {name}",
        )
        seen &= able
        for number, own in zip(numbers, found, strict=True):
            scores[number] = own[:, order[number]]
    each, scores = scores, scores.mean(axis=0, dtype=np.float64).astype(np.float32)
    for table in (*each, scores):
        table[~seen] = 0.0  # a submission needs its row; nothing was seen, so nothing is predicted

    # ---- Write
    if accelerator.is_main_process:
        note(folder, files, asked.source)
        ids = [reader.image_id(row) for row in rows]
        if single:
            for file, own in zip(single, each, strict=True):
                write_probabilities(file, ids, classes, own)
            ways = f", since they see the samples in {len(passes)} ways" if len(passes) > 1 else ""
            say(f"{len(each)} runs in {plural(len(passes), 'pass', 'passes')} over the data{ways}; their mean:")
        write_probabilities(mean, ids, classes, scores)
        write_submission(submission, ids, classes, thresholds.apply(scores, rule, classes), asked.columns)
        if bad := int((~seen).sum()):
            say(f"{plural(bad, 'bad image')}: probability 0 for every class")
        say(f"{len(ids)} samples x {plural(len(views), 'view')}, {thresholds.describe(rule)}: {mean} and {submission}")
    accelerator.end_training()


def predict(model, info, reader, rows, accelerator, options, **how) -> tuple[np.ndarray, np.ndarray]:
    """`predict_each` for one model: (probabilities float32 [N, C], seen bool [N])."""
    scores, seen = predict_each([model], info, reader, rows, accelerator, options, **how)
    return scores[0], seen


def predict_each(
    models, info, reader, rows, accelerator, options, *, views, captions, features, title
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities float32 [M, N, C] of the rows int64 [N], averaged over the views and captions, seen bool [N]), the
    same on every process. All models see the samples as `info` says; options: those of `add_compute_flags`.

    Rows whose image could not be read are not seen, and NaN; more than `--max-bad-samples` of them stop it.
    """
    config = info["pretrained_cfg"]
    transform = EvalTransform(
        size=config["input_size"][-1],
        crop=exported_crop(info),
        crop_pct=config["crop_pct"],
        mean=tuple(config["mean"]),
    )
    seen = np.zeros(len(rows), bool)
    scores = np.full((len(models), len(rows), len(info["label_names"])), np.nan, np.float32)
    for found, logits in logits_of_rows(
        models,
        EvalDataset(reader, transform, rows, captions=captions, features=features, images=sees_images(info)),
        accelerator,
        batch_size=options.batch_size,
        workers=options.workers,
        mean=config["mean"],
        std=config["std"],
        bad=BadSamples(options.max_bad_samples),
        views=views,
        title=title,
    ):
        place = np.searchsorted(rows, found)
        assert not seen[place].any(), "a row was predicted twice"
        seen[place] = True
        for own, answers in zip(scores, logits.swapaxes(0, 1), strict=True):
            own[place] = probabilities(answers)
    for own in scores:
        if wrong := non_finite(own[seen], rows[seen], reader, info["label_names"]):
            raise UserError(f"{wrong}; try --amp-dtype none, or other weights")
    return scores, seen


def load_everywhere(folders: Sequence[Path]) -> list[tuple[torch.nn.Module, dict]]:
    """`load_exported` of each, on all processes, which call it together.

    Raises:
        UserError: the processes read other weights, since a training replaced them meanwhile.
    """
    loaded = [load_exported(folder) for folder in folders]
    if torch.distributed.is_initialized():
        checks = {f"content of {f}": _checksum(model) for f, (model, _) in zip(folders, loaded, strict=True)}
        agree.require_same(checks)
    return loaded


def _checksum(model: torch.nn.Module) -> int:
    found = 0
    for tensor in model.state_dict().values():
        found = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), found)
    return found


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


def run_names(runs: Sequence[str]) -> list[str]:
    """Short names that tell the runs apart, by their folders. Raises UserError for one that is named twice."""
    paths = [Path(run).resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--run {path} is named twice; `mlc ensemble --weights 2,1` gives it more weight")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["-".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _columns(run: str, info: dict, first: str, classes: Sequence[str]) -> list[int]:
    """Where a run has the classes of the first one. Raises UserError where it has others."""
    names = info["label_names"]
    if set(names) != set(classes):
        odd = sorted(set(names) ^ set(classes))[0]
        raise UserError(f"--run {run} has other classes than {first}, such as {odd!r}; predict each by itself")
    return [names.index(name) for name in classes]


def _passes(loaded: Sequence[tuple], weights: Sequence[Path] | None) -> Iterable[list[int]]:
    """The numbers of the runs that see their samples in the same way, so that one pass serves them."""
    alike: dict[str, list[int]] = {}
    for number, (_, info) in enumerate(loaded):
        config = info["pretrained_cfg"]
        image = [config[key] for key in ("input_size", "crop_pct", "mean", "std")] + [exported_crop(info)]
        text = reading_of(weights[number], info) if weights else None
        features = info.get("mlc", {}).get("features")
        alike.setdefault(repr((image if sees_images(info) else None, text, features)), []).append(number)
    return alike.values()


@dataclass(frozen=True)
class _Predicted:
    """What is predicted: rows int64 [N] of a reader, its `name` for files, what it is (`source` of
    mlc/data/prediction_sources.py), and how its tables name their columns."""

    reader: TarReader | FolderReader
    rows: np.ndarray
    name: str
    source: dict[str, str]
    columns: Columns


def _open(options, classes: Sequence[str], info: dict) -> _Predicted:
    """Raises UserError also where a submission could not name one of the classes."""
    if options.images:
        if options.where or options.fold is not None:
            raise UserError("--fold and --where choose rows of --data; --images has none")
        reader = agree.from_first(lambda: FolderReader(options.images))  # files may come and go meanwhile
        source = of_images(options.images)
        columns = columns_of(info.get("mlc", {}).get("columns"), classes, f"{options.run[0]}: config.json")
        separator_of(columns, classes)
        return _Predicted(reader, np.arange(len(reader)), reader.folder.resolve().name, source, columns)
    dataset, reader, rows = open_rows(options)
    if list(dataset.classes) != list(classes):
        say(f"note: {options.data} has other classes than the run; the columns are the run's")
    separator_of(dataset.columns, classes)
    return _Predicted(reader, rows, options.split, of_split(dataset, options.split), dataset.columns)


def open_rows(options, *, labelled: bool = False) -> tuple[Dataset, TarReader, np.ndarray]:
    """What `--data --split --fold --where` choose: row numbers int64 [N], ascending, and their reader."""
    dataset = load_dataset(options.data, cache_dir=options.cache_dir)
    index = open_split(dataset, options.split, labelled=labelled)
    rows = select_rows(index, dataset.classes, where=options.where, fold=options.fold)
    reader = open_reader(index, cache_dir=options.cache_dir, cache_gb=options.cache_gb)
    return dataset, reader, np.arange(len(index)) if rows is None else rows


def features_of(options, infos: Sequence[dict], reader: TarReader | FolderReader, rows: np.ndarray) -> Features | None:
    """`--features` of the rows, for exported models with the `config.json` `infos` that were trained on some; else
    None. Raises UserError where the one does not fit the other."""
    trained_on = [info.get("mlc", {}).get("features") for info in infos]
    if options.features and None in trained_on:
        raise UserError(f"--features {options.features[0]}: this run sees images or captions, and takes no features")
    if None in trained_on:
        return None
    if isinstance(reader, FolderReader):
        raise UserError("this run was trained on features, and a folder of images has none; pack it and give --data")
    if not options.features:
        names = " and ".join(encoder["name"] for encoder in trained_on[0])
        raise UserError(f"this run was trained on features of {names}: give --features FILE of `mlc features`")
    if getattr(options, "tta", ""):
        raise UserError(f"--tta {options.tta}: features have no views; `mlc features --tta` averages those of an image")
    dataset = load_dataset(options.data, cache_dir=options.cache_dir)
    features = Features(options.features, dataset, options.split, reader.index, rows)
    for then in trained_on:
        refuse_other_encoders(then, features.encoders, " + ".join(options.features))
    return features


def _rule(options) -> dict:
    """The thresholds to apply: the flag's, else the run's own; of several runs with a single one each, their mean."""
    if options.threshold is not None:
        return {"metric": None, "global": options.threshold, "value": None}
    rules = [thresholds.load(weights_folder(run, options.weights) / "thresholds.json") for run in options.run]
    if len(rules) == 1:
        return rules[0]
    if all(rule.get("rule") == "expected" and rule["beta"] == rules[0]["beta"] for rule in rules):
        return rules[0]  # which has no number of its own
    if any(rule.get("rule", "global") not in ("global", "expected") for rule in rules):
        raise UserError("give --threshold: rules with more than one number have no mean")
    return {"metric": None, "global": float(np.mean([rule["global"] for rule in rules])), "value": None}


def _parser() -> Parser:
    parser = Parser(
        prog="mlc predict",
        description="Predicts every sample of a split, or every image of a folder, exactly once.",
        epilog="example: accelerate launch --config_file accelerate_config.yaml -m mlc predict --run runs/demo "
        "--data data/demo-shards --split test --tta hflip",
    )
    parser.add_argument(
        "--run",
        required=True,
        action="append",
        help="folder of the run, or of exported weights; several are predicted in one pass, each and their mean",
    )
    parser.add_argument(
        "--weights", choices=("best", "last"), default="best", help="which weights of the run (default: best)"
    )
    parser.add_argument("--data", help="packed data set: a folder or a URL")
    parser.add_argument("--split", default="test", help="split of --data (default: test)")
    add_data_flags(parser)
    parser.add_argument("--images", help="instead of --data: a folder of images, a file or 'a/*.jpg'")
    parser.add_argument(
        "--tta",
        default="",
        help="views to average, comma-separated, every combination: hflip, scale (the middle, 1.15 x larger)",
    )
    parser.add_argument(
        "--threshold",
        type=finite,
        help="predict a class above this probability (default: the run's thresholds.json)",
    )
    parser.add_argument("--out", help="folder of the output (default: predictions/ in the run, if it is one)")
    add_compute_flags(parser)
    return parser


def add_data_flags(parser: Parser) -> None:
    parser.add_argument("--fold", type=int, help="only the rows of this fold")
    parser.add_argument(
        "--where", default="", help='only the rows for which this is true: n_labels > 1, "cat" in labels'
    )
    parser.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="FILE",
        help="for a run that was trained on features: those of --data (`mlc features`), as in its training",
    )
    add_cache_flags(parser)


def add_cache_flags(parser: Parser) -> None:
    parser.add_argument("--cache-dir", default="", help="keep whole shards of a URL or a slow disk here")
    parser.add_argument(
        "--cache-gb",
        type=finite,
        default=100.0,
        help="size of --cache-dir; the longest unused shards make room (100)",
    )


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
