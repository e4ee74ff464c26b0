import math
from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

from mlc.optim.losses import LOSSES, bce, focal, smooth

EXTREME = torch.tensor([[-100.0, -30.0, 0.0, 30.0, 100.0]])


def batch(soft: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(7, 5, generator=generator)
    target = torch.rand(7, 5, generator=generator)
    return logits, target if soft else (target > 0.5).float()


@pytest.mark.parametrize("soft", [False, True])
def test_bce_equals_torch_and_keeps_one_value_per_class(soft):
    logits, target = batch(soft)
    torch.testing.assert_close(bce(logits, target), binary_cross_entropy_with_logits(logits, target, reduction="none"))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gamma, alpha", [(2.0, -1.0), (2.0, 0.25), (1.5, 0.9), (0.0, -1.0)])
def test_focal_equals_torchvision(soft, gamma, alpha):
    logits, target = batch(soft)
    expected = sigmoid_focal_loss(logits.double(), target.double(), alpha=alpha, gamma=gamma).float()
    torch.testing.assert_close(focal(logits, target, gamma, alpha), expected)


def test_focal_keeps_the_digits_of_a_confident_answer():
    # at logit 15 the loss is x^3 with x = exp(-15) to first order; 1 - p_t in float32 has two digits left there
    value = focal(torch.tensor([[15.0]]), torch.ones(1, 1)).item()
    assert value == pytest.approx(math.exp(-45), rel=1e-5, abs=0)


@pytest.mark.parametrize("loss", [bce, focal, partial(focal, gamma=0.5), partial(focal, alpha=0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_finite_at_extreme_logits_with_finite_gradients(loss, dtype, target):
    logits = EXTREME.to(dtype, copy=True).requires_grad_()
    value = loss(logits, torch.full_like(logits, target))
    assert value.dtype == torch.float32
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_float32_inside_autocast(loss):
    logits, target = batch(soft=True)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, target)
    torch.testing.assert_close(value, loss(half.float(), target), rtol=0, atol=0)


def test_smoothing_moves_both_ends_half_of_it():
    torch.testing.assert_close(smooth(torch.tensor([0.0, 0.5, 1.0]), 0.1), torch.tensor([0.05, 0.5, 0.95]))
