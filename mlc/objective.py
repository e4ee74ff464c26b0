"""What a training step minimises: the losses of the labels and of the teachers, summed over a micro-batch.

Losses keep one value per sample and class (mlc/optim/losses.py); how classes weigh against each other, which of them
take part and what a teacher adds is put together here, from the settings.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mlc.captions import Reading, decodes_images, model_inputs
from mlc.config import Config
from mlc.data.dataset import Batch
from mlc.data.mixing import Mix
from mlc.data.prediction_files import is_prediction_file
from mlc.data.sampler import Sampler
from mlc.models.features import FeaturePair
from mlc.models.teacher import Teacher, open_teachers
from mlc.optim.distill import combine, distill_loss, feature_loss, larger, soften, soften_probabilities
from mlc.optim.losses import LOSSES, Loss, class_weights, pos_weights, smooth
from shards.console import UserError, did_you_mean
from shards.dataset import Dataset

Groups = Mapping[str, Sequence[int]]  # the columns of each group's classes


@dataclass(frozen=True)
class ClassCounts:
    """How often classes come in an epoch of the stream: `positives` float64 [C] of `samples`."""

    positives: np.ndarray
    samples: float

    @classmethod
    def of(cls, config: Config, sampler: Sampler) -> "ClassCounts | None":
        """None where no setting asks for them: counting takes a while where rows are many."""
        weighing = (config.weighted_loss, config.pos_weight) != ("none", "none")
        if not weighing and "db" not in (config.loss, *config.group_loss.values()):
            return None
        return cls(sampler.expected_frequencies() * sampler.epoch_samples, sampler.epoch_samples)

    def frequencies(self) -> np.ndarray:
        """float64 [C], inside (0, 1): a class of no sample has one, one of all samples all but one."""
        most = max(self.samples, 2)
        return self.positives.clip(1, most - 1) / most


def make_loss(config: Config, groups: Groups, counts: ClassCounts | None = None, *, pos_weight: bool = False) -> Loss:
    """The loss of `--loss`, and for the columns of a group its `--group-loss`: logits [B, C], target [B, C] -> float32
    [B, C].

    counts: for the losses that look at them; pos_weight: with the weights of `--pos-weight`, which need them too.

    A loss that looks at several classes at once sees those that share it, and with `--groups` the trained ones apart
    from the others. A class in two groups takes the loss of the last one.

    Raises:
        UserError: a group or a loss that does not exist.
    """
    _refuse_unknown("--group-loss", config.group_loss, groups, "group")
    _refuse_unknown("--group-loss", config.group_loss.values(), LOSSES, "loss")
    _refuse_unknown("--groups", config.groups, groups, "group")

    def counted(name: str, own: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """What a loss of those columns has from the counts, on the device."""
        found = {}
        if name == "db":
            found["frequencies"] = torch.tensor(counts.frequencies()[own], dtype=torch.float32)
        if pos_weight and config.pos_weight != "none":
            how = counts.samples, config.pos_weight_max, config.pos_weight_power
            found["pos_weight"] = pos_weights(torch.tensor(counts.positives[own]), *how)
        return {key: value.to(device) for key, value in found.items()}

    @functools.lru_cache(maxsize=4)
    def parts(classes: int, device: torch.device) -> list[tuple[Tensor, Loss]]:
        """Copied to the device once: each copy of fresh indices would wait for it."""
        names, trained = dict.fromkeys(range(classes), config.loss), set(trained_columns(config, groups, classes))
        names |= {column: name for group, name in config.group_loss.items() for column in groups[group]}
        columns = defaultdict(list)
        for column, name in names.items():
            columns[name, column in trained].append(column)
        return [
            (torch.tensor(own, device=device), _loss(config, name, counted(name, own, device)))
            for (name, _), own in columns.items()
        ]

    def by_group(logits: Tensor, target: Tensor) -> Tensor:
        if len(each := parts(logits.shape[1], logits.device)) == 1:
            return each[0][1](logits, target)
        loss = torch.zeros(logits.shape, device=logits.device)
        for columns, own in each:
            value = own(logits.index_select(1, columns), target.index_select(1, columns))
            loss = loss.index_copy(1, columns, value)
        return loss

    return by_group


def _loss(config: Config, name: str, more: Mapping[str, Tensor]) -> Loss:
    """One loss with its settings, and `more` of them."""
    settings = {
        "focal": {"gamma": config.focal_gamma, "alpha": -1.0 if config.focal_alpha is None else config.focal_alpha},
        "asl": {"gamma_neg": config.asl_gamma_neg, "gamma_pos": config.asl_gamma_pos, "clip": config.asl_clip},
        "two-way": {"temperature": config.two_way_temp},
        "db": {
            "weight_map": config.db_map,
            "neg_scale": config.db_neg_scale,
            "bias": config.db_bias,
            "gamma": config.db_gamma,
            "smoothing": config.smoothing,
        },
        "soft-fbeta": {"beta": config.fbeta},
    }
    return functools.partial(LOSSES[name], **settings.get(name, {}), **more)


def trained_columns(config: Config, groups: Groups, classes: int) -> list[int]:
    """The columns that `--groups` leaves in the loss, ascending: by their number the caller divides."""
    if not config.groups:
        return list(range(classes))
    columns = sorted({column for group in config.groups for column in groups[group]})
    if not columns:
        raise UserError(f"--groups {' '.join(config.groups)}: there are no classes in it, so nothing to train")
    return columns


def loss_weights(config: Config, groups: Groups, counts: np.ndarray, device: torch.device) -> Tensor | None:
    """float32 [C], what each column of the loss is multiplied by; None where all are 1.

    counts [C]: positives of each class in an epoch. Class weights are 1 on average over the trained
    classes, and 1 for one without positives.

    Raises:
        UserError: a group that does not exist.
    """
    _refuse_unknown("--group-weight", config.group_weight, groups, "group")
    _refuse_unknown("--groups", config.groups, groups, "group")
    if config.weighted_loss == "none" and not config.groups and not config.group_weight:
        return None
    trained = trained_columns(config, groups, len(counts))
    weights = torch.zeros(len(counts))
    weights[trained] = 1
    if config.weighted_loss != "none":
        weights[trained] = class_weights(torch.tensor(counts[trained]), config.weighted_loss, config.weighted_beta)
    for group, factor in config.group_weight.items():
        weights[list(groups[group])] *= factor
    return weights.to(device)


def _refuse_unknown(option: str, names: Iterable[str], known: Iterable[str], kind: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            there = f"choose one of {', '.join(known)}" if known else f"the data set has no {kind}s"
            raise UserError(f"{option} {name}: no such {kind}{did_you_mean(name, known)}; {there}")


class Objective:
    """(model, image, target, batch, mix) -> (the loss summed over a micro-batch and its classes, logits [B, C]).

    The caller divides the sum once, by the samples of the global batch times the trained classes. A loss that is one
    number per sample (of features) counts once for each of them, so that it adds its mean over samples to the quotient.
    """

    def __init__(
        self,
        config: Config,
        *,
        loss: Loss,
        weighted: Loss | None = None,
        teachers: Sequence[Teacher] = (),
        student: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager],
        weights: Tensor | None = None,
        reading: Reading | None = None,
    ):
        """student: the bare model, before it is compiled or divided; for `--kd-feature` and `--mix-captions join`.
        loss: as it is measured, in evaluation too; weighted: as it is trained, with the weights of positives.
        weights: float32 [C], what each column of the loss counts, see `loss_weights`.
        reading: of the captions, if any.
        """
        self.loss, self._weighted, self.teachers = loss, weighted or loss, teachers
        self._config, self._weights, self._autocast, self._reading = config, weights, autocast, reading
        self._most_tokens = student.text.encoder.max_tokens if reading else None
        self._features = FeaturePair(student, teachers[0].model, config.seed) if config.kd_feature else None

    @classmethod
    def of(
        cls,
        config: Config,
        dataset: Dataset,
        sampler: Sampler,
        *,
        student: nn.Module,
        averaged: nn.Module | None,
        device: torch.device,
        normalization: tuple[Sequence[float], Sequence[float]],
        autocast: Callable[[], AbstractContextManager],
        reading: Reading | None = None,
    ) -> "Objective":
        """That of the settings, for the bare `student`, its average and what is drawn from the data.

        Raises:
            UserError: a group, loss or teacher that does not exist.
        """
        mean, std = normalization
        counts = ClassCounts.of(config, sampler)
        positives = counts.positives if counts else np.ones(len(dataset.classes))
        models = [name for name in config.kd_teacher if not is_prediction_file(name)]
        return cls(
            config,
            loss=make_loss(config, dataset.group_columns, counts),
            weighted=make_loss(config, dataset.group_columns, counts, pos_weight=True),
            weights=loss_weights(config, dataset.group_columns, positives, device),
            teachers=open_teachers(
                models,
                averaged=averaged,
                classes=dataset.classes,
                device=device,
                mean=mean,
                std=std,
                tokenizer=reading and reading.tokenizer,
                images=decodes_images(config),
            ),
            student=student,
            autocast=autocast,
            reading=reading,
        )

    def __call__(
        self, model: nn.Module, image: Tensor | None, target: Tensor, batch: Batch, mix: Mix | None
    ) -> tuple[Tensor, Tensor]:
        """`batch`: its `soft` labels and its captions are mixed here as the targets were, by `mix`."""
        config = self._config
        inputs = model_inputs(image, batch, mix, config, self._reading, self._most_tokens)
        with self._autocast():
            logits = model(*inputs)
            taught = [teacher(*inputs) for teacher in self.teachers]
        hard = smooth(target, config.smoothing)
        if not config.kd_teacher:
            loss = self._weighted(logits, hard)
        elif config.kd_rule == "max":
            loss = self._weighted(logits, larger(hard, _soft(taught, batch, mix, 1.0)))
        else:
            soft = _soft(taught, batch, mix, config.kd_temp)
            loss = combine(self._weighted(logits, hard), distill_loss(logits, soft, config.kd_temp), config.kd_alpha)
        if self._features:
            loss = loss + config.kd_feature * feature_loss(*self._features.take())[:, None]
        if self._weights is not None:
            loss = loss * self._weights
        return loss.sum(), logits


def _soft(taught: Sequence[Tensor], batch: Batch, mix: Mix | None, temperature: float) -> Tensor:
    """The mean of all teachers' probabilities at the temperature, [B, C]."""
    seen = [soften(logits, temperature) for logits in taught]
    if "soft" in batch:  # said about single images, so to be mixed as their labels are
        files = soften_probabilities(batch["soft"], temperature)
        seen += [mix.labels(labels) if mix else labels for labels in files.unbind(1)]
    return torch.stack(seen).mean(0)
