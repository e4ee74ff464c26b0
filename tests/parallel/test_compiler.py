"""Blocks compiled for training: the same values and names, little code, nothing compiled in the middle of a run."""

import functools

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from mlc.optim.ema import Ema
from mlc.parallel import compiler
from shards.console import UserError


@pytest.fixture(autouse=True)
def no_code_generation(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


def small(**given) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, num_heads=2, num_classes=3, **{"depth": 2, **given}
    )
    model.patch_embed.requires_grad_(False)
    return model


def test_compiled_blocks_keep_their_names_and_values():
    model, plain = small(), small()
    ema = Ema(model)
    compiler.compile_blocks(model)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(image), plain(image))
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.head.weight.data.zero_()
    ema.update(model, 0.5)
    torch.testing.assert_close(ema.module.head.weight, plain.head.weight.detach() / 2)


def test_compiling_for_a_cpu_without_a_compiler_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.need_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="no-such-compiler"):
        compiler.need_compiler(torch.device("cpu"))


def test_all_blocks_share_their_code_and_evaluation_needs_none():
    model = small(depth=5, drop_path_rate=0.4)
    compilations = compiler.Compilations()
    compiler.compile_blocks(model)
    image = torch.randn(2, 3, 32, 32)
    for first in (True, False):
        model.train()(image).sum().backward()
        said = compilations.new()
        # The first block has no stochastic depth at all.
        assert (said or "").startswith("2 graphs compiled, ") == first and bool(said) == first
        with compiler.eager(), torch.no_grad():
            model.eval()(image)
        assert compilations.new() is None
    model.train()(torch.cat([image, image]))
    assert "graphs compiled" in (said := compilations.new()) and "; the last because " in said, said


@pytest.mark.parametrize("scale", [True, False])
def test_stochastic_depth_is_timms(scale):
    """Of whole samples, at the rate and with the scale of timm's; in evaluation nothing is dropped."""
    module = nn.Sequential(nn.Linear(1, 1), DropPath(0.3, scale_by_keep=scale))
    compiler._share_code(module)
    x = torch.full((20_000, 2, 2), 3.0)
    drawn = module[1].train()(x)
    kept = (drawn != 0).double().flatten(1)
    assert torch.equal(kept.mean(1), kept[:, 0]) and kept.mean().item() == pytest.approx(0.7, abs=0.015)
    assert drawn.max().item() == pytest.approx(3 / 0.7 if scale else 3)
    assert torch.equal(module[1].eval()(x), x)
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
