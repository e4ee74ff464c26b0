"""The plan's numbers against what small models really take."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from tiny_text import tiny
from torch.utils.flop_counter import FlopCounterMode

from mlc import plan
from mlc.models.build import build_model
from mlc.models.fusion import Fused
from mlc.models.text import build_text_model
from shards.console import run as run_verb


def options(**more) -> Namespace:
    return Namespace(
        **{
            "model": "resnet18",
            "num_classes": 5,
            "img_size": 64,
            "grad_checkpointing": "none",
            "attention": "fast",
            "amp_dtype": "none",
            "gpu": "a4000",
            "gpus": 4,
            "global_batch_size": 64,
            "no_model_ema": False,
            "mfu": 0.25,
            "samples": 0,
            "epochs": 1,
            "images_per_core": 1000,
            "disk_gb_per_second": 1.0,
            "text_model": "",
            "fusion": "none",
            "max_tokens": 16,
            "vocabulary": 100,
        }
        | more
    )


def test_flops_are_the_counters():
    model = timm.create_model("resnet18", num_classes=5)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 64, 64))
    assert plan.costs(options()).flops == counter.get_total_flops()


def test_modes_of_gradient_checkpointing_and_attention_reach_the_count():
    """The last third of a ViT's block is not computed again: nobody needs its result."""
    model = {"model": "vit_tiny_patch16_224"}
    plans = {mode: plan.plan(options(**model, grad_checkpointing=mode)) for mode in ("none", "every:2", "all")}
    kept = [found["costs"]["activations"] for found in plans.values()]
    flops = [found["train_flops_per_image"] for found in plans.values()]
    assert kept[0] / 12 < kept[2] < kept[0] / 4 and kept[0] / 2 < kept[1] < 0.7 * kept[0]
    assert [f / flops[0] for f in flops] == pytest.approx([1, 1 + 1 / 9, 1 + 2 / 9], rel=0.02)
    rates = [found["images_per_second_by"]["flops"] for found in plans.values()]
    assert rates[0] / rates[2] == pytest.approx(flops[2] / flops[0])
    moved = [found["train_bytes_per_image"] for found in plans.values()]
    assert moved[0] < moved[1] < moved[2] < 4 / 3 * moved[0]
    swin = {"model": "swinv2_tiny_window8_256"}
    fast, timms = (plan.costs(options(**swin, attention=a)).activations for a in ("fast", "timm"))
    assert timms > 1.1 * fast


@pytest.mark.parametrize(
    "model, size, bound, words",
    [("efficientnet_lite0", 64, "memory", "of the memory's bandwidth"), ("vit_base_patch16_224", 224, "flops", "MFU")],
)
def test_the_slower_of_arithmetic_and_memory_is_said(capsys, model, size, bound, words):
    more = {"model": model, "img_size": size, "amp_dtype": "bf16", "gpus": 1}
    found = plan.plan(options(**more))
    assert found["bound_by"] == bound
    assert found["images_per_second"] == min(found["images_per_second_by"].values())
    plan._say(found, options(**more))
    assert words in capsys.readouterr().out


def test_captions_are_counted(tmp_path):
    """As many parameters and FLOPs as the model has that is trained; words far outnumber a block's weights."""
    told = {"text_model": str(tiny("bert", tmp_path, vocab_size=5000)), "fusion": "gated", "max_tokens": 16}
    model = Fused(
        build_model(name="resnet18", num_classes=5, img_size=64),
        build_text_model(told["text_model"]),
        fusion="gated",
        num_classes=5,
        empty=[0],
    ).eval()
    tokens = torch.ones(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 64, 64), tokens, tokens.bool())
    both, image, text = (plan.costs(options(**more)) for more in (told, {}, told | {"fusion": "none"}))
    assert both.flops == counter.get_total_flops()
    assert both.parameters == sum(p.numel() for p in model.parameters())
    assert both.activations > image.activations and both.flops > image.flops + 0.9 * text.flops
    assert text.largest > 5000 * 32 > 2 * max(b.numel() for b in model.text.encoder.model.encoder.parameters())
    longer = plan.costs(options(**told | {"fusion": "none", "max_tokens": 32}))
    assert 1.9 < longer.activations / text.activations < 2.2


def test_fixed_memory_is_that_of_a_real_optimizer():
    c = plan.costs(options())
    model = build_model(name="resnet18", num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if t.numel() > 1]
    taken = sum(t.numel() * 4 for t in [*model.parameters(), *model.parameters(), *state])  # gradients like weights
    assert plan.fixed_bytes("ddp", c, 1, autocast=False, ema=False) == taken
    assert plan.fixed_bytes("ddp", c, 1, autocast=False, ema=True) == taken + 4 * c.parameters


def test_strategies_divide_what_they_say():
    c = plan.Costs(parameters=1000, trainable=1000, largest=0, flops=1, activations=1)
    sizes = [plan.fixed_bytes(name, c, 4, autocast=False, ema=False) for name in ("ddp", "zero1", "zero2", "zero3")]
    assert sizes == [16_000, 8_000 + 2_000, 4_000 + 3_000, 4_000]
    assert plan.fixed_bytes("fsdp2", c, 4, autocast=False, ema=False) == 4_000


def test_the_batch_divides_the_share_of_a_gpu_and_fits():
    c = plan.Costs(parameters=0, trainable=0, largest=0, flops=1, activations=2**30)
    found = plan.estimate("ddp", c, options(gpu="a4000", gpus=2, global_batch_size=48))
    assert found.batch == 12  # of 24; 14 GiB are left, and 13 and 14 do not divide 24
    shared = plan.Costs(parameters=0, trainable=0, largest=0, flops=1, activations=2**30, shared=3 * 2**30)
    assert plan.estimate("ddp", shared, options(gpu="a4000", gpus=2, global_batch_size=48)).batch == 8
    assert plan.estimate("ddp", plan.Costs(10**10, 10**10, 0, 1, 1), options()).batch is None


def test_as_json_and_for_people(capsys, shards):
    flags = ["--model", "resnet18", "--img-size", "64", "--gpus", "4", "--gpu", "h100", "--global-batch-size", "64"]
    assert run_verb(plan.main, [*flags, "--json", "--data", str(shards)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["strategy"] for row in found["strategies"]} == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    by = found["images_per_second_by"]
    assert by["flops"] == pytest.approx(0.25 * 989e12 * 4 / (3 * found["costs"]["flops"]))
    assert by["memory"] == pytest.approx(0.8 * 3350e9 * 4 / (3 * found["costs"]["moved"]))
    assert found["images_per_second"] == min(by.values()) == by[found["bound_by"]]
    assert found["hours"] > 0
    assert run_verb(plan.main, flags) == 0
    assert "micro-batch" in capsys.readouterr().out
    assert run_verb(plan.main, ["--text-model", "bigru", "--json", "--data", str(shards)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loader_cores_per_gpu"] is None and found["costs"]["parameters"] < 1_000_000


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu", "h1000"], "--gpu h1000: known are"),
        (["--gpus", "3"], "--global-batch-size 32 is not a multiple of --gpus 3"),
        (["--model", "swinv3"], "has no model"),
        (["--fusion", "gated"], "--fusion needs --text-model"),
        (["--model", "resnet18", "--grad-checkpointing", "every:0"], "choose none, all, attention or every:K"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, words):
    assert run_verb(plan.main, flags) == 2
    assert words in capsys.readouterr().err
