"""Everything that depends on how far a run is, as functions of `samples_seen`; durations are converted once, here.

The one thing that hangs on the wall clock is when a checkpoint is due (`10min`): it changes nothing that is computed.
"""

import functools
import math
import time

from mlc.config import Config, flag
from mlc.optim.schedule import lr_at, parse_duration, parse_minutes
from shards.console import UserError


class Clock:
    """The length of a run, its learning rate and its recurring events.

    Attributes:
        total: samples of the whole run, a multiple of the global batch.
        mixup_off: samples after which nothing is mixed any more.
        lr: samples_seen -> learning rate.
    """

    def __init__(self, config: Config, epoch_samples: int, global_batch: int):
        self._durations = functools.partial(parse_duration, epoch_samples=epoch_samples, global_batch=global_batch)
        self.epoch_samples, self.global_batch = epoch_samples, global_batch
        self.steps = config.max_steps or max(1, math.ceil(config.epochs * epoch_samples / global_batch))
        self.total = self.steps * global_batch
        self._minutes, self._last_due = parse_minutes(config.checkpoint_every), time.monotonic()
        recurring = (
            ("eval_every", "decay_every") if self._minutes else ("eval_every", "checkpoint_every", "decay_every")
        )
        self._every = {name: self._samples(config, name) for name in recurring}
        self.mixup_off = self._samples(config, "mixup_off") if config.mixup_off else math.inf
        self.lr = functools.partial(
            lr_at,
            base_lr=config.lr,
            total=self.total,
            warmup=self._samples(config, "warmup"),
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            sched=config.sched,
            decay_every=self._every["decay_every"],
            decay_rate=config.decay_rate,
        )

    def _samples(self, config: Config, name: str) -> int:
        """The samples of a duration; what recurs must be longer than nothing."""
        try:
            samples = self._durations(getattr(config, name))
        except UserError as error:
            raise UserError(f"{flag(name)}: {error}") from None
        if samples < 1 and name.endswith("_every"):
            raise UserError(f"{flag(name)} {getattr(config, name)}: must be longer than nothing; 1ep is an epoch")
        return samples

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
