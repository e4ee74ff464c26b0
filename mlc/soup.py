"""`mlc soup`: one model from several of the same architecture, by averaging their weights.

Runs that started from the same published weights often lie in one valley of the loss: the mean of their weights is then
as good as their ensemble and costs no more than one of them (Wortsman et al. 2022, "Model soups"). Nothing says so
beforehand. Hence `--greedy`: a model stays in the mean only if the score on held-out data does not fall.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfile, copytree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlc.batch_size import in_prediction
from mlc.captions import captions_of, reading_of
from mlc.ckpt import export_weights
from mlc.data.loader import readers
from mlc.inference import tta_views
from mlc.metrics import multilabel, thresholds
from mlc.models.export import load_exported, write_config
from mlc.parallel import launch, storage
from mlc.predict import add_compute_flags, add_data_flags, features_of, open_rows, predict, weights_folder
from mlc.resume import at_path
from shards.console import Parser, UserError, plural, say
from shards.files import disk_errors, whole

State = dict[str, Tensor]
Score = Callable[[State], dict[str, float]]  # weights -> metrics on the held-out split


@launch.peers()
@readers()
@in_prediction()
def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _refuse(options)
    out = Path(options.out)
    with ExitStack() as stack:
        named = _ingredients(options, stack)
        model, info = _same_kind(named)
        scored = None
        kept = list(named)
        if options.data:
            accelerator = launch.start(options.amp_dtype)
            folder = next(iter(named.values()))
            score = _scorer(options, model.to(accelerator.device), info, folder, accelerator)
            own = {name: score(average([folder]))[options.metric] for name, folder in named.items()}
            kept = greedy(named, own, score, options.metric) if options.greedy else kept
            for name, value in own.items() if not options.greedy else ():
                _tell(f"{name}: {options.metric} {value:.4f}")
            scored = score(average([named[name] for name in kept]))
        _write(out, average([named[name] for name in kept]), info, named, kept, scored)
    value = f": {options.metric} {scored[options.metric]:.4f}" if scored else ""
    _tell(f"soup of {len(kept)} of {len(named)} in {out}{value}")


def average(folders: Sequence[Path]) -> State:
    """The arithmetic mean, tensor by tensor, of exported weights with the same tensors; one model in memory.

    Summed in float64. What is no floating-point number, such as a counter of batches, is the first one's.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / "model.safetensors", "pt")) for folder in folders]
        return {name: _mean([file.get_tensor(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if len(tensors) == 1 or not first.is_floating_point():
        return first
    total = first.double()
    for tensor in tensors[1:]:
        total += tensor.double()
    return (total / len(tensors)).to(first.dtype)


def greedy(named: dict[str, Path], own: dict[str, float], score: Score, metric: str) -> list[str]:
    """The names whose mean is the soup: from the best one on its own downwards, each stays if the score of the mean
    with it is not lower than without (Wortsman et al. 2022, recipe 1). Prints what was decided.
    """
    order = sorted(named, key=lambda name: -own[name])
    kept, best = order[:1], own[order[0]]
    _tell(f"{order[0]}: {metric} {best:.4f}, the best one")
    for name in order[1:]:
        value = score(average([named[other] for other in [*kept, name]]))[metric]
        stays = value >= best
        print(
            f"{name}: {metric} {own[name]:.4f}, {'stays' if stays else 'left out'}: with it {best:.4f} -> {value:.4f}"
        )
        if stays:
            kept, best = [*kept, name], value
    return kept


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)


# ---- ingredients -----------------------------------------------------------------------------------------------------


def _refuse(options: Namespace) -> None:
    if options.greedy and not options.data:
        raise UserError("--greedy needs --data DIR, the packed data set to score on")
    if options.checkpoints is not None and (options.checkpoints < 2 or len(options.runs) > 1):
        raise UserError("--checkpoints N averages the last N >= 2 checkpoints of one run")
    if options.checkpoints and options.weights in ("best", "last"):
        raise UserError(
            f"--weights {options.weights} is no part of a checkpoint; with --checkpoints give ema, or nothing"
        )
    known = multilabel.score_names()
    if options.metric not in known:
        raise UserError(f"--metric {options.metric} is not measured; choose one of {', '.join(known)}")


def _ingredients(options: Namespace, stack: ExitStack) -> dict[str, Path]:
    """{name for people: folder of exported weights}; checkpoints are exported for the time being."""
    if options.checkpoints:
        found = at_path(options.runs[0])[: options.checkpoints]
        if len(found) < options.checkpoints:
            raise UserError(
                f"{options.runs[0]} has {plural(len(found), 'complete checkpoint')}, not "
                f"{options.checkpoints}; --checkpoint-hist of the training says how many are kept"
            )
        places = {storage.name_of(place): place for place in found}
    elif options.weights == "ema":
        places = {run: at_path(run)[0] for run in options.runs}
    else:
        found = [weights_folder(run, options.weights or "best") for run in options.runs]
        places = {str(folder): folder for folder in found}
    if len(places) < 2:
        raise UserError("a soup needs at least two different models, or --checkpoints N of one run")
    if any(Path(options.out).resolve() == Path(str(place)).resolve() for place in places.values()):
        raise UserError(f"--out {options.out} is one of the models; give another folder")
    if not options.checkpoints and options.weights != "ema":
        return places
    for number, (name, place) in enumerate(list(places.items())):
        places[name] = Path(stack.enter_context(TemporaryDirectory(prefix=f"soup-{number}-")))
        export_weights(place, places[name], ema=options.weights == "ema")
    return places


def _same_kind(named: dict[str, Path]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(model of the first, its config.json). Raises UserError where another differs in more than its numbers."""
    (first, folder), *others = named.items()
    model, info = load_exported(folder)
    shapes = _shapes(folder)
    for name, other in others:
        theirs = load_exported(other)[1]
        for key in ("architecture", "model_args", "label_names"):
            if theirs[key] != info[key]:
                shown = "other classes" if key == "label_names" else f"{theirs[key]}, not {info[key]}"
                raise UserError(f"{name} has {shown} as {first}; only models of one kind can be averaged")
        for key in ("input_size", "mean", "std"):
            if theirs["pretrained_cfg"][key] != info["pretrained_cfg"][key]:
                raise UserError(f"{name} sees its images with another {key} than {first}; they cannot be averaged")
        fused = [about.get("mlc", {}).get(key) for about in (info, theirs) for key in ("fusion", "fusion_kwargs")]
        if fused[:2] != fused[2:] or reading_of(folder, info) != reading_of(other, theirs):
            raise UserError(f"{name} reads captions in another way than {first}; they cannot be averaged")
        if _shapes(other) != shapes:
            raise UserError(f"{name} has other tensors than {first}; only models of one kind can be averaged")
    if any(name.endswith("running_var") for name in shapes):
        say("note: the statistics of batch norm are averaged too, not measured anew; look at the score before use")
    return model, info


def _shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


# ---- scores and output -----------------------------------------------------------------------------------------------


def _scorer(options: Namespace, model: torch.nn.Module, info: dict[str, Any], folder: Path, accelerator) -> Score:
    dataset, reader, rows = open_rows(options, labelled=True)
    if info["label_names"] != list(dataset.classes):
        raise UserError(f"{options.data} has other classes than the models; score on the data they were trained for")
    features = features_of(options, [info], reader, rows)
    zero = _zero_division(folder)

    def score(state: State) -> dict[str, float]:
        model.load_state_dict(state)
        how = {"captions": captions_of(folder, info, reader), "features": features, "views": tta_views("")}
        scores, seen = predict(model, info, reader, rows, accelerator, options, **how, title="score")
        target = reader.index.targets(rows[seen])
        found = dict(multilabel.evaluate(scores[seen], target, zero_division=zero))
        if math.isnan(found[options.metric]):
            raise UserError(
                f"--metric {options.metric} has no value: no image of {options.data}, split {options.split}, has a "
                "label; score on labelled images"
            )
        return found

    return score


def _write(
    out: Path,
    state: State,
    info: dict[str, Any],
    named: dict[str, Path],
    kept: Sequence[str],
    scored: dict[str, float] | None,
) -> None:
    """The files of a run's `best/`; the threshold is tuned on the data, or the mean of the ingredients' own."""
    if os.environ.get("RANK", "0") != "0":
        return
    info = info | {"mlc": {name: value for name, value in info.get("mlc", {}).items() if name != "step"}}
    info["mlc"]["soup"] = list(kept)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with whole(out / "model.safetensors", SafetensorError) as building:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, building, {"format": "pt"})
    write_config(info, out)
    text = next(iter(named.values())) / "text"
    if text.is_dir():
        copytree(text, out / "text", copy_function=copyfile, dirs_exist_ok=True)
    own = [named[name] / "thresholds.json" for name in kept]
    given = [thresholds.load(path)["global"] for path in own if path.is_file()]
    threshold, value = (float(np.mean(given)) if given else 0.5), math.nan
    if scored:
        threshold, value = scored["threshold"], scored["f1_samples@tuned"]
    how = {"metric": "f1_samples", "threshold": threshold, "value": value}
    how["zero_division"] = _zero_division(next(iter(named.values())))
    thresholds.save(out / "thresholds.json", **how)


def _zero_division(folder: Path) -> float:
    """As the exported model was scored while it was trained."""
    file = folder / "thresholds.json"
    return thresholds.load(file).get("zero_division", 0) if file.is_file() else 0


def _parser() -> Parser:
    parser = Parser(
        prog="mlc soup",
        description="Averages the weights of several models of the same architecture and classes.",
        epilog="examples:\n"
        "  mlc soup runs/plain-s1 runs/plain-s2 runs/plain-s3 --out runs/soup --greedy --data data/demo-shards\n"
        "  mlc soup runs/demo --checkpoints 2 --out runs/demo-soup\n"
        "  mlc predict --run runs/soup --data data/demo-shards",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run, or folder of exported weights")
    add("--out", required=True, metavar="DIR", help="folder to write, as a run's best/")
    add(
        "--weights",
        choices=("best", "last", "ema"),
        help="of each run: the best or the last exported ones, or the averaged ones of its newest checkpoint "
        "(default: best; with --checkpoints those that were trained)",
    )
    add("--checkpoints", type=int, metavar="N", help="average the last N checkpoints of one run")
    add("--greedy", action="store_true", help="from the best one on, keep what does not lower the score")
    add("--data", help="packed data set to score on: a folder or a URL; also tunes the threshold")
    add("--split", default="val", help="split of --data (default: val)")
    add("--metric", default="f1_samples@tuned", help="the score (default: f1_samples@tuned)")
    add_data_flags(parser)
    add_compute_flags(parser)
    return parser
