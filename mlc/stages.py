"""A run in parts (`stages:` in YAML): train the head alone, then everything, then the tags with another loss.

A part is the run's settings with some of them replaced. At its end the run writes a checkpoint and builds itself anew
from that: weights, their average and `samples_seen` go on, the optimizer begins again, since what it optimises is
another thing. A run that is resumed across a boundary therefore takes the very same way as one that was never stopped.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from mlc.config import Config
from mlc.flags import convert_field, documented_fields
from mlc.optim.schedule import parse_duration
from shards.console import UserError, did_you_mean

BANNERS = ("Optimisation", "Loss", "Augmentation")  # whose settings a stage may replace, and
MORE = ("freeze", "drop", "drop_path", "grad_checkpointing", "eval_every", "threshold")
MORE += ("text_lr_mult", "text_layer_decay", "word_dropout", "caption_dropout", "mix_captions")
NOT = ("amp_dtype", "model_ema")  # of a whole run


@dataclass(frozen=True)
class Stage:
    """`config`: the run's with the stage's own settings; `begin`, `end`: samples, multiples of the global batch.

    `total`: samples of the whole run.
    """

    number: int
    config: Config
    begin: int
    end: int
    total: int

    @property
    def last(self) -> bool:
        return self.end == self.total


def configs(config: Config) -> list[Config]:
    """The settings of each stage; [config] for a run without stages.

    Raises:
        UserError: a setting that a stage cannot have, naming stage and setting.
    """
    if not config.stages:
        return [config]
    found = []
    for number, given in enumerate(config.stages, 1):
        own = {name.replace("-", "_"): value for name, value in given.items() if name != "for"}
        try:
            found.append(replace(config, **{name: _checked(name, value) for name, value in own.items()}))
        except UserError as error:
            raise UserError(f"stage {number}: {error}") from None
        if "for" not in given and number < len(config.stages):
            raise UserError(f"stage {number}: needs `for: 2ep`, its duration; only the last stage may take the rest")
    return found


def _checked(name: str, value: Any) -> Any:
    fields = documented_fields(Config)
    allowed = [*MORE, *(field for banner in BANNERS for field in fields[banner] if field not in NOT)]
    if name not in allowed:
        raise UserError(
            f"{name} cannot be a stage's{did_you_mean(name, allowed)}; a stage has `for`, freeze, and settings of "
            "optimisation, loss and augmentation"
        )
    try:
        return convert_field(name, value)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def lay_out(config: Config, *, epoch_samples: int, global_batch: int) -> list[Stage]:
    """All stages of a run, one after the other. A run without `stages` is one.

    `--epochs` or `--max-steps` is the length of the run where the last stage has no `for`, else the stages' sum is.

    Raises:
        UserError: a duration that is none, or stages that leave the last one nothing.
    """

    def steps(text: Any) -> int:
        return max(1, -(-parse_duration(text, epoch_samples=epoch_samples, global_batch=global_batch) // global_batch))

    own = configs(config)
    whole = config.max_steps or max(1, math.ceil(config.epochs * epoch_samples / global_batch))
    lengths = []
    for number, given in enumerate(config.stages or [{}], 1):
        try:
            lengths.append(steps(given["for"]) if "for" in given else whole - sum(lengths))
        except UserError as error:
            raise UserError(f"stage {number}: for: {error}") from None
    if lengths[-1] < 1:
        raise UserError(
            f"the stages before the last take {sum(lengths[:-1])} steps, the run has {whole}: more --epochs or "
            "--max-steps, or `for` of the last stage"
        )
    ends = [sum(lengths[: i + 1]) * global_batch for i in range(len(lengths))]
    begins = [0, *ends[:-1]]
    return [Stage(i, c, begin, end, ends[-1]) for i, (c, begin, end) in enumerate(zip(own, begins, ends, strict=True))]


def at(stages: list[Stage], samples_seen: int) -> Stage:
    """The stage that the next sample belongs to; the last one for a run that is at its end."""
    return next((stage for stage in stages if samples_seen < stage.end), stages[-1])
