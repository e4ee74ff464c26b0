"""What is computed again gives the losses and gradients of what was kept, bit for bit where the machine allows."""

import copy
import functools
import pickle
from collections.abc import Iterator

import pytest
import timm
import torch
from conftest import TINY as FLAGS
from torch import nn

from mlc.flags import read_config
from mlc.models.build import build_model
from mlc.optim.ema import Ema
from mlc.parallel import compiler, strategy
from mlc.parallel.recompute import recompute
from shards.console import UserError

SWIN_V2, SWIN = "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"
MODES = ["all", "every:2", "attention"]


def model_of(name: str, attention: str = "fast", drop: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    swin = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4} if "swin" in name else {}
    settings = {"num_classes": 3, "img_size": 32, "attention": attention, "model_kwargs": swin}
    return build_model(name=name, drop=drop, drop_path=drop, **settings)


def trained(model: nn.Module, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gradients and running statistics of a pass with dropout and stochastic depth."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (model(images) * torch.arange(12).view(4, 3)).sum()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def cases() -> Iterator[tuple[str, str, str]]:
    for name in (SWIN_V2, SWIN, "test_vit", "test_convnext", "test_resnet", "efficientnet_lite0"):
        for mode in MODES:
            if mode != "attention" or "swin" in name or "vit" in name:
                yield from (
                    (name, mode, attention) for attention in (("fast", "timm") if "swin" in name else ("timm",))
                )


@pytest.mark.parametrize("name, mode, attention", cases())
def test_losses_gradients_and_statistics_are_the_same(name, mode, attention):
    plain, again = (model_of(name, attention) for _ in range(2))
    parts = recompute(again, mode)
    assert len(parts) == (len(strategy.blocks(again)) + 1) // 2 if mode == "every:2" else len(strategy.blocks(again))
    assert_equal(trained(again), trained(plain))
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(again.eval()(image), plain.eval()(image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [SWIN_V2, "test_vit"])
def test_under_autocast(name, mode):
    plain, again = (model_of(name) for _ in range(2))
    recompute(again, mode)
    assert_equal(trained(again, autocast=True), trained(plain, autocast=True))


@pytest.mark.parametrize("mode", MODES)
def test_less_is_kept(mode):
    def kept(mode: str) -> int:
        model, sizes = model_of(SWIN_V2, "timm"), {}
        recompute(model, mode)

        def pack(tensor):
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(8, 3, 32, 32))
        assert output.grad_fn is not None  # which holds what was kept
        return sum(sizes.values())

    assert kept(mode) < 0.8 * kept("none")


@pytest.mark.parametrize("mode", MODES)
def test_copies_compute_again_by_themselves(mode):
    """A copy that ran the weights of the model it was made from would have no gradients."""
    model = model_of(SWIN_V2)
    recompute(model, mode)
    expected = trained(model)
    model.zero_grad()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), Ema(model).module.requires_grad_()):
        assert_equal(trained(copied), expected)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_with_compiled_blocks(mode, monkeypatch):
    """In the order of the training story. Rounding may differ: a compiled block is other code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    plain, again = (model_of(SWIN_V2, drop=0).double() for _ in range(2))
    compiler.compile_blocks(again)
    recompute(again, mode)
    torch._dynamo.utils.counters.clear()
    results = [[], []]
    for _ in range(2):
        for model, found in zip((plain, again), results, strict=True):
            image = torch.ones(2, 3, 32, 32, dtype=torch.float64)
            model.zero_grad()
            model.train()(image).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0])
    # The blocks of one shape share their code still, and none is compiled once more for the second forward pass.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 < len(strategy.blocks(again))


@pytest.mark.parametrize(
    "name, mode, words",
    [
        ("test_vit", "some", "--grad-checkpointing some: choose none, all, attention or every:K"),
        ("test_vit", "every:0", "--grad-checkpointing every:0: choose"),
        ("test_resnet", "attention", "no block.attn; choose all or every:K"),
        ("dla34", "all", "no repeated blocks; choose none"),
    ],
)
def test_what_cannot_be_is_one_line(name, mode, words):
    with pytest.raises(UserError, match=words):
        recompute(timm.create_model(name, num_classes=3), mode)


def test_the_configuration_refuses_it_at_once():
    assert read_config([*FLAGS, "--grad-checkpointing", "every:3"]).grad_checkpointing == "every:3"
    with pytest.raises(UserError, match="--grad-checkpointing every: choose none, all, attention or every:K"):
        read_config([*FLAGS, "--grad-checkpointing", "every"])
