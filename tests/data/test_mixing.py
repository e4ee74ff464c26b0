import numpy as np
import pytest
import torch
from scipy import stats

from mlc.data.mixing import mix_lambda, mixup, swap_pairs


def test_lambda_is_beta_distributed_and_shared_by_partners():
    position = torch.arange(20_000)
    lam = mix_lambda(position, alpha=0.4, prob=1.0, seed=3)
    assert torch.equal(lam[0::2], lam[1::2])
    assert stats.kstest(lam[0::2].numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-4


def test_lambda_depends_on_the_position_alone():
    position = torch.arange(1000, 1064)
    whole = mix_lambda(position, alpha=0.4, prob=0.5, seed=3)
    halves = torch.cat([mix_lambda(half, alpha=0.4, prob=0.5, seed=3) for half in position.split(16)])
    assert torch.equal(whole, halves) and not torch.equal(whole, mix_lambda(position, alpha=0.4, prob=0.5, seed=4))


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_share_of_mixed_pairs(prob):
    lam = mix_lambda(torch.arange(20_000), alpha=1.0, prob=prob, seed=0)
    assert abs((lam < 1).float().mean().item() - prob) < 0.02


def test_mixup_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(6, 3, 4, 4, generator=generator), torch.rand(6, 5, generator=generator)
    lam = torch.tensor([0.3, 0.3, 1.0, 1.0, 0.8, 0.8])
    mixed, soft = mixup(image, target, lam)
    for own, partner in ((0, 1), (1, 0), (2, 3), (5, 4)):
        share = lam[own]
        torch.testing.assert_close(mixed[own], share * image[own] + (1 - share) * image[partner])
        torch.testing.assert_close(soft[own], share * target[own] + (1 - share) * target[partner])
    assert torch.equal(mixed[2], image[2])


def test_swap_pairs():
    assert swap_pairs(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert np.array_equal(swap_pairs(swap_pairs(torch.arange(8))), np.arange(8))
