"""What most people would train with instead: the recipe of ASL and ML-Decoder as one plain loop, to compare against.

Settings as published in the training scripts of both papers' repositories (Ridnik et al. 2021): images squeezed to the
square, Cutout of half a side, RandAugment, no flip and no random crop; Adam with a weight decay of 1e-4 that spares
biases and norms; one cycle with 20 % of warm-up; a sum of ASL(4, 0, 0.05) or of binary cross-entropy over the batch; no
clipping; raw and averaged weights are validated. Of the average's decay, published as 0.9997 for hundreds of thousands
of steps, several values are kept side by side, so that a short run can report its best. Pixels are normalised as the
backbone was trained, which for the published ones means not at all.

It shares no code with the package: torchvision's transforms on PIL images, timm's loss, torch's optimizer and schedule.
"""

import csv
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

LOSSES = {
    "asl": AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05),
    "bce": nn.BCEWithLogitsLoss(reduction="sum"),
}


class Cutout:
    """A square of `factor` of the side at a random place, clipped by the border, in one random colour."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        half_w, half_h = int(self.factor * width / 2 + 0.5), int(self.factor * height / 2 + 0.5)
        x, y = random.randrange(width), random.randrange(height)
        colour = tuple(random.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).rectangle([x - half_w, y - half_h, x + half_w, y + half_h], fill=colour)
        return image


class Images(Dataset):
    """Rows of a CSV with ImageID and Labels: (float [3, H, W], float [C])."""

    def __init__(self, table: Path, images: Path, classes: Sequence[str], transform):
        with table.open() as file:
            self.rows = [(row["ImageID"], row["Labels"].split()) for row in csv.DictReader(file)]
        self.images, self.classes, self.transform = images, classes, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name, labels = self.rows[index]
        with Image.open(self.images / name) as image:
            pixels = self.transform(image.convert("RGB"))
        return pixels, torch.tensor([float(name in labels) for name in self.classes])


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    spared = [p for name, p in model.named_parameters() if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim == 1 or name.endswith(".bias"))]
    return [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for mine, theirs in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(decay * mine + (1 - decay) * theirs)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader) -> np.ndarray:
    """Probabilities, float32 [N, C]."""
    model.eval()
    return torch.cat([model(image).sigmoid() for image, _ in loader]).numpy()


def train(
    model: nn.Module,
    data: Path,
    classes: Sequence[str],
    *,
    size: int,
    batch_size: int,
    steps: int,
    lr: float,
    loss: str,
    seed: int,
    ema_decays: Sequence[float],
) -> dict[str, np.ndarray]:
    """{weights: probabilities of val.csv, float32 [N, C]} of the raw weights and of each average after `steps` steps.

    `data` is a folder of `mlc demo-data`: train.csv, val.csv and images/; `model` comes with its own mean and std.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    normalised = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    squeezed = transforms.Resize((size, size))
    augmented = transforms.Compose([squeezed, Cutout(0.5), transforms.RandAugment(), *normalised])
    training = Images(data / "train.csv", data / "images", classes, augmented)
    validation = Images(data / "val.csv", data / "images", classes, transforms.Compose([squeezed, *normalised]))
    batches = endless(DataLoader(training, batch_size, shuffle=True, drop_last=True))
    criterion = LOSSES[loss]
    optimizer = torch.optim.Adam(groups(model, 1e-4), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
    averages = {decay: deepcopy(model) for decay in ema_decays}
    model.train()
    for _ in range(steps):
        image, target = next(batches)
        optimizer.zero_grad()
        criterion(model(image), target).backward()
        optimizer.step()
        schedule.step()
        for decay, averaged in averages.items():
            average(averaged, model, decay)
    weights = {"raw": model} | {f"ema {decay}": averaged for decay, averaged in averages.items()}
    return {name: predict(model, DataLoader(validation, 100)) for name, model in weights.items()}
