"""`mlc fit`: from files to the best model and its submission, in stages that are verbs of their own.

A head on frozen features answers within minutes and gives the first submission; fine-tuning mostly beats it, and the
two together beat both. Every stage is printed as the command that does it alone, and is judged by the same measure:
sample-F1 on validation images, of the best rule of `mlc tune`, cross-fitted. The one that is best hands in.
"""

import gc
import importlib
import json
import math
import re
import shlex
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg

from mlc import jobs
from mlc.cli import VERBS
from mlc.data.truth import Truth, probabilities_of, truth_of_split
from mlc.metrics import thresholds
from mlc.metrics.decision_rules import FOLDS, Setup, cross_fitted, with_rest
from mlc.metrics.threshold_search import Metric
from mlc.models.build import resolve_name
from mlc.runlog import read_log
from mlc.sweep import visible_gpus
from shards.console import Parser, UserError, finite, say
from shards.dataset import load_dataset, write_json
from shards.files import disk_errors

ON_GPUS = ("train", "predict", "features", "eval")
PRESETS = {"quick": 0, "good": 1, "best": 3}  # and how many fine-tunings each has
MODEL = {"cpu": "tf_efficientnet_lite0", "cuda": "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k"}
EPOCHS, MOST_EPOCHS, LEAST_EPOCHS = 10.0, 30.0, 1.0  # of a fine-tuning: without --time, and the bounds with it
HEAD = "--head linear --epochs 20 -b 32 --eval-every 5ep --checkpoint-every 20ep"
TRIAL_STEPS, TRIAL_SHARE = (12, 60), 0.04  # least and most; between them, what takes about so much of the time
RESERVE = 0.95  # of the time: what is left at the end is short of the estimate rather than over it


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    out = Path(options.out)
    book = Book(out, vars(options))
    data = Path(options.data or out / "shards")

    # ---- Data
    if options.csv:
        book.stage("pack", [_pack(options, data)])
    dataset = load_dataset(str(data))
    if "train" not in dataset.splits or "val" not in dataset.splits:
        raise UserError(f"{data}: expected the splits train and val; it has {', '.join(dataset.splits)}")
    splits = [name for name in ("val", "test") if name in dataset.splits]
    book.stage("look", [["stats", str(data), "--html", str(out / "data.html")]])
    truth = truth_of_split(str(data), "val")
    found: list[Judged] = []

    def judged(name: str) -> None:
        """Tuned, compared and, where it is the best so far, handed in."""
        folder = out / name
        predictions = folder / "predictions" if (folder / "predictions").is_dir() else folder
        rule = out / name / "rule.json"
        commands = [["tune", str(predictions / "val.csv"), "--data", str(data), "--out", str(rule)]]
        if "test" in splits:
            told = ["--rule", str(rule), "--data", str(data), "--out", str(folder / "submission.csv")]
            commands.append(["submit", str(predictions / "test.csv"), *told])
        book.stage(f"{name}: labels", commands)
        value, margin = _score(predictions / "val.csv", rule, truth)
        seconds = sum(book.seconds(key) for key in book.stages if key.partition(":")[0] == name)
        found.append(Judged(name, value, margin, seconds, predictions))
        say(f"{name}: F1 samples {value:.4f} +- {margin:.4f} on validation images, cross-fitted")
        if max(found, key=lambda one: one.value) is found[-1] and "test" in splits:
            with disk_errors(out):
                (out / "submission.csv").write_bytes((folder / "submission.csv").read_bytes())
            say(f"{out / 'submission.csv'} is now that of {name}")

    # ---- A head on frozen features
    features = str(out / "features.arrow")
    reading = ["--text-model", options.text_model] if options.text_model else []
    wanted = ",".join(("train", *splits))
    common = ["--data", str(data), "-j", str(options.workers), *_precision()]
    made = ["features", *common, *_backbone(options), *reading, "--split", wanted, "--out", features]
    book.stage("head: features", [made])
    frozen = ["--data", str(data), "--features", features]
    how = ["--output", str(out), "--seed", str(options.seed)]
    named = ["--experiment", "head", "--resume", "auto"]
    book.stage("head: train", [["train", *frozen, *HEAD.split(), *how, *named, "-j", "0"]], trains=out / "head")
    book.stage("head: predict", [_predict(out / "head", split, [*frozen, "-j", "0"]) for split in splits])
    judged("head")

    # ---- Fine-tuning
    recipe = ["train", "-c", "finetune", *common, *_backbone(options), *how]
    if reading:  # whose encoder has a rate of its own; layers and classifier of the whole are no single chain
        recipe += [*reading, "--fusion", "concat", "--layer-decay", "1", "--head-lr-mult", "1"]
    recipe += ["-b", str(options.batch_size)]
    runs = PRESETS[options.preset]
    epochs = book.decided("epochs", lambda: _epochs(options, book, recipe, out, dataset, runs)) if runs else 0.0
    if runs and epochs < LEAST_EPOCHS:
        say(f"--time {options.time:g}s: too little is left to fine-tune ({epochs:.2f} epochs)")
        runs = 0
    for number in range(1, runs + 1):
        name = "finetune" if number == 1 else f"finetune-{number}"
        told = ["--epochs", f"{epochs:g}", "--experiment", name, "--resume", "auto"]
        told += ["--seed", str(options.seed + number - 1)]
        book.stage(f"{name}: train", [[*recipe, *told]], trains=out / name)
        book.stage(f"{name}: predict", [_predict(out / name, split, common) for split in splits])
        judged(name)

    # ---- Together
    if runs:
        parts = [one.predictions for one in found]
        together, weights = out / "ensemble", str(out / "ensemble" / "val-weights.json")
        with disk_errors(together):
            together.mkdir(exist_ok=True)
        files = {split: [str(part / f"{split}.csv") for part in parts] for split in splits}
        told = ["--weights", "tuned", "--data", str(data), "--split", "val", "--out", str(together / "val.csv")]
        commands = [["ensemble", *files["val"], *told]]
        if "test" in splits:
            commands.append(["ensemble", *files["test"], "--weights", weights, "--out", str(together / "test.csv")])
        book.stage("ensemble: predict", commands)
        judged("ensemble")

    # ---- What it came to
    shown = max((one for one in found if one.name != "ensemble"), key=lambda one: one.value).name
    scored = ["eval", "--run", str(out / shown), *(frozen if shown == "head" else common)]
    book.stage("report", [scored, ["report", str(out / shown), "--out", str(out / "report.html")]])
    _print(found, book)
    book.finish(found)
    chosen = max(found, key=lambda one: one.value)
    handed = f"; {out / 'submission.csv'} has its labels of the test split" if "test" in splits else ""
    say(f"best: {chosen.name}, F1 samples {chosen.value:.4f} +- {chosen.margin:.4f}{handed}")
    return 0


@dataclass(frozen=True)
class Judged:
    """`value`, `margin`: sample-F1 on validation images with half its 95 % interval; `predictions`: their folder."""

    name: str
    value: float
    margin: float
    seconds: float
    predictions: Path


# ---- commands --------------------------------------------------------------------------------------------------------


def _pack(options: Namespace, data: Path) -> list[str]:
    command = ["pack", "--csv", options.csv, "--images", options.images, "--out", str(data)]
    command += ["--val-csv", options.val_csv] if options.val_csv else ["--val-fraction", "0.15"]
    return command + (["--test-csv", options.test_csv] if options.test_csv else [])


def _backbone(options: Namespace) -> list[str]:
    name = options.model or MODEL["cuda" if visible_gpus() else "cpu"]
    weights = ["--pretrained-path", options.pretrained_path] if options.pretrained_path else ["--pretrained"]
    size = options.img_size or get_pretrained_cfg(resolve_name(name)[0]).input_size[-1]
    return ["--model", name, *weights, "--img-size", str(size)]


def _precision() -> list[str]:
    return ["--amp-dtype", "bf16"] if visible_gpus() else []


def _predict(run: Path, split: str, common: list[str]) -> list[str]:
    return ["predict", "--run", str(run), *common, "--split", split]


def _epochs(options: Namespace, book: "Book", recipe: list[str], out: Path, dataset: Any, runs: int) -> float:
    """So many that all `runs` fine-tunings and their predictions fit into what is left of --time, by a short trial."""
    if not options.time:
        return options.epochs
    trial = out / "trial"
    steps = book.decided("trial_steps", lambda: _trial_steps(options, book, dataset))
    told = ["--max-steps", str(steps), "--log-interval", "1", "--experiment", "trial", "--eval-every", "1000ep"]
    book.stage("trial", [[*recipe, *told, "--resume", "auto"]], trains=trial)
    lines = [line for line in read_log(trial / "log.jsonl") if "train/img_per_sec" in line]
    rate = float(1 / np.mean([1 / line["train/img_per_sec"] for line in lines[len(lines) // 3 :]]))
    training = steps * options.batch_size / rate
    samples = {name: split.num_samples for name, split in dataset.splits.items()}
    evaluation = samples["val"] / (2 * rate)  # of two sets of weights, without a backward pass
    start = max(0.0, book.seconds("trial") - training - evaluation)
    predicting = sum(samples.get(name, 0) for name in ("val", "test")) / (3 * rate)
    predicting += start * (3 if len(visible_gpus()) > 1 else 1)  # labels and report, and processes where there are any
    left = RESERVE * options.time - book.seconds()
    each = left / runs - start - predicting
    return min(MOST_EPOCHS, math.floor(100 * each / (samples["train"] / rate + evaluation)) / 100)


def _trial_steps(options: Namespace, book: "Book", dataset: Any) -> int:
    """By how fast the features were made, a forward pass alone."""
    images = sum(split.num_samples for split in dataset.splits.values())
    rate = images / max(1.0, book.seconds("head: features")) / 3
    steps = round(TRIAL_SHARE * options.time * rate / options.batch_size)
    return min(max(steps, TRIAL_STEPS[0]), TRIAL_STEPS[1])


# ---- scores ----------------------------------------------------------------------------------------------------------


def _score(file: Path, rule: Path, truth: Truth) -> tuple[float, float]:
    """(sample-F1 of the rule, fitted to other images than those it is measured on; half of its 95 % interval)."""
    kind = thresholds.load(rule).get("rule", "global")
    scores = probabilities_of([file], truth)
    setup = Setup(Metric.of("f1_samples"), truth.classes, with_rest(truth.groups, len(truth.classes)))
    predicted = cross_fitted([kind], scores, truth.target, setup, FOLDS)[kind]
    hits, all_of_both = (predicted & truth.target).sum(1), predicted.sum(1) + truth.target.sum(1)
    each = 2 * hits / np.maximum(all_of_both, 1)
    return float(each.mean()), float(1.96 * each.std(ddof=1) / math.sqrt(len(each)))


def _print(found: list[Judged], book: "Book") -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "F1 samples", "95 %", "seconds"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    best = max(found, key=lambda one: one.value)
    for one in found:
        style = "bold" if one is best else ""
        table.add_row(one.name, f"{one.value:.4f}", f"+- {one.margin:.4f}", f"{one.seconds:.0f}", style=style)
    table.add_row("in all", "", "", f"{book.seconds():.0f}")
    Console().print(table)


# ---- what was done ---------------------------------------------------------------------------------------------------


class Book:
    """`fit.json`: which stages are done, by which commands and how long they took; what was decided on the way. A stage
    that is done is not done again, one that was interrupted goes on, and other settings need another folder."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self._out, self._file = out, out / "fit.json"
        self.stages: dict[str, dict[str, Any]] = {}
        self._decided: dict[str, Any] = {}
        self._results: dict[str, Any] = {}
        settings = {name: value for name, value in settings.items() if name not in ("workers", "out")}
        if self._file.is_file():
            known = json.loads(self._file.read_text(encoding="utf-8"))
            changed = [name for name in settings if known["settings"].get(name) != settings[name]]
            if changed:
                was = known["settings"].get(changed[0])
                raise UserError(f"{out} was begun with other settings ({changed[0]}: {was}); give it another --out")
            self.stages, self._decided = known["stages"], known["decided"]
        elif out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and not a folder of `mlc fit`; give another --out")
        self._settings = settings
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        self._write()

    def seconds(self, name: str | None = None) -> float:
        """Of a stage, or of all."""
        stages = self.stages.values() if name is None else [self.stages.get(name, {})]
        return sum(stage.get("seconds", 0.0) for stage in stages)

    def decided(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided the first time."""
        if name not in self._decided:
            self._decided[name] = decide()
            self._write()
        return self._decided[name]

    def stage(self, name: str, commands: list[list[str]], trains: Path | None = None) -> None:
        """Runs the commands of `mlc` that are not done. trains: the run's folder, for a training, which must come to
        its end. Raises UserError where one fails."""
        own = self.stages.setdefault(name, {"done": [], "seconds": 0.0})
        for command in commands:
            if command in own["done"]:
                continue
            print(f"$ mlc {shlex.join(command)}", flush=True)
            begin = time.monotonic()
            try:
                self._run(command, trains)
                own["done"].append(command)
            finally:
                own["seconds"] += time.monotonic() - begin
                self._write()

    def finish(self, found: list[Judged]) -> None:
        """Notes what each stage came to, for whoever reads the file."""
        told = [asdict(one) | {"predictions": str(one.predictions.relative_to(self._out))} for one in found]
        self._results = {"results": told}
        self._write()

    def _run(self, command: list[str], trains: Path | None) -> None:
        """A training, and what several GPUs share, in processes of their own; everything else here."""
        gpus = visible_gpus()
        several = len(gpus) > 1 and command[0] in ON_GPUS
        if trains or several:
            gc.collect()
            torch.cuda.empty_cache()  # what a verb before needed here
            launched = jobs.on_gpus(["mlc", *command], len(gpus)) if several else ["mlc", *command]
            jobs.run_in_sight(launched, log=self._out / "fit.log", run=trains)
        elif code := importlib.import_module(VERBS[command[0]][0]).main(command[1:]):
            raise UserError(f"`mlc {command[0]}` ended with {code}; its lines are above")

    def _write(self) -> None:
        with disk_errors(self._file):
            known = {"settings": self._settings, "decided": self._decided, "stages": self.stages}
            write_json(self._file, known | self._results)


# ---- command line ----------------------------------------------------------------------------------------------------


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min|h)", text.strip())
    if not match:
        raise ArgumentTypeError(f"{text!r} is no time; write 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def _options(argv: list[str] | None) -> Namespace:
    parser = Parser(
        prog="mlc fit",
        description="From files to the best model and its submission: packs, trains a head on frozen features, "
        "fine-tunes, combines, tunes the rule. The same command again goes on where it was stopped.",
        epilog="examples:\n"
        "  mlc fit --csv train.csv --images images --test-csv test.csv --time 30min --out runs/fit\n"
        "  mlc fit --data DIR --model tf_efficientnet_lite0 --pretrained-path FILE --img-size 64 --out runs/fit",
    )
    add = parser.add_argument
    add("--csv", help="training images and labels, as `mlc pack` reads them")
    add("--images", help="their folder")
    add("--val-csv", help="validation images and labels (default: 15 %% of --csv)")
    add("--test-csv", help="images to hand in the labels of")
    add("--data", help="in place of these: a packed data set with the splits train and val, and test to hand in")
    add("--out", required=True, help="folder for all that is made")
    add("--preset", choices=PRESETS, default="good", help="quick: the head alone; good: fine-tuned as well, and both "
        "together; best: three fine-tunings (default: good)")  # fmt: skip
    add("--time", type=_seconds, help="what all may take: 90s, 30min, 2h; the fine-tunings get what is left")
    add("--epochs", type=finite, default=EPOCHS, help=f"of a fine-tuning, without --time (default: {EPOCHS:g})")
    add("--model", default="", help=f"timm's backbone (default: {MODEL['cuda']}, without a GPU {MODEL['cpu']})")
    add("--pretrained-path", default="", help="its weights (default: timm's published ones)")
    add("--img-size", type=int, help="pixels of a side (default: the backbone's)")
    add("--text-model", default="", help="read the captions too: a text encoder's name or folder")
    add("-b", "--batch-size", type=int, default=32, help="of the fine-tunings, per device (default: 32)")
    add("--seed", type=int, default=42, help="(default: 42)")
    add("-j", "--workers", type=int, default=2, help="processes that read images (default: 2)")
    options = parser.parse_args(argv)
    if bool(options.csv) == bool(options.data):
        raise UserError("give either --csv and --images, or --data DIR (packed shards)")
    if options.csv and not options.images:
        raise UserError("--csv needs --images, the folder of the images")
    for name in ("images", "val_csv", "test_csv"):
        if options.data and getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --csv; --data has its splits")
    return options
