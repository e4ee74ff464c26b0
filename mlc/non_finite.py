"""A gradient that is not finite ends the run before it changes anything; under a loss scaler, when it stays so."""

import math

from shards.console import UserError

MOST_SKIPPED = 20  # steps in a row: by then a scaler has gone from 65536 to 1/16, so the scale is not the reason


class NonFiniteGuard:
    """Sees the gradient's norm of each step, on all processes alike."""

    def __init__(self, step: int, *, scaler: bool):
        """step: the last one that is done; scaler: whether a loss scaler skips steps and makes its scale smaller."""
        self._begin = self._good = step
        self._allowed = MOST_SKIPPED if scaler else 0

    def check(self, step: int, grad_norm: float, *, at_end: bool = False) -> None:
        """May be called again for the same step. at_end: it is the run's last.

        Raises:
            UserError: the gradient is not finite, and no smaller scale can help.
        """
        if math.isfinite(grad_norm):
            self._good = step
            return
        skipped = step - self._good
        none_taken = at_end and self._good == self._begin
        if skipped < self._allowed and not none_taken:
            return
        often = f" and was not finite in {skipped} steps, whatever the loss scale" if self._allowed else ""
        raise UserError(
            f"step {step}: the gradient is {grad_norm}{often}; the weights were not changed by it, the last checkpoint "
            "is good. Try a lower --lr, --clip-grad 1 or --amp-dtype bf16 and --resume auto; --log-samples FILE names "
            "the images of each step"
        )
