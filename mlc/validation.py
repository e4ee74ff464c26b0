"""Exact metrics while training, computed by the first process and told to all: a sum of floats depends on the number
of threads, and processes that disagree about the best weights by one bit wait for each other for ever.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mlc.captions import decodes_images
from mlc.config import Config
from mlc.data.captions import EvalCaptions
from mlc.data.dataset import BadSamples, EvalDataset
from mlc.data.features import Features
from mlc.data.reader import TarReader
from mlc.data.sources import Sources
from mlc.data.transforms import EvalTransform
from mlc.inference import logits_of_rows, non_finite, probabilities
from mlc.metrics import constant, decision_rules, multilabel, thresholds
from mlc.metrics.threshold_search import Metric
from mlc.optim.losses import Loss
from mlc.parallel import agree
from shards.console import UserError, did_you_mean, say, shown
from shards.dataset import Dataset, Index


@dataclass(frozen=True)
class Evaluation:
    """`metrics` {name: value}, the same on every process; on the first one also `rows` int64 [M] of the split that
    could be read and their `scores` float32 [M, C], elsewhere nothing."""

    metrics: dict[str, float]
    rows: np.ndarray | None = None
    scores: np.ndarray | None = None


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
    """Exact metrics of some rows of a split, {model: evaluation}; every process calls it, images are decoded once.

    Images that cannot be read are named, counted in `bad` and left out. A logit that is not finite has no rank: its
    image and class are named, and no metric of that model has a value.
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
    results: dict[str, Evaluation] = {}

    def judge() -> dict[str, dict[str, float]]:
        target = reader.index.targets(rows[seen])
        for name, own in zip(models, logits[:, seen], strict=True):
            scores = probabilities(own[:, None])
            if found := non_finite(own, rows[seen], reader, dataset.classes):
                say(
                    f"step {step}, evaluation of {name}: {found}, so no metric has a value. Try --amp-dtype bf16 or "
                    "none, a lower --lr or --clip-grad 1"
                )
                metrics = dict.fromkeys(score_names(dataset), math.nan) | {"threshold": config.threshold}
            else:
                metrics = _measured(own, scores, target, config, dataset, loss_fn)
            results[name] = Evaluation(metrics, rows[seen], scores)
        return {name: result.metrics for name, result in results.items()}

    told = agree.from_first(judge)
    return results or {name: Evaluation(metrics) for name, metrics in told.items()}


def _measured(
    logits: np.ndarray, scores: np.ndarray, target: np.ndarray, config: Config, dataset: Dataset, loss_fn: Loss
) -> dict[str, float]:
    loss = loss_fn(torch.from_numpy(logits), torch.from_numpy(target)).double().mean().item()
    how = {"groups": dataset.group_columns, "zero_division": config.zero_division}
    named = multilabel.evaluate(scores, target, config.threshold, **how)
    return {"loss": loss, **dict(named)}


def decision_rule(
    evaluation: Evaluation | None, index: Index | None, config: Config, dataset: Dataset
) -> dict[str, Any]:
    """The `thresholds.json` of weights with this evaluation on rows of `index`, on the first process; --threshold
    where there is none, or its scores are no numbers."""
    if evaluation is None or not np.isfinite(evaluation.scores).all():
        metric = Metric.of("f1_samples", config.zero_division)
        return metric.described | {"global": config.threshold, "value": math.nan}
    target = index.targets(evaluation.rows) > 0.5
    return decision_rules.chosen(evaluation.scores, target, dataset.classes, config.zero_division)


# ---- what needs no model ---------------------------------------------------------------------------------------------


@dataclass
class Standing:
    """How a run stands to what needs no model, for the log of the first process.

    `labels`, `f1`: always the so many commonest labels of training, the number that is best on the validation samples,
    and their sample-F1; `chance`: mAP of scores that say nothing; `never_bare`: every training sample has a label;
    `bare`: (samples that get no label by the run's `rule`, of how many) of the best weights, once they were seen.
    """

    labels: int
    f1: float
    chance: float
    never_bare: bool
    bare: tuple[int, int] | None = None
    rule: str = ""

    @classmethod
    def of(cls, config: Config, sources: Sources, index: Index, rows: np.ndarray) -> "Standing":
        """For those rows of the validation split."""
        columns, owner = index.labels_of(rows)
        found = constant.best_constant(sources.natural, columns, owner, len(rows), config.zero_division)
        counted = [
            part.index.labels_per_row()[slice(None) if part.rows is None else part.rows]
            for part in sources.sampler.sources
        ]
        return cls(*found, constant.chance_map(columns, len(rows)), all(each.all() for each in counted))

    def keep(self, evaluation: Evaluation, rule: Mapping[str, Any]) -> None:
        """That of the best weights so far; `rule`: their thresholds.json."""
        predicted = thresholds.apply(evaluation.scores, rule)
        self.bare, self.rule = (int((~predicted.any(1)).sum()), len(predicted)), thresholds.describe(rule)

    def lines(self, best: Mapping[str, float | None]) -> list[str]:
        """One about the best metrics, and warnings."""
        own = {"F1 samples": (best["f1_samples@tuned"], self.f1), "mAP": (best["map"], self.chance)}
        said = [
            f"without a model: F1 samples {shown(self.f1)} of always the {self.labels} commonest labels, mAP "
            f"{shown(self.chance)} by chance; with it: {shown(own['F1 samples'][0])} tuned, {shown(own['mAP'][0])}"
        ]
        below = [name for name, (value, floor) in own.items() if value is not None and value <= floor]
        if below:
            said.append(
                f"warning: {' and '.join(below)} not above what needs no model; if it stays so, try another --lr, a "
                "shorter --warmup, more --epochs or --pretrained"
            )
        if self.bare and self.never_bare:
            said += multilabel.left_empty(*self.bare, f"the {self.rule}", "training sample")
        return said


# ---- the metric that chooses the best weights ------------------------------------------------------------------------


def score_names(dataset: Dataset) -> list[str]:
    """What `--eval-metric` may be: all that is measured and says how good a model is."""
    return ["loss", *multilabel.score_names(dataset.group_columns)]


def refuse_unknown_metric(metric: str, dataset: Dataset, option: str = "--eval-metric") -> None:
    """Raises UserError at the start, not after the first epoch, for a metric that ranks no weights."""
    names = score_names(dataset)
    if metric not in names:
        known = f"{did_you_mean(metric, names)}; choose one of {', '.join(names)}"
        what = "is a setting and no score" if metric == "threshold" else "is not measured"
        raise UserError(f"{option} {metric} {what}{known}")


def notes(config: Config, dataset: Dataset, index: Index, rows: np.ndarray) -> list[str]:
    """Lines for the start of a run about the labels of the rows that it validates on: where none says
    anything of `--eval-metric`, so that mAP has no value and every F1 is the same, and where rows have none."""
    metric = config.eval_metric
    group = metric.partition("/")[2]
    counted = dataset.group_columns.get(group, range(len(dataset.classes)))
    columns, owner = index.labels_of(rows)
    if metric == "loss" or np.isin(columns, counted).any():
        labelled = np.bincount(owner, minlength=len(rows))[:, None] > 0
        return multilabel.unlabelled(labelled, config.zero_division)
    of_group = f" of the group {group}" if group else ""
    return [
        f"--eval-metric {metric}: no validation sample has a label{of_group}, so it says nothing of any weights: best/ "
        "keeps those of the first evaluation. Validate on labelled samples, or choose --eval-metric loss"
    ]


def goodness(metrics: Mapping[str, float | None] | None, metric: str) -> float:
    """What `--eval-metric` ranks weights by: higher is better. None, no evaluation, is below all others.

    A metric without a value (NaN, and null once it was in a file) is below every value, but above no
    evaluation: so the first evaluation of a run is always kept, and `best/` is there whatever it came to.
    """
    if metrics is None:
        return -math.inf
    value = metrics[metric]
    if value is None or not math.isfinite(value):
        return -sys.float_info.max
    return -value if metric == "loss" else value
