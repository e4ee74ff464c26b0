import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from mlc.optim.ema import Ema, decay_at


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def train_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


def test_equals_timm_batchnorm_included():
    model = network()
    mine, reference = Ema(model), ModelEmaV3(model, decay=0.9)
    for _ in range(5):
        train_step(model)
        mine.update(model, 0.9)
        reference.update(model)
    assert_equal_states(mine.module, reference.module)
    assert mine.module[1].num_batches_tracked == 5
    assert not torch.equal(mine.module[3].weight, model[3].weight)


def test_closed_form_and_the_two_ends():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model)
    nn.init.ones_(model.weight)
    for _ in range(10):
        ema.update(model, 0.8)
    assert ema.module.weight.item() == pytest.approx(1 - 0.8**10)
    ema.update(model, 1.0)
    assert ema.module.weight.item() == pytest.approx(1 - 0.8**10)
    ema.update(model, 0.0)
    assert ema.module.weight.item() == 1.0


def test_follows_a_compiled_model_although_its_names_change():
    model = network()
    ema = Ema(model)
    before = ema.module[3].weight.clone()
    compiled = torch.compile(model, backend="eager")
    train_step(compiled)
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    ema.update(compiled, 0.5)
    torch.testing.assert_close(ema.module[3].weight, (before + model[3].weight) / 2)


def test_a_tied_weight_is_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    ema = Ema(model)
    nn.init.ones_(model[0].weight)
    ema.update(model, 0.75)
    torch.testing.assert_close(ema.module[1].weight.detach(), torch.full((2, 2), 0.25))


def test_the_copy_is_in_eval_mode_without_gradients_and_shares_nothing():
    model = network()
    ema = Ema(model)
    assert model.training and not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in ema.module.state_dict().values()}


def test_another_models_weights_are_refused():
    with pytest.raises(AssertionError, match="another model"):
        Ema(network()).update(nn.Linear(2, 2), 0.9)


def test_decay_warms_up():
    assert [decay_at(step, 0.999, True) for step in (0, 8, 90)] == pytest.approx([1 / 10, 9 / 18, 91 / 100])
    assert decay_at(10**6, 0.999, True) == 0.999
    assert decay_at(0, 0.999, False) == 0.999
