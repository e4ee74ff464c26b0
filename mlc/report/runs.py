"""A finished run as a report wants it: what it was told, how it went, and what it says about a split it was scored on.

Everything is read from the run's folder; `mlc eval --run` has left the probabilities there, so nothing is predicted
twice and several runs are sure to be compared on the same images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlc.data.prediction_files import places, read_predictions
from mlc.data.sampler import parse_data
from mlc.data.truth import Truth, probabilities_of, truth_of_rows
from mlc.logfile import read_log
from mlc.metrics import thresholds
from mlc.metrics.scorecard import Scorecard
from shards.console import UserError, did_you_mean
from shards.dataset import Dataset, Index, load_dataset, open_index
from shards.urls import redact

PER_IMAGE = ("max-fraction", "top-k", "expected")  # rules of `mlc tune` that give a class no threshold of its own


@dataclass(frozen=True)
class Run:
    """`settings` of args.yaml, `log` the lines of log.jsonl, `rule` its thresholds.json, `info` its config.json,
    `results` what `mlc eval` wrote about the split ({} where it has not been scored)."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    rule: Mapping[str, Any]
    info: Mapping[str, Any]
    results: Mapping[str, Any]

    @cached_property
    def minutes(self) -> float | None:
        """Of training alone, without evaluations and checkpoints, which the rates of the log leave out."""
        spent, before = 0.0, 0
        for line in self.log:
            if rate := line.get("train/img_per_sec"):
                spent += (line["samples_seen"] - before) / rate
                before = line["samples_seen"]
        return spent / 60 if spent else None

    @cached_property
    def megabytes(self) -> float | None:
        file = self.folder / "best" / "model.safetensors"
        return file.stat().st_size / 1e6 if file.exists() else None

    @cached_property
    def wandb(self) -> str:
        """The run's page at W&B, "" where nobody knows."""
        file = self.folder / "wandb_url"
        text = file.read_text().strip() if file.exists() else ""
        return text if text.startswith("https://") else ""

    @cached_property
    def environment(self) -> dict[str, str]:
        """What it was trained with; of an older run, what its last checkpoint says."""
        if found := _json(self.folder / "environment.json"):
            return {name: str(value) for name, value in found.items()}
        metas = sorted(self.folder.glob("checkpoints/step-*/meta.json"))
        meta = _json(metas[-1]) if metas else {}
        found = {name: str(value) for name, value in meta.get("versions", {}).items()}
        return found | ({"processes": str(meta["world_size"])} if "world_size" in meta else {})

    @cached_property
    def tuned(self) -> dict[str, Any]:
        """`best/thresholds-curves.json` of `mlc tune`; {} where there is none, or a rule that was written later."""
        found = _json(self.folder / "best" / "thresholds-curves.json")
        chosen = found.get("rules", {}).get(found.get("chosen"), {})
        same = "honest" in self.rule and chosen.get("honest") == self.rule["honest"]
        return found if same and chosen.get("in_sample") == self.rule.get("value") else {}

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of a number of the log."""
        points = [(line["epoch"], line[metric]) for line in self.log if isinstance(line.get(metric), int | float)]
        return [x for x, _ in points], [y for _, y in points]

    def threshold(self, name: str) -> float | None:
        """Of a class; None where the rule decides by image."""
        if self.rule.get("rule", "global") in PER_IMAGE:
            return None
        classes = self.rule.get("classes")
        return classes[name] if isinstance(classes, dict) and name in classes else self.rule["global"]


@dataclass(frozen=True)
class Scored:
    """A run's answers to N images: `scores` float32 and `predicted` bool, by the run's own thresholds, [N, C]."""

    run: Run
    scores: np.ndarray
    predicted: np.ndarray
    card: Scorecard


@dataclass(frozen=True)
class Subject:
    """What several runs are compared on: the rows int64 [N] of a split that all of them have seen, and their labels."""

    dataset: Dataset
    split: str
    index: Index
    rows: np.ndarray
    truth: Truth
    zero_division: float = 0.0  # of all F1 on the page, so that they can be compared: the first run's


def open_runs(folders: Sequence[str], split: str) -> list[Run]:
    """Raises UserError naming a folder that is no run. Runs of one name are told apart by the folder above."""
    runs = [_open(Path(folder), split) for folder in folders]
    paths = [run.folder.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError("the same run twice; name each once")
    names = [path.name for path in paths]
    return [
        replace(run, name=path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}")
        for run, path in zip(runs, paths, strict=True)
    ]


def _json(file: Path) -> dict[str, Any]:
    """{} for a file that is missing or cut."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _open(folder: Path, split: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run, such as runs/demo")
    if not (folder / "args.yaml").is_file():
        raise UserError(f"{folder} is no run: there is no args.yaml in it; give the folder that `mlc train` made")
    try:
        settings = yaml.safe_load((folder / "args.yaml").read_text())
        info = json.loads((folder / "best" / "config.json").read_text()) if (folder / "best").is_dir() else {}
        file = folder / "predictions" / f"{split}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read as a run: {' '.join(str(error).split())}") from None
    rule = thresholds.load(folder / "best" / "thresholds.json") if info else {"global": 0.5}
    return Run(folder.name, folder, settings, read_log(folder / "log.jsonl"), rule, info, results)


def subject_of(runs: Sequence[Run], data: str | None, split: str) -> Subject:
    """What the runs' predictions/SPLIT.csv are about, by the first one's rows. Raises UserError."""
    first = runs[0]
    for run in runs:
        _need_scores(run, split, data)
    where = data or _data_of(first)
    try:
        dataset = load_dataset(where)
        index = open_index(dataset, split)
    except UserError as error:
        raise UserError(f"{error}" + ("" if data else " (name where the run's data is now with --data)")) from None
    for run in runs:
        names = run.info.get("label_names", list(dataset.classes))
        if list(names) != list(dataset.classes):
            odd = sorted(set(names) ^ set(dataset.classes)) or ["the order"]
            raise UserError(f"{run.folder} has other classes than {where}, such as {odd[0]!r}; report it by itself")
    ids, _ = read_predictions(_file(first, split), dataset.classes)
    rows = places(ids, index.batch.column("image_id"))
    if (rows < 0).any():
        raise UserError(
            f"{_file(first, split)} has image {ids[int(np.argmin(rows))].as_py()}, which is not in the split {split} "
            f"of {where}{did_you_mean(split, list(dataset.splits))}; give the --data it was scored on"
        )
    rows = np.sort(rows).astype(np.int64)
    truth = truth_of_rows(f"{where}, split {split}", dataset, index, rows)
    return Subject(dataset, split, index, rows, truth, first.rule.get("zero_division", 0))


def scored(run: Run, subject: Subject) -> Scored:
    """Raises UserError where the run has not seen all images of the subject."""
    scores = probabilities_of([_file(run, subject.split)], subject.truth)
    predicted = thresholds.apply(scores, run.rule, subject.truth.classes)
    about = (subject.truth.target, subject.truth.groups, subject.zero_division)
    return Scored(run, scores, predicted, Scorecard(scores, predicted, *about))


def _file(run: Run, split: str) -> Path:
    return run.folder / "predictions" / f"{split}.csv"


def _need_scores(run: Run, split: str, data: str | None) -> None:
    if not _file(run, split).is_file():
        where = data or _data_of(run) or "DIR"
        raise UserError(
            f"{run.folder} has not been scored on {split}; first: "
            f"mlc eval --run {run.folder} --data {redact(where)} --split {split}"
        )


def _data_of(run: Run) -> str:
    """The data set the run validates on: the first of its --data, which older runs wrote as one text."""
    named = run.settings.get("data") or [""]
    return parse_data(str(named if isinstance(named, str) else named[0]))[0]
