import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import fbeta_score
from timm.loss import AsymmetricLossMultiLabel, DistributionBalancedLoss, ZlprLoss
from timm.loss.class_weights import compute_class_weights
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

from mlc.optim.losses import (
    LOSSES,
    asl,
    bce,
    class_weights,
    distribution_balanced,
    focal,
    pos_weights,
    smooth,
    soft_fbeta,
    two_way,
    zlpr,
)

EXTREME = torch.tensor([[-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]])


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


def with_gradient(loss, logits, target):
    """(value, gradient) for another upstream gradient in each element."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward(torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value))
    return value.detach(), logits.grad


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "gamma_neg, gamma_pos, clip", [(4, 0, 0.05), (4, 1, 0.05), (2.5, 0.5, 0), (0, 0, 0.1), (1, 3, 0.3)]
)
def test_asl_and_its_gradient_are_timms(soft, gamma_neg, gamma_pos, clip):
    logits, target = batch(soft)
    logits = logits / 3  # where p is near 1, timm's 1 - p has lost its digits
    timms = AsymmetricLossMultiLabel(gamma_neg, gamma_pos, clip, reduction="none")
    expected = with_gradient(timms, logits, target)
    seen = with_gradient(partial(asl, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip), logits, target)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_asl_with_nothing_switched_on_is_bce_where_timm_has_lost_the_gradient():
    logits, target = torch.tensor([[-40.0, 40.0]]), torch.tensor([[1.0, 0.0]])
    seen = with_gradient(partial(asl, gamma_neg=0, clip=0), logits, target)
    for ours, theirs in zip(seen, with_gradient(bce, logits, target), strict=True):
        torch.testing.assert_close(ours, theirs)


def two_way_by_loops(x, t, temperature) -> float:
    """Kobayashi's formula in float64, one sample and one class after the other, with soft weights."""
    means = []
    for rows in (list(zip(x, t, strict=True)), list(zip(x.T, t.T, strict=True))):
        values = []
        for logits, weights in rows:
            if not (weights > 0).any():
                continue
            positive = np.sum(weights * np.exp(-logits / temperature)) ** temperature
            values.append(np.log1p(positive * np.sum((1 - weights) * np.exp(logits))))
        means.append(np.mean(values))
    return sum(means)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("soft", [False, True])
def test_two_way_against_its_formula(soft, temperature):
    logits, target = batch(soft)
    target[2], target[3], target[:, 1] = 0, 1, 0  # a sample without positives, one without negatives, an unseen class
    expected = two_way_by_loops(logits.double().numpy(), target.double().numpy(), temperature)
    assert two_way(logits, target, temperature).mean().item() == pytest.approx(expected, rel=1e-5)


def test_two_way_pulls_positives_above_negatives():
    logits, target = batch(soft=False)
    _, gradient = with_gradient(lambda x, t: two_way(x, t).mean()[None], logits, target)
    assert (gradient[target == 1] >= 0).all() and (gradient[target == 0] <= 0).all()  # of minus the loss


def test_zlpr_and_its_gradient_are_timms_and_each_class_has_the_value_of_its_sample():
    logits, target = batch(soft=False)
    target[2], target[3] = 0, 1
    seen = with_gradient(lambda x, t: zlpr(x, t).mean()[None], logits, target)
    for ours, theirs in zip(seen, with_gradient(lambda x, t: ZlprLoss()(x, t)[None], logits, target), strict=True):
        torch.testing.assert_close(ours, theirs)
    value = zlpr(logits, target)
    assert value.shape == target.shape and (value == value[:, :1]).all()


def test_zlpr_of_soft_targets_against_its_formula():
    logits, target = batch(soft=True)
    x, t = logits.double().numpy(), target.double().numpy()
    expected = np.log1p((t * np.exp(-x)).sum(1)) + np.log1p(((1 - t) * np.exp(x)).sum(1))
    np.testing.assert_allclose(zlpr(logits, target)[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"map": (0.3, 4.0, 0.5), "neg_scale": 1.0, "bias": 0.0, "gamma": 0.0}, {"smoothing": 0.2}]
)
def test_distribution_balanced_and_its_gradient_are_timms(soft, settings):
    logits, target = batch(soft)
    target[2] = 0  # a sample without positives
    counts, samples = torch.tensor([1.0, 9.0, 90.0, 400.0, 20.0]), 1000
    floor, slope, middle = settings.get("map", (0.1, 10.0, 0.2))
    scale, bias, gamma = (settings.get(name, own) for name, own in (("neg_scale", 2.0), ("bias", 0.05), ("gamma", 2.0)))
    smoothing = settings.get("smoothing", 0.0)
    timms = DistributionBalancedLoss(
        counts, samples, floor, slope, middle, scale, bias, gamma, smoothing=smoothing, reduction="none"
    )
    ours = partial(
        distribution_balanced,
        frequencies=counts / samples,
        weight_map=(floor, slope, middle),
        neg_scale=scale,
        bias=bias,
        gamma=gamma,
        smoothing=smoothing,
    )
    seen = with_gradient(lambda x, t: ours(x, smooth(t, smoothing)), logits, target)
    for mine, theirs in zip(seen, with_gradient(timms, logits, target), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"two-way"}))
def test_a_batch_may_be_cut_in_parts(name):
    """As 1 x 16 and 2 x 8 must give the same gradient; docs/methods.md says why not with `two-way`."""
    logits, target = batch(soft=True)
    parts = [LOSSES[name](logits[rows], target[rows]) for rows in (slice(3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts), LOSSES[name](logits, target))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_soft_fbeta_of_certain_predictions_is_scikit_learns(beta):
    generator = torch.Generator().manual_seed(2)
    predicted, target = (torch.rand(2, 40, 6, generator=generator) > 0.6).float()
    target[0], predicted[0], target[1], predicted[2] = 0, 0, 0, 0  # nothing there, nothing predicted, or neither
    value = soft_fbeta(200 * predicted - 100, target, beta)
    expected = fbeta_score(target.numpy(), predicted.numpy(), beta=beta, average="samples", zero_division=0)
    assert value.shape == target.shape and (value == value[:, :1]).all()
    assert value.mean().item() == pytest.approx(1 - expected, rel=1e-5)


def test_soft_fbeta_against_a_closed_form():
    # p = 1/2 for two of four classes that are there: F1 = 2 * 1 / (2 + 2)
    value = soft_fbeta(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(value, torch.full((1, 4), 0.5))


def test_class_weights():
    counts = torch.tensor([1.0, 10.0, 1000.0])
    inverse = class_weights(counts, "inverse")
    torch.testing.assert_close(inverse / inverse[2], torch.tensor([1000.0, 100.0, 1.0]))
    n, beta = np.array([1, 10, 1000]), 0.99
    effective = (1 - beta) / (1 - beta**n)
    seen = class_weights(counts, "effective", beta)
    np.testing.assert_allclose(seen, effective / effective.mean(), rtol=1e-5)
    for weights in (inverse, seen, class_weights(counts, "effective", 0.999999)):
        assert weights.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["inverse", "effective"])
def test_a_class_without_positives_leaves_the_weights_of_the_others_alone(kind):
    present = class_weights(torch.tensor([5000.0, 4000.0, 3.0]), kind)
    weights = class_weights(torch.tensor([5000.0, 0.0, 4000.0, 3.0, 0.0]), kind)
    torch.testing.assert_close(weights[[0, 2, 3]], present)
    assert weights[[1, 4]].tolist() == [1, 1] and weights.mean().item() == pytest.approx(1)
    assert class_weights(torch.zeros(3), kind).tolist() == [1, 1, 1]  # of the trained group nothing is labelled


@pytest.mark.parametrize("power, most", [(1.0, 20.0), (0.5, 1000.0)])
def test_weights_of_positives_are_timms_where_there_is_something_to_balance(power, most):
    counts = torch.tensor([1.0, 40.0, 700.0, 1000.0, 0.0])
    _, expected = compute_class_weights(counts, 1000, "neg_pos", power=power, max_weight=most)
    seen = pos_weights(counts, 1000, most, power)
    torch.testing.assert_close(seen[:3], expected[:3])
    assert seen[3:].tolist() == [1, 1] and seen.max() <= most


@pytest.mark.parametrize("soft", [False, True])
def test_positives_weigh_as_in_torch_and_timm(soft):
    logits, target = batch(soft)
    weights = torch.tensor([0.3, 1.0, 4.0, 20.0, 7.0])
    torchs = binary_cross_entropy_with_logits(logits, target, pos_weight=weights, reduction="none")
    torch.testing.assert_close(bce(logits, target, weights), torchs)
    torch.testing.assert_close(focal(logits, target, gamma=0, pos_weight=weights), torchs)
    timms = AsymmetricLossMultiLabel(4, 0, 0.05, reduction="none", pos_weight=weights)(logits / 3, target)
    torch.testing.assert_close(asl(logits / 3, target, pos_weight=weights), timms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        *LOSSES.values(),
        partial(bce, pos_weight=torch.linspace(0, 20, 7)),
        partial(asl, pos_weight=torch.linspace(0, 20, 7)),
        partial(focal, gamma=0.5),
        partial(focal, alpha=0.25),
        partial(asl, clip=0),
        partial(asl, gamma_neg=0.5, gamma_pos=0.3, clip=0),
        partial(asl, gamma_neg=0.01, gamma_pos=1.5, clip=0.5),
        partial(two_way, temperature=0.5),
        partial(distribution_balanced, frequencies=torch.linspace(1e-6, 1 - 1e-6, 7), gamma=0.5, smoothing=0.1),
    ],
)
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
