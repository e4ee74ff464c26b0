"""Who is compared on real data: each side takes a task and a seed and returns probabilities of val.csv and test.csv.

`bare` and `recipe` are `train.py` and `mlc predict` as a user types them, `fit` is `mlc fit`, all in processes of their
own. `loop45` is the loop of a tutorial. `sklearn` is logistic regression on what the frozen backbone makes of the
images. `constant` answers every image with the share of each label in train.csv, so that a threshold tuned on val.csv
picks the best constant set of the commonest labels. All see the same images, weights, image size and number of passes
(`fit --time` as many as it has time for), and rows come in the order of the CSV. A side more is one function and a line
in `SIDES`.
"""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import peer_loop
import real_data
import timm
import torch
import weights
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision import transforms

from mlc.data.prediction_files import read_predictions
from shards.console import UserError

ROOT = Path(__file__).parents[1]
EVALUATED = ("val", "test")
Predictions = dict[str, np.ndarray]  # probabilities float [N, C] of each evaluated split


@dataclass(frozen=True)
class Task:
    """`data` is a folder of benchmarks/real_data.py, `shards` the same packed; what sides write goes below `out`."""

    data: Path
    shards: Path
    weights: Path
    out: Path
    size: int
    epochs: int

    @cached_property
    def classes(self) -> list[str]:
        return sorted({label for row in real_data.read(self.data, "train") for label in row["Labels"].split()})

    def names(self, split: str) -> list[str]:
        return [row["ImageID"] for row in real_data.read(self.data, split)]

    def target(self, split: str) -> np.ndarray:
        """bool [N, C]"""
        rows = [row["Labels"].split() for row in real_data.read(self.data, split)]
        return np.array([[name in labels for name in self.classes] for labels in rows])

    def images(self, split: str, transform) -> peer_loop.Images:
        return peer_loop.Images(self.data / f"{split}.csv", self.data / "images", self.classes, transform)


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(task: Task, seed: int, *, name: str, flags: tuple[str, ...] = ()) -> Predictions:
    """A run with these flags and no others, and the best weights of it."""
    run = task.out / f"{name}-{seed}"
    data = ["--data", task.shards, "--model", weights.MODEL, "--pretrained-path", task.weights]
    length = ["--img-size", task.size, "--epochs", task.epochs, "--seed", seed]
    _python("train.py", *flags, *data, *length, "--output", run.parent, "--experiment", run.name)
    return {split: _predicted(task, run, split) for split in EVALUATED}


def fit(task: Task, seed: int, *, flags: tuple[str, ...] = ()) -> Predictions:
    """`mlc fit`: the probabilities of the stage that is best on val.csv; as many passes as the others have, unless the
    flags say how long it may take."""
    out = task.out / _folder(f"fit {' '.join(flags)} {seed}")
    model = ["--model", weights.MODEL, "--pretrained-path", task.weights, "--img-size", task.size]
    length = [] if {"--time", "--epochs"} & set(flags) else ["--epochs", task.epochs]
    _python("-m", "mlc", "fit", "--data", task.shards, *model, *length, "--seed", seed, *flags, "--out", out)
    best = max(json.loads((out / "fit.json").read_text())["results"], key=lambda stage: stage["value"])
    return {split: _in_order(task, split, out / best["predictions"] / f"{split}.csv") for split in EVALUATED}


def _predicted(task: Task, run: Path, split: str) -> np.ndarray:
    out = run / f"predictions-{split}"
    _python("-m", "mlc", "predict", "--run", run, "--data", task.shards, "--split", split, "--out", out)
    return _in_order(task, split, out / f"{split}.csv")


def _in_order(task: Task, split: str, file: Path) -> np.ndarray:
    names, probabilities = read_predictions(file, task.classes)
    row = {name: i for i, name in enumerate(names.to_pylist())}
    return probabilities[[row[name] for name in task.names(split)]]


def _python(*command) -> None:
    command = [str(word) for word in command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise UserError(f"'python {' '.join(command)}' ended with {done.returncode}: {said[-1]}")


# ---- others ----------------------------------------------------------------------------------------------------------


def constant(task: Task, seed: int) -> Predictions:
    share = task.target("train").mean(0)
    return {split: np.tile(share, (len(task.names(split)), 1)) for split in EVALUATED}


def sklearn(task: Task, seed: int) -> Predictions:
    """One-vs-rest logistic regression, scikit-learn's defaults but for the number of iterations."""
    model = backbone(task, classes=0).eval()
    plain = plain_transform(task, model)
    features = {split: _features(model, task.images(split, plain)) for split in ("train", *EVALUATED)}
    scaler = StandardScaler().fit(features["train"])
    classifier = OneVsRestClassifier(LogisticRegression(max_iter=1000, random_state=seed))
    classifier.fit(scaler.transform(features["train"]), task.target("train"))
    return {split: classifier.predict_proba(scaler.transform(features[split])) for split in EVALUATED}


@torch.no_grad()
def _features(model: nn.Module, images: peer_loop.Images) -> np.ndarray:
    return torch.cat([model(image) for image, _ in DataLoader(images, 100)]).numpy()


def loop45(task: Task, seed: int, *, lr: float = 2e-3, batch_size: int = 16) -> Predictions:
    torch.manual_seed(seed)
    random.seed(seed)
    model = backbone(task, classes=len(task.classes))
    plain = plain_transform(task, model)
    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(task.size, scale=(0.35, 1)),
            transforms.ColorJitter(0.2, 0.2, 0.2),
            *plain.transforms[1:],
        ]
    )
    batches = DataLoader(task.images("train", augmented), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=task.epochs * len(batches))
    criterion = nn.BCEWithLogitsLoss()
    model.train()
    for _ in range(task.epochs):
        for image, target in batches:
            optimizer.zero_grad()
            criterion(model(image), target).backward()
            optimizer.step()
            schedule.step()
    return {split: peer_loop.predict(model, DataLoader(task.images(split, plain), 100)) for split in EVALUATED}


def backbone(task: Task, classes: int) -> nn.Module:
    """timm's own module with the task's weights and a new classifier; without one for 0 classes."""
    model = timm.create_model(weights.MODEL, num_classes=classes)
    state = {name: value for name, value in load_file(task.weights).items() if not name.startswith("classifier")}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"classifier.weight", "classifier.bias"}, missing
    return model


def plain_transform(task: Task, model: nn.Module) -> transforms.Compose:
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    squeezed = transforms.Resize((task.size, task.size))
    return transforms.Compose([squeezed, transforms.ToTensor(), transforms.Normalize(mean, std)])


# ---- by name ---------------------------------------------------------------------------------------------------------

SIDES: dict[str, Callable[[Task, int], Predictions]] = {
    "constant": constant,
    "sklearn": sklearn,
    "bare": partial(ours, name="bare"),
    "fit": fit,
    "loop45": loop45,
}


def side(name: str) -> Callable[[Task, int], Predictions]:
    """A side of `SIDES`, or any recipe as `recipe:NAME`; flags may follow `bare`, `fit` and a recipe.

    Raises UserError.
    """
    first, *flags = shlex.split(name)
    kind, _, recipe = first.partition(":")
    if kind == "recipe" and recipe:
        return partial(ours, name=_folder(name), flags=("-c", recipe, *flags))
    if first == "bare" and flags:
        return partial(ours, name=_folder(name), flags=tuple(flags))
    if first == "fit":
        return partial(fit, flags=tuple(flags))
    if name not in SIDES:
        raise UserError(f"there is no side {name!r}: choose among {', '.join(SIDES)} and recipe:NAME")
    return SIDES[name]


def _folder(name: str) -> str:
    return re.sub("[^a-zA-Z0-9.]+", "-", name)
