"""`mlc kfold`: K models, each trained without one K-th of the data, and for each training sample the answer of the one
model that has not seen it.

Everything that learns from predictions (thresholds, ensemble weights, wrong labels, a second level) needs such answers:
those of a model about its own training samples say how well it remembers. So the out-of-fold file is put together only
when each part is shown to come from the right model, and says what it was made of.
"""

import hashlib
import json
import os
import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mlc import jobs, predict, slurm
from mlc.config import Config, flag
from mlc.data.prediction_files import places, read_predictions, refuse_repeats, write_probabilities
from mlc.data.reader import FolderReader
from mlc.data.sampler import parse_data
from mlc.data.sources import Sources, open_split
from mlc.flags import read_flags, read_yaml
from mlc.metrics import multilabel, thresholds
from mlc.sweep import check, refuse_other_settings, visible_gpus, write_settings
from mlc.sweeps import Run
from shards.console import Parser, UserError, say, shown
from shards.dataset import Dataset, Index, write_json
from shards.files import disk_errors
from shards.json_text import to_json
from shards.tar import file_sha256

OWN = ("fold", "resume", "resume_weights_only", "dry_run")  # settings that it gives each training itself
TEACHERS = (
    "kd_teacher",
    "load",
    "load_text",
    "load_combine",
    "init_head",
)  # models that may have seen the samples held out
WITH_FOLD = (*TEACHERS, "pretrained_path")  # {fold} in them is the number of the fold
RECORD = "made-from.json"  # beside the predictions of a fold


def main(argv: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start `mlc kfold` plainly; --launch NAME starts each of its trainings by `accelerate launch`")
    settings = _settings(rest)
    first = Config(**_of_fold(settings, 0))
    sources = check(first)
    index = open_split(sources.dataset, first.train_split, labelled=True)
    folds = _folds(options, sources.dataset, index, first)
    runs = [_run(settings, first, fold) for fold in range(folds)]
    _refuse_leaks(first, sources, index)
    _note_teachers(settings)
    _refuse_others(options, first, sources.dataset)
    for run in runs:
        refuse_other_settings(run)
    write_settings(runs)
    out = Path(first.output) / f"{_name(first)}-kfold"
    unfinished = [str(run.folder.resolve()) for run in runs if not jobs.finished(run.folder)]
    if options.slurm is not None and unfinished:
        return _submit(unfinished, out, options)
    left = jobs.work(
        [jobs.Job(run.folder) for run in runs],
        at_once=options.jobs or 1,
        launch_file=slurm.launch_file(options.launch) if options.launch else None,
        gpus=[] if options.launch else visible_gpus(),
        say=say,
    )
    for folder, reason in left.items():
        say(f"{folder}: {reason}")
    if left:
        say(f"{len(left)} of {folds} folds are left; the same command trains those alone")
        return 1
    _out_of_fold(options, runs, sources, index, out)
    _predict_others(options, runs, first, out)
    return 0


# ---- before anything runs --------------------------------------------------------------------------------------------


def _settings(rest: list[str]) -> dict[str, Any]:
    given = read_flags(rest, "mlc kfold")
    recipes = [read_yaml(source) for source in given.pop("config", [])]
    settings = {name: value for source in (*recipes, given) for name, value in source.items()}
    for name in OWN:
        if name in settings:
            raise UserError(f"{flag(name)} is set by `mlc kfold` itself; leave it out")
    return settings


def _name(config: Config) -> str:
    return config.experiment or f"{config.model}-{config.img_size}"


def _run(settings: dict[str, Any], first: Config, fold: int) -> Run:
    own = {"experiment": f"{_name(first)}-fold{fold}", "resume": "auto", "dry_run": False}
    config = Config(**_of_fold(settings, fold) | own)
    return Run(f"fold{fold}", config.seed, config, ())


def _of_fold(settings: dict[str, Any], fold: int) -> dict[str, Any]:
    """What begins from another model begins from the one that has not seen these samples either."""
    named = {name: settings[name] for name in WITH_FOLD if name in settings}
    for name, value in named.items():
        parts = [part.replace("{fold}", str(fold)) for part in (value if isinstance(value, list) else [value])]
        named[name] = parts if isinstance(value, list) else parts[0]
    return settings | named | {"fold": fold}


def _folds(options: Namespace, dataset: Dataset, index: Index, config: Config) -> int:
    """How many the data has. Raises UserError where it is another number or a sample is in none of them."""
    where = parse_data(config.data[0])[0]
    if options.folds and options.folds != dataset.folds:
        raise UserError(
            f"--folds {options.folds}: {where} was packed with {dataset.folds}; give that, or pack it again"
        )
    names = index.batch.column("image_id")
    outside = np.flatnonzero((index.fold < 0) | (index.fold >= dataset.folds))
    if len(outside):
        raise UserError(
            f"{where}: {len(outside)} of {len(index)} training samples are in no fold, such as "
            f"{names[int(outside[0])]}; `mlc pack --folds K` deals them all"
        )
    refuse_repeats(where, names)
    return dataset.folds


def _refuse_leaks(config: Config, sources: Sources, index: Index) -> None:
    """Raises UserError where a further data set has an image of the first one that is not held out with it."""
    names = index.batch.column("image_id")
    for text, rows in zip(config.data[1:], sources.sampler.sources[1:], strict=True):
        place = places(rows.index.batch.column("image_id"), names)
        both = np.flatnonzero(place >= 0)
        theirs, ours = rows.index.fold[both], index.fold[place[both]]
        if len(odd := both[theirs != ours]):
            raise UserError(
                f"--data {text} has {len(odd)} images of {config.data[0]} too, such as {rows.index.image_id(odd[0])}: "
                "the model that is asked about them would have seen them; leave them out, or give them the same folds"
            )


def _note_teachers(settings: dict[str, Any]) -> None:
    for name in TEACHERS:
        value = settings.get(name) or []
        for teacher in value if isinstance(value, list) else [value]:
            if "{fold}" not in teacher:
                say(f"note: {flag(name)} {teacher} may have seen the samples that are held out, and no file can tell")


def _refuse_others(options: Namespace, config: Config, dataset: Dataset) -> None:
    """A mistake in what is predicted at the end shows at the start."""
    if options.predict == config.train_split:
        raise UserError(f"--predict {options.predict}: that is what oof.csv holds; the models have seen its samples")
    if options.predict:
        open_split(dataset, options.predict)
    if options.images:
        FolderReader(options.images)


def _submit(folders: Sequence[str], out: Path, options: Namespace) -> int:
    flags = options.slurm + (f" --launch {shlex.quote(options.launch)}" if options.launch else "")
    slurm.submit_array("sweep", flags, folder=out, arguments=folders, after=None, at_once=options.jobs)
    say("the same command joins the folds when they are finished")
    return 0


# ---- out of fold -----------------------------------------------------------------------------------------------------


def _out_of_fold(options: Namespace, runs: Sequence[Run], sources: Sources, index: Index, out: Path) -> None:
    """`oof.csv`, and beside it what it was made of and the thresholds that are best for it."""
    records = []
    for run in runs:
        records.append(_record(run, sources, index, options))
        _predict_fold(options, run, records[-1], out / run.variant)
    classes = sources.dataset.classes
    scores = join([out / run.variant / f"{sources.split}.csv" for run in runs], index, classes)
    file, target = out / "oof.csv", index.targets(np.arange(len(index))) > 0.5
    write_probabilities(file, index.batch.column("image_id").to_pylist(), classes, scores)
    zero = {"zero_division": runs[0].config.zero_division}
    threshold, value = thresholds.best_global_threshold(scores, target, **zero)
    how = {"metric": "f1_samples", "threshold": threshold, "value": value}
    thresholds.save(out / "thresholds.json", **how, **zero)
    made = {"data": sources.fingerprint, "split": sources.split, "samples": len(index), "runs": records}
    made |= {"scores": dict(multilabel.evaluate(scores, target, **zero)), "sha256": file_sha256(file)}
    fingerprint = hashlib.sha256(to_json(made, sort_keys=True).encode()).hexdigest()[:16]
    with disk_errors(out):
        write_json(out / "oof.json", {"fingerprint": fingerprint, **made})
    _print(scores, target, index.fold, threshold, **zero)
    for text in multilabel.unlabelled(target, **zero):
        say(text)
    say(f"each of {len(index)} samples once, by the model that did not see it: {file}, {out / 'oof.json'}")


def _record(run: Run, sources: Sources, index: Index, options: Namespace) -> dict[str, Any]:
    """What the predictions of a fold are made from. Raises UserError where the run has not held out these samples: its
    settings, the fold among them, have been compared before; what is left is that the data set is another one now."""
    fold, weights = run.config.fold, predict.weights_folder(str(run.folder), options.weights)
    then = json.loads((weights / "config.json").read_text())["mlc"]["data"]
    if then != sources.fingerprint:
        raise UserError(
            f"{run.folder} was trained on other data ({then}, now {sources.fingerprint}); delete that folder"
        )
    record = {"run": str(run.folder), "fold": fold, "samples": int((index.fold == fold).sum())}
    record |= {"weights": options.weights, "sha256": file_sha256(weights / "model.safetensors")}
    return record | {"tta": options.tta, "data": sources.fingerprint}


def _predict_fold(options: Namespace, run: Run, record: dict[str, Any], folder: Path) -> None:
    """The held-out part of a run into `folder`, unless it is there already."""
    config, file = run.config, folder / f"{run.config.train_split}.csv"
    known = folder / RECORD
    if file.is_file() and known.is_file() and json.loads(known.read_text()) == record:
        return
    known.unlink(missing_ok=True)
    argv = ["--run", str(run.folder), "--data", parse_data(config.data[0])[0], "--split", config.train_split]
    predict.main([*argv, "--fold", str(config.fold), "--out", str(folder), *_common(options, config)])
    with disk_errors(folder):
        write_json(known, record)


def _common(options: Namespace, config: Config) -> list[str]:
    size = config.validation_batch_size or (32 if config.batch_size == "auto" else config.batch_size)
    pairs = {"weights": options.weights, "tta": options.tta, "cache_dir": config.cache_dir, "workers": config.workers}
    pairs |= {"batch_size": size, "cache_gb": config.cache_gb, "amp_dtype": config.amp_dtype}
    pairs |= {"max_bad_samples": config.max_bad_samples}
    features = [("features", file) for file in config.features]
    return [f"{flag(name)}={value}" for name, value in (*pairs.items(), *features)]


def join(parts: Sequence[Path], index: Index, classes: Sequence[str]) -> NDArray[np.float32]:
    """[N, C] in the order of the index: part k has the probabilities of fold k. Raises UserError unless each part has
    all samples of its fold, and no other."""
    names = index.batch.column("image_id")
    scores = np.full((len(index), len(classes)), np.nan, np.float32)
    for fold, part in enumerate(parts):
        ids, found = read_predictions(part, classes)
        rows = np.flatnonzero(index.fold == fold)
        place = places(names.take(pa.array(rows)), ids)
        if (place < 0).any() or len(ids) != len(rows):
            raise UserError(
                f"{part} has not the {len(rows)} samples of fold {fold}, each once; delete it and start again"
            )
        scores[rows] = found[place]
    assert not np.isnan(scores).any(), "a sample is in no part"
    return scores


def _print(scores: NDArray, target: NDArray, fold: NDArray, threshold: float, zero_division: float) -> None:
    table = Table(title=f"out of fold, threshold {threshold:.4f}")
    for name in ("", "samples", "map", "f1_samples"):
        table.add_column(name, justify="right" if name else "left")
    rows = [(f"fold {number}", fold == number) for number in np.unique(fold)]
    for name, own in (*rows, ("together", np.ones(len(fold), bool))):
        predicted = scores[own] > np.float32(threshold)
        f1 = multilabel.f1_samples(predicted, target[own], zero_division=zero_division)
        average = multilabel.mean_average_precision(scores[own], target[own])
        table.add_row(name, str(own.sum()), shown(average), shown(f1))
    Console().print(table)


def _predict_others(options: Namespace, runs: Sequence[Run], config: Config, out: Path) -> None:
    """`--predict` and `--images`: the mean of all folds' models, in one pass over the data."""
    argv = [word for run in runs for word in ("--run", str(run.folder))]
    argv += ["--threshold", repr(thresholds.load(out / "thresholds.json")["global"]), "--out", str(out)]
    argv += _common(options, config)
    data = ["--data", parse_data(config.data[0])[0]]
    for own in ([*data, "--split", options.predict] if options.predict else [], ["--images", options.images]):
        if own and own[-1]:
            predict.main([*argv, *own])


def _parser() -> Parser:
    parser = Parser(
        prog="mlc kfold",
        usage="mlc kfold [flags] [any flags of mlc train]",
        description="Trains a model for each fold of the data on the other folds (NAME-fold0, NAME-fold1, ...), and "
        "predicts each\ntraining sample by the model that has not seen it: NAME-kfold/oof.csv. The same command goes "
        "on with what is\nnot finished. In --pretrained-path, --load... and --kd-teacher, {fold} is the number of the "
        "fold.",
        epilog="examples:\n"
        "  mlc pack --csv train.csv --images images --folds 5 --out data/shards\n"
        "  mlc kfold -c demo --data data/shards --experiment demo --folds 5 --predict test\n"
        "  mlc kfold -c demo --data data/shards --experiment demo --jobs 2       # a GPU each\n"
        "  mlc kfold -c demo --data data/shards --experiment demo --slurm='--gpus 1 --time 4:00:00'\n"
        "  mlc kfold -c demo --data data/shards --experiment more --pretrained-path 'runs/demo-fold{fold}/last'",
    )
    add = parser.add_argument
    add("--folds", type=_positive, metavar="K", help="as in `mlc pack --folds` (default: what the data has)")
    add("--predict", metavar="SPLIT", help="also the mean of all models on this split of --data, and a submission")
    add("--images", metavar="DIR", help="also the mean of all models on these images (see predict)")
    add("--tta", default="", help="views to average in all predictions, comma-separated: hflip, scale")
    add(
        "--weights",
        choices=("best", "last"),
        default="best",
        help="of each run (default: best, the best evaluation on its own fold, which flatters the out-of-fold scores a "
        "little; last does not)",
    )
    add("--jobs", type=_positive, metavar="N", help="trainings at a time, each on its share of cores and a GPU (1)")
    add("--launch", metavar="NAME|FILE", help="start each training by `accelerate launch` with this configuration")
    add(
        "--slurm",
        nargs="?",
        const="",
        metavar="FLAGS",
        help="submit the folds that are not finished as an array, with these flags of `mlc slurm` (--slurm='--gpus 1')",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number above 0, not {text!r}")
    return int(text)
