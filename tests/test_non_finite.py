"""A gradient that is not finite: refused at once, and under a loss scaler when it stays so."""

import math

import pytest

from mlc.non_finite import MOST_SKIPPED, NonFiniteGuard
from shards.console import UserError


def test_without_a_scaler_the_first_one_ends_the_run():
    guard = NonFiniteGuard(7, scaler=False)
    guard.check(8, 1.0)
    with pytest.raises(UserError, match="step 9: the gradient is nan; the weights were not changed by it"):
        guard.check(9, math.nan)


def test_a_scaler_may_skip_steps_until_no_scale_can_help():
    guard = NonFiniteGuard(0, scaler=True)
    for step in range(1, 60):  # a scale that grows too far every other step
        guard.check(step, math.inf if step % 2 else 1.0)
        guard.check(step, math.inf if step % 2 else 1.0)  # read again before a checkpoint
    last = step
    for step in range(last + 1, last + MOST_SKIPPED - 1):
        guard.check(step, math.nan)
    with pytest.raises(UserError, match=rf"in {MOST_SKIPPED} steps, whatever the loss scale.*--amp-dtype bf16"):
        guard.check(step + 1, math.nan)


def test_a_run_without_one_good_step_does_not_end_as_done():
    guard = NonFiniteGuard(4, scaler=True)
    guard.check(5, math.nan)
    with pytest.raises(UserError, match=r"step 6: .*in 2 steps"):
        guard.check(6, math.nan, at_end=True)
    guard = NonFiniteGuard(4, scaler=True)
    guard.check(5, 1.0)
    guard.check(6, math.nan, at_end=True)
