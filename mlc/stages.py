"""A run in parts (`stages:` in YAML): train the head alone, then everything, then the tags with another loss.

A part is the run's settings with some of them replaced. At its end the run writes a checkpoint and builds itself anew
from that: weights, their average and `samples_seen` go on, the optimizer begins again, since what it optimises is
another thing. A run that is resumed across a boundary therefore takes the very same way as one that was never stopped.

Where a stage ended is known only afterwards: `--patience` may end it early, and steps of another size after a resume
end it elsewhere. So a checkpoint says where each stage before its own ended, and the next begins there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlc.config import Config
from mlc.flags import convert_field, documented_fields
from mlc.optim.schedule import parse_duration
from shards.console import UserError, did_you_mean

BANNERS = ("Optimisation", "Loss", "Augmentation")  # whose settings a stage may replace, and
MORE = ("img_size", "freeze", "drop", "drop_path", "grad_checkpointing", "eval_every", "threshold")
MORE += ("text_lr_mult", "text_layer_decay", "word_dropout", "caption_dropout", "mix_captions")
NOT = ("amp_dtype", "model_ema")  # of a whole run


@dataclass(frozen=True)
class Stage:
    """`config`: the run's with the stage's own settings; `begin`, `end`: samples; `first_step`: optimizer steps of the
    run before the stage; `total`: samples of the whole run.
    """

    number: int
    config: Config
    begin: int
    end: int
    total: int
    first_step: int = 0

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
            f"{name} cannot be a stage's{did_you_mean(name, allowed)}; a stage has `for`, img_size, freeze, and "
            "settings of optimisation, loss and augmentation"
        )
    try:
        return convert_field(name, value)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def lay_out(
    config: Config, *, epoch_samples: int, global_batch: int, ended: Sequence[tuple[int, int]] = ()
) -> list[Stage]:
    """All stages of a run, one after the other. A run without `stages` is one.

    `--epochs` or `--max-steps` is the length of the run where the last stage has no `for`, else the stages' sum is.
    ended: (step, samples seen) at the end of each stage that is over, the first ones.

    Raises:
        UserError: a duration that is none, or stages that leave the last one nothing.
    """

    def samples(text: Any) -> int:
        """Of whole steps, at least one."""
        found = parse_duration(text, epoch_samples=epoch_samples, global_batch=global_batch)
        return max(1, -(-found // global_batch)) * global_batch

    own = configs(config)
    whole = (config.max_steps or max(1, math.ceil(config.epochs * epoch_samples / global_batch))) * global_batch
    past, stages, begin, first_step = ended[: len(own) - 1], [], 0, 0
    for number, given in enumerate(config.stages or [{}]):
        try:
            end = begin + samples(given["for"]) if "for" in given else whole
        except UserError as error:
            raise UserError(f"stage {number + 1}: for: {error}") from None
        after = first_step + (end - begin) // global_batch
        if number < len(past):
            after, end = past[number]
        if end <= begin and not past:
            raise UserError(
                f"the stages before the last take {first_step} steps, the run has {whole // global_batch}: more "
                "--epochs or --max-steps, or `for` of the last stage"
            )
        stages.append(Stage(number, own[number], begin, end, total=0, first_step=first_step))
        first_step, begin = after, end
    return [replace(stage, total=end) for stage in stages]


def at(stages: list[Stage], samples_seen: int, ended: Sequence[tuple[int, int]] = ()) -> Stage:
    """The stage that the next sample belongs to; the last one for a run that is at its end."""
    return next((stage for stage in stages[len(ended) :] if samples_seen < stage.end), stages[-1])
