"""Exact metrics while training: on all ranks alike, so that all agree on which weights are the best so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from mlc.captions import decodes_images
from mlc.config import Config
from mlc.data.captions import EvalCaptions
from mlc.data.dataset import BadSamples, EvalDataset
from mlc.data.features import Features
from mlc.data.reader import TarReader
from mlc.data.transforms import EvalTransform
from mlc.inference import logits_of_rows, non_finite, probabilities
from mlc.metrics import multilabel
from mlc.optim.losses import Loss
from shards.console import UserError
from shards.dataset import Dataset


@dataclass(frozen=True)
class Evaluation:
    """`metrics` {name: value}; `rows` int64 [M] of the split that could be read and their `scores` float32 [M, C]."""

    metrics: dict[str, float]
    rows: np.ndarray
    scores: np.ndarray


def evaluate(
    models: dict[str, torch.nn.Module],
    reader: TarReader,
    rows: np.ndarray,
    config: Config,
    dataset: Dataset,
    accelerator: Accelerator,
    loss_fn: Loss,
    mean: Sequence[float],
    std: Sequence[float],
    bad: BadSamples,
    captions: EvalCaptions | None = None,
    features: Features | None = None,
    step: int = 0,
) -> dict[str, Evaluation]:
    """Exact metrics of some rows of a split, {model: evaluation}, the same on every rank; images are decoded once.

    Images that cannot be read are named, counted in `bad` and left out.

    Raises:
        UserError: a logit is not finite, so that it has no rank and the weights are no good.
    """
    logits = np.empty((len(models), len(rows), len(dataset.classes)), np.float32)
    seen = np.zeros(len(rows), bool)
    transform = EvalTransform(size=config.img_size, crop=config.val_crop, crop_pct=config.crop_pct, mean=tuple(mean))
    for found, values in logits_of_rows(
        list(models.values()),
        EvalDataset(reader, transform, rows, captions=captions, features=features, images=decodes_images(config)),
        accelerator,
        batch_size=config.validation_batch_size or config.batch_size,
        workers=min(config.workers, 2),
        mean=mean,
        std=std,
        bad=bad,
    ):
        place = np.searchsorted(rows, found)
        logits[:, place] = values[:, :, 0].swapaxes(0, 1)
        seen[place] = True
    target = reader.index.targets(rows[seen])
    results = {}
    for name, own in zip(models, logits[:, seen], strict=True):
        if found := non_finite(own, rows[seen], reader, dataset.classes):
            raise UserError(
                f"step {step}, evaluation of {name}: {found}. Try --amp-dtype none or bf16, a lower --lr or "
                "--clip-grad 1, and --resume with the last checkpoint whose evaluation was good"
            )
        loss = loss_fn(torch.from_numpy(own), torch.from_numpy(target)).double().mean().item()
        scores = probabilities(own[:, None])
        named = multilabel.evaluate(scores, target, threshold=config.threshold, groups=dataset.group_columns)
        results[name] = Evaluation({"loss": loss, **dict(named)}, rows[seen], scores)
    return results


def refuse_unknown_metric(config: Config, dataset: Dataset) -> None:
    """Raises UserError at the start, not after the first epoch, for an `--eval-metric` that nothing measures."""
    nothing = np.zeros((1, len(dataset.classes)), np.float32)
    measured = ["loss", *(name for name, _ in multilabel.evaluate(nothing, nothing, groups=dataset.group_columns))]
    if config.eval_metric not in measured:
        raise UserError(f"--eval-metric {config.eval_metric} is not measured; choose one of {', '.join(measured)}")


def goodness(metrics: dict[str, float] | None, metric: str) -> float:
    """What `--eval-metric` ranks weights by: higher is better."""
    if metrics is None:
        return -math.inf
    return -metrics[metric] if metric == "loss" else metrics[metric]
