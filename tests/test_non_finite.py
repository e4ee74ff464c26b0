"""A gradient that is not finite: refused at once, and under a loss scaler when it stays so."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mlc.non_finite import MOST_SKIPPED, NonFiniteGuard
from shards.console import UserError

NOWHERE = Path("nowhere")  # nothing was seen, so nothing is written


def micro_batch(row: int) -> dict[str, torch.Tensor]:
    names = {"position": 10 * row, "source": 1, "row": row}
    return {name: torch.tensor([number, number + (name != "source")]) for name, number in names.items()}


@pytest.mark.parametrize("scaler", [False, True])
def test_the_samples_of_the_first_bad_step_are_kept(tmp_path, scaler):
    of = [SimpleNamespace(key=lambda row, name=name: f"{name}{row}") for name in "ab"]
    guard = NonFiniteGuard(0, scaler=scaler, folder=tmp_path, indexes=of)
    with pytest.raises(UserError, match=r"non-finite\.json names the images of that step"):
        for step in range(1, 40):  # read one step late, as in training
            guard.saw(step, micro_batch(step), torch.tensor(0.5))
            guard.saw(step, micro_batch(step + 50), torch.tensor(0.5 if step < 3 else math.nan))
            guard.check(step - 1, 1.0 if step - 1 < 3 else math.nan)
    found = json.loads((tmp_path / "non-finite.json").read_text())
    assert found == {
        "step": 3,
        "micro_batches": [
            {"rank": 0, "loss": 0.5, "positions": [30, 31], "keys": ["b3", "b4"]},
            {"rank": 0, "loss": None, "positions": [530, 531], "keys": ["b53", "b54"]},
        ],
    }


def test_without_a_scaler_the_first_one_ends_the_run():
    guard = NonFiniteGuard(7, scaler=False, folder=NOWHERE)
    guard.check(8, 1.0)
    with pytest.raises(UserError, match="step 9: the gradient is nan; the weights were not changed by it"):
        guard.check(9, math.nan)


def test_a_scaler_may_skip_steps_until_no_scale_can_help():
    guard = NonFiniteGuard(0, scaler=True, folder=NOWHERE)
    for step in range(1, 60):  # a scale that grows too far every other step
        guard.check(step, math.inf if step % 2 else 1.0)
        guard.check(step, math.inf if step % 2 else 1.0)  # read again before a checkpoint
    last = step
    for step in range(last + 1, last + MOST_SKIPPED - 1):
        guard.check(step, math.nan)
    with pytest.raises(UserError, match=rf"in {MOST_SKIPPED} steps, whatever the loss scale.*--amp-dtype bf16"):
        guard.check(step + 1, math.nan)


def test_a_run_without_one_good_step_does_not_end_as_done():
    guard = NonFiniteGuard(4, scaler=True, folder=NOWHERE)
    guard.check(5, math.nan)
    with pytest.raises(UserError, match=r"step 6: .*in 2 steps"):
        guard.check(6, math.nan, at_end=True)
    guard = NonFiniteGuard(4, scaler=True, folder=NOWHERE)
    guard.check(5, 1.0)
    guard.check(6, math.nan, at_end=True)
