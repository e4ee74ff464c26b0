"""timm's optimizers through one door: the fused ones compute what the plain ones do, mistakes are one line."""

import pytest
import torch
from timm.optim import create_optimizer_v2

from mlc.optim.optimizers import FUSED, make_optimizer
from shards.console import UserError

SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "momentum": 0.85}


def trained(make) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make([{"params": [weight], "weight_decay": 0.1, "lr_scale": 1.0}])
    for _ in range(5):
        optimizer.zero_grad()
        (weight.sin() ** 2).sum().backward()
        optimizer.step()
    return weight.detach()


REFERENCES = {
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.8, 0.95), eps=1e-6),
    "sgd": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.85, nesterov=True),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.85),
    "lamb": lambda g: create_optimizer_v2(g, "lamb", lr=0.01, betas=(0.8, 0.95), eps=1e-6),
    "lion": lambda g: create_optimizer_v2(g, "lion", lr=0.01, betas=(0.8, 0.95)),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=0.01, alpha=0.9, momentum=0.85, eps=1e-6),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equal_to_the_librarys_own(name):
    mine = trained(lambda groups: make_optimizer(groups, name=name, **SETTINGS))
    torch.testing.assert_close(mine, trained(REFERENCES[name]))


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_kernel_skips_a_step_that_is_not_finite(name):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([{"params": [weight], "lr_scale": 1.0}], name=name, **SETTINGS)
    weight.grad = torch.full((3,), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize(
    "name, more, words",
    [
        ("adamv", {}, "timm has no such optimizer.*did you mean"),
        ("lamb", {"only_elementwise": True}, "looks at a parameter as a whole, which ZeRO cuts"),
        ("adan", {"only_elementwise": True}, "looks at a parameter as a whole"),
        ("bnbadam", {}, "cannot be made"),
    ],
)
def test_mistakes_are_one_line(name, more, words):
    with pytest.raises(UserError, match=words) as error:
        make_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))]}], name=name, **SETTINGS, **more)
    assert "\n" not in str(error.value)
