"""Everything that depends on how far a run is, as functions of `samples_seen`; durations are converted once, here.

The one thing that hangs on the wall clock is when a checkpoint is due (`10min`): it changes nothing that is computed.
"""

import functools
import math
import time

from mlc.config import Config, flag
from mlc.optim.ema import decay_at
from mlc.optim.schedule import lr_at, parse_duration, parse_minutes
from mlc.stages import Stage
from shards.console import UserError


class Clock:
    """The length of a run, the learning rate of one of its stages, and its recurring events.

    Attributes:
        total: samples of the whole run.
        mixup_off: samples after which nothing is mixed any more.
        lr: samples_seen -> learning rate. Its durations count from the stage's beginning, all others from the run's.
    """

    def __init__(self, stage: Stage, epoch_samples: int, global_batch: int):
        config = stage.config
        self.epoch_samples, self.global_batch, self.total = epoch_samples, global_batch, stage.total
        self._durations = functools.partial(parse_duration, epoch_samples=epoch_samples, global_batch=global_batch)
        self._minutes, self._last_due = parse_minutes(config.checkpoint_every), time.monotonic()
        recurring = ("eval_every", "swa_every") if self._minutes else ("eval_every", "swa_every", "checkpoint_every")
        self._every = {name: self._samples(config, name) for name in recurring}
        self.mixup_off = self._samples(config, "mixup_off") if config.mixup_off else math.inf
        self._swa_start = self._samples(config, "swa_start", self.total) if config.swa_start else math.inf
        self._ema = config.model_ema_decay, config.model_ema_warmup
        length = stage.end - stage.begin
        self._lr = functools.partial(
            lr_at,
            base_lr=config.lr,
            total=length,
            warmup=self._samples(config, "warmup", length),
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            sched=config.sched,
            decay_every=self._samples(config, "decay_every"),
            decay_at=[self._duration("decay_at", text, length) for text in config.decay_at],
            decay_rate=config.decay_rate,
        )
        self._begin = stage.begin
        self.lr(stage.begin)  # a schedule that lacks a setting is refused now

    def lr(self, samples_seen: int) -> float:
        return self._lr(samples_seen - self._begin)

    def steps_left(self, samples_seen: int) -> int:
        return max(0, -(-(self.total - samples_seen) // self.global_batch))

    def averaging(self, samples_seen: int, *, updates: int, in_mean: int) -> float | None:
        """The decay of the averaged weights after a step, None where they stay as they are.

        That of the moving average after so many `updates`; from --swa-start on, at each --swa-every (once a step at
        most), the one that makes the plain mean of the weights at these moments: k / (k + 1) where k of them are
        `in_mean` (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization").
        """
        if not self.in_swa(samples_seen):
            decay, warmup = self._ema
            return decay_at(updates, decay, warmup)
        since, every = samples_seen - self._swa_start, self._every["swa_every"]
        due = since // every > max(0, since - self.global_batch) // every
        return in_mean / (in_mean + 1) if due else None

    def in_swa(self, samples_seen: int) -> bool:
        """Whether the average is a plain mean by now."""
        return samples_seen > self._swa_start

    def _samples(self, config: Config, name: str, total: int | None = None) -> int:
        """The samples of a duration; what recurs must be longer than nothing."""
        samples = self._duration(name, getattr(config, name), total)
        if samples < 1 and name.endswith("_every"):
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be longer than nothing; 1ep is an epoch")
        return samples

    def _duration(self, name: str, text: str, total: int | None) -> int:
        try:
            return self._durations(text, total=total)
        except UserError as error:
            raise UserError(f"{flag(name)}: {error}") from None

    def epoch(self, samples_seen: int) -> float:
        return samples_seen / self.epoch_samples

    def passed(self, event: str, samples_seen: int) -> bool:
        """Whether the last step reached or crossed a multiple of the event's interval; never, if that is in minutes."""
        every = self._every.get(event, math.inf)
        return samples_seen // every > (samples_seen - self.global_batch) // every

    def checkpoint_due(self) -> bool:
        """Whether the minutes of `--checkpoint-every` have passed since this was last true.

        Clocks differ: one process asks, and all act on its answer.
        """
        if not self._minutes or time.monotonic() - self._last_due < 60 * self._minutes:
            return False
        self._last_due = time.monotonic()
        return True
