import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR, StepLR

from mlc.optim.schedule import lr_at, parse_duration, parse_minutes
from shards.console import UserError

BATCH = 32


def optimizer(base_lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)


def curve(scheduler, sgd, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "text, samples",
    [
        ("1ep", 1000),
        ("0.5ep", 500),
        (".5ep", 500),
        ("500st", 16000),
        ("10000ex", 10000),
        ("3", 3000),
        (3, 3000),
        (0.25, 250),
        ("0", 0),
        (" 2ep ", 2000),
        ("0.3333ep", 333),
        ("2.0st", 64),
    ],
)
def test_durations(text, samples):
    assert parse_duration(text, epoch_samples=1000, global_batch=BATCH) == samples


@pytest.mark.parametrize("text", ["", "ep", "-1ep", "1 epoch", "1e3", "nan", "inf", "1.5st", "0.5ex", "5steps", None])
def test_a_bad_duration_is_named(text):
    with pytest.raises(UserError, match="no duration") as error:
        parse_duration(text, epoch_samples=1000, global_batch=BATCH)
    assert repr(str(text)) in str(error.value)


@pytest.mark.parametrize(
    "text, minutes", [("10min", 10), ("0.5min", 0.5), (" 2min", 2), ("0min", None), ("1ep", None), ("min", None)]
)
def test_minutes(text, minutes):
    assert parse_minutes(text) == minutes


def test_cosine_with_warmup_equals_torch():
    steps, warmup = 60, 10
    sgd = optimizer(0.4)
    rising = LinearLR(sgd, start_factor=0.1, total_iters=warmup)
    falling = CosineAnnealingLR(sgd, steps - warmup, eta_min=0.01)
    expected = curve(SequentialLR(sgd, [rising, falling], [warmup]), sgd, steps)
    mine = [
        lr_at(step * BATCH, base_lr=0.4, total=steps * BATCH, warmup=warmup * BATCH, warmup_lr=0.04, min_lr=0.01)
        for step in range(steps)
    ]
    assert mine == pytest.approx(expected)


def test_cosine_with_warmup_equals_timm():
    steps, warmup = 60, 10
    scheduler = CosineLRScheduler(
        optimizer(0.4),
        t_initial=steps - warmup,
        lr_min=0.01,
        warmup_t=warmup,
        warmup_lr_init=0.001,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(steps + 5):
        scheduler.step_update(step)
        mine = lr_at(step, base_lr=0.4, total=steps, warmup=warmup, warmup_lr=0.001, min_lr=0.01)
        assert mine == pytest.approx(scheduler.optimizer.param_groups[0]["lr"])


def test_step_equals_torch_and_stops_at_the_floor():
    sgd = optimizer(0.4)
    expected = curve(StepLR(sgd, step_size=7, gamma=0.5), sgd, 30)
    settings = {"base_lr": 0.4, "total": 30 * BATCH, "sched": "step", "decay_every": 7 * BATCH, "decay_rate": 0.5}
    assert [lr_at(step * BATCH, **settings) for step in range(30)] == pytest.approx(expected)
    assert lr_at(29 * BATCH, **settings, min_lr=0.2) == 0.2


def test_after_the_end_the_rate_stays_at_its_floor():
    assert lr_at(10**9, base_lr=1.0, total=1000, min_lr=0.1) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_base_rate_and_a_run_of_warmup_alone_works():
    assert lr_at(0, base_lr=1.0, total=1000) == 1.0
    assert lr_at(50, base_lr=1.0, total=100, warmup=100) == 0.5
    assert lr_at(100, base_lr=1.0, total=100, warmup=100, sched="constant") == 1.0


def test_the_curve_does_not_depend_on_the_batch_size():
    settings = {"base_lr": 1.0, "total": 960, "warmup": 96}
    small = {step * 8: lr_at(step * 8, **settings) for step in range(120)}
    assert all(lr_at(step * 48, **settings) == small[step * 48] for step in range(20))


def test_multistep_equals_torch():
    sgd = optimizer(0.4)
    expected = curve(MultiStepLR(sgd, [7, 9], gamma=0.5), sgd, 12)
    settings = {"base_lr": 0.4, "total": 1, "sched": "multistep", "decay_at": [7 * BATCH, 9 * BATCH], "decay_rate": 0.5}
    assert [lr_at(step * BATCH, **settings) for step in range(12)] == pytest.approx(expected)


def test_linear_equals_torch():
    sgd = optimizer(0.4)
    expected = curve(LinearLR(sgd, start_factor=1, end_factor=0.25, total_iters=20), sgd, 21)
    mine = [lr_at(step * BATCH, base_lr=0.4, total=20 * BATCH, min_lr=0.1, sched="linear") for step in range(21)]
    assert mine == pytest.approx(expected)


def test_onecycle_equals_torch():
    """torch's rise ends one step before its share of the steps, and the fall ends at the last step, not after it."""
    sgd, steps, rise = optimizer(0.4), 101, 20
    expected = curve(OneCycleLR(sgd, 0.4, total_steps=steps, pct_start=(rise + 1) / steps), sgd, steps)
    settings = {"base_lr": 0.4, "total": steps - 1, "warmup": rise, "warmup_lr": 0.4 / 25, "min_lr": 0.4 / 25 / 1e4}
    assert [lr_at(step, **settings, sched="onecycle") for step in range(steps)] == pytest.approx(expected, rel=1e-6)


def test_a_share_of_the_run():
    assert parse_duration("20%", epoch_samples=100, global_batch=10, total=500) == 100
    with pytest.raises(UserError, match="no duration"):
        parse_duration("20%", epoch_samples=100, global_batch=10)


def test_mistakes_in_the_schedule_are_one_line():
    with pytest.raises(UserError, match="cosine, linear, step"):
        lr_at(0, base_lr=1.0, total=1, sched="cosin")
    with pytest.raises(UserError, match="how often"):
        lr_at(0, base_lr=1.0, total=1, sched="step")
    with pytest.raises(UserError, match="--decay-at"):
        lr_at(0, base_lr=1.0, total=1, sched="multistep")
