"""Which strategy a launch means, what it divides, and that dividing by one changes nothing."""

import copy
import functools

import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from accelerate.state import PartialState
from conftest import ROOT
from torch import nn
from torch.distributed.tensor import DTensor

from mlc.optim.ema import Ema
from mlc.parallel import launch, strategy
from shards.console import UserError

LAUNCHED = {  # what `accelerate launch` puts into the environment
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_auto_takes_what_the_launcher_says_and_the_flag_wins(name, monkeypatch):
    for key, value in LAUNCHED[name].items():
        monkeypatch.setenv(key, value)
    assert strategy.choose().name == name
    assert strategy.choose("zero1") == strategy.Choice(name="zero1", reshard=name != "fsdp2")
    assert strategy.choose().zero_stage == (3 if name == "zero3" else 0)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "zero3-offload"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "choose 1, 2 or 3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"}, "not read"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "on the `cpu`"),
    ],
)
def test_what_would_be_ignored_is_refused(environment, message, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        strategy.choose()


def test_checkpoints_cross_between_ddp_and_fsdp2_only():
    strategy.refuse_other_files("ddp", "fsdp2", path="x", weights_only=True)
    strategy.refuse_other_files("zero2", "zero2", path="x", weights_only=False)
    for then, now in (("zero1", "zero2"), ("ddp", "zero1"), ("zero3", "fsdp2")):
        with pytest.raises(UserError, match=f"--strategy {then}"):
            strategy.refuse_other_files(then, now, path="x", weights_only=False)


@pytest.mark.parametrize(
    "name, count, first",
    [
        ("swinv2_tiny_window8_256", 12, "SwinTransformerV2Block"),
        ("swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("vit_tiny_patch16_224", 12, "Block"),
        ("convnext_atto", 12, "ConvNeXtBlock"),
        ("resnet18", 8, "BasicBlock"),
        ("efficientnet_lite0", 7, "Sequential"),
    ],
)
def test_blocks_are_the_backbones_repeated_parts(name, count, first):
    model = timm.create_model(name, num_classes=2)
    found = strategy.blocks(model)
    assert len(found) == count and type(found[0]).__name__ == first
    inside = sum(p.numel() for block in found for p in block.parameters())
    assert inside > 0.5 * sum(p.numel() for p in model.parameters())
    assert len({id(p) for block in found for p in block.parameters()}) == sum(len([*b.parameters()]) for b in found)


def small() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    model.patch_embed.requires_grad_(False)
    return model


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    yield launch.start(group=True)
    dist.destroy_process_group()
    PartialState._reset_state()


def test_fsdp2_by_one_is_plain_training(accelerator):
    reference, model = small(), small()
    plain_ema, ema = Ema(reference), Ema(model)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    make = functools.partial(_adamw, lr=1e-2)
    divided = strategy.divide(
        strategy.choose("fsdp2"), accelerator, model, ema.module, make, clip=0.1, batch_size=2, accumulation=2
    )
    assert all(isinstance(p, DTensor) for p in (*model.parameters(), *ema.module.parameters()))
    for _ in range(3):
        for last in (False, True):
            image = torch.randn(2, 3, 32, 32)
            reference(image).square().sum().backward()
            with divided.accumulate(last):
                divided.backward(divided.model(image).square().sum())
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        torch.testing.assert_close(divided.step(), expected)
        plain.step()
        plain.zero_grad()
        plain_ema.update(reference, 0.5)
        ema.update(model, 0.5)
        for mine, theirs in ((model, reference), (ema.module, plain_ema.module)):
            image = torch.randn(2, 3, 32, 32)
            with torch.no_grad():
                torch.testing.assert_close(mine(image), theirs(image))
            torch.testing.assert_close(strategy.full_state(mine), dict(theirs.state_dict()))


def test_a_gradient_that_is_not_finite_changes_nothing(accelerator):
    model = small()
    divided = strategy.divide(
        strategy.choose("fsdp2"), accelerator, model, None, _adamw, clip=1.0, batch_size=2, accumulation=1
    )
    image = torch.randn(2, 3, 32, 32)
    for factor in (1.0, float("nan"), float("inf")):
        before = copy.deepcopy(strategy.full_state(model)), copy.deepcopy(divided.optimizer.state_dict())
        divided.backward(divided.model(image).sum() * factor)
        finite = divided.step().isfinite()
        after = strategy.full_state(model), divided.optimizer.state_dict()
        assert finite == (factor == 1)
        assert all(p.grad is None for p in model.parameters())
        if finite:
            assert any(not torch.equal(after[0][name], before[0][name]) for name in after[0])
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=0)


def _adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)


def test_the_shipped_configurations_say_what_their_names_say():
    for path in sorted((ROOT / "mlc" / "launch").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        assert settings["num_processes"] == (1 if path.stem == "gpu1" else 2)
        stage = settings.get("deepspeed_config", {}).get("zero_stage", 0)
        assert path.stem.startswith(f"zero{stage}") == bool(stage)
        assert (settings["distributed_type"] == "FSDP") == (path.stem == "fsdp2")
    assert yaml.safe_load((ROOT / "mlc/launch/gpu2.yaml").read_text()) == yaml.safe_load(
        (ROOT / "accelerate_config.yaml").read_text()
    )
