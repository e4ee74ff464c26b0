import subprocess
import sys
from collections import OrderedDict

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from mlc.models.build import build_model, fast_memory_format, resolve_name
from shards.console import UserError

TINY = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
SWIN_V2, SWIN = "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"


def tiny(**given) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"name": SWIN_V2, "num_classes": 3, "img_size": 32, "model_kwargs": {**TINY, "window_size": 4}}
    return build_model(**settings | given)


def logits(model: torch.nn.Module, size: int) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", [SWIN_V2, SWIN])
@pytest.mark.parametrize("size, window", [(48, 6), (32, 8), (50, 4), (64, 7), (72, 16)])
def test_swin_at_any_size_and_window(name, size, window):
    model = tiny(name=name, img_size=size, model_kwargs={**TINY, "window_size": window})
    assert logits(model, size).shape == (2, 3)
    assert model.not_taken == ()


@pytest.mark.parametrize(
    "name, taken",
    [
        ("test_resnet", False),
        ("test_efficientnet", False),
        ("test_convnext", False),
        ("test_vit", True),
        ("vgg11", False),
    ],
)
def test_backbones_get_the_size_only_if_they_take_one(name, taken):
    model = build_model(name=name, num_classes=3, img_size=64)
    assert ("img_size" in model.not_taken) is not taken
    if name != "vgg11":
        assert logits(model, 64).shape == (2, 3)


def test_the_rates_reach_the_model_zero_included():
    model = tiny(drop=0.3, drop_path=0.2)
    assert model.head.drop.p == 0.3 and model.layers[1].blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert not any(isinstance(module, timm.layers.DropPath) for module in tiny().modules())  # timm's own default is 0.1


def test_a_rate_that_the_backbone_lacks_is_an_error_only_if_asked_for():
    build_model(name="vgg11", num_classes=3, img_size=32)
    with pytest.raises(UserError, match="drop_path_rate"):
        build_model(name="vgg11", num_classes=3, img_size=32, drop_path=0.1)


@pytest.mark.parametrize(
    "published, current, head",
    [
        ("swinv2_large_window12to16_192to256_22kft1k", "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", "linear"),
        ("swin_large_patch4_window7_224_in22k", "swin_large_patch4_window7_224.ms_in22k", "linear"),
        ("swin_large_patch4_window7_224_linear", "swin_large_patch4_window7_224", "extra_linear"),
        ("swin_large_patch4_window7_224_in22k_linear", "swin_large_patch4_window7_224.ms_in22k", "extra_linear"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k", "linear"),
    ],
)
def test_published_names(published, current, head):
    assert resolve_name(published) == (current, head)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("swinv2_tiny_windw8_256", "swinv2_tiny_window8_256"),
        ("resnet18.nope", "a1_in1k"),
        ("hf-hub:someone/resnet18", "no model"),
        ("", "no model"),
    ],
)
def test_an_unknown_name_gets_near_names(name, hint):
    with pytest.raises(UserError, match=hint):
        resolve_name(name)


def test_other_mistakes_are_one_line():
    with pytest.raises(UserError, match="did you mean extra_linear"):
        tiny(head="extra_linar")
    with pytest.raises(UserError, match="embed_dims"):
        tiny(model_kwargs={"embed_dims": 16})
    with pytest.raises(UserError, match="cannot build swinv2_tiny_window8_256 with"):
        tiny(model_kwargs={**TINY, "depths": (1, 2, 3)})


def test_offline_pretrained_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"timm/resnet18\.a1_in1k.*--pretrained-path FILE"):
        build_model(name="resnet18", num_classes=3, pretrained=True)


def test_a_model_without_published_weights_says_so():
    name = next(n for n in timm.list_models("resnet*") if not timm.models.is_model_pretrained(n))
    with pytest.raises(UserError, match="No pretrained weights exist"):
        build_model(name=name, num_classes=3, pretrained=True)


def saved(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {}, "state_dict_ema": state},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: OrderedDict((f"_orig_mod.{key}", value) for key, value in state.items()),
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["bare", "state_dict", "model", "ema", "ddp", "compiled", "both"],
)
def test_weights_from_a_checkpoint(tmp_path, wrap, capsys):
    source = tiny()
    path = saved(tmp_path, wrap(source.state_dict()))
    torch.testing.assert_close(logits(tiny(pretrained_path=path), 32), logits(source, 32), rtol=0, atol=0)
    assert capsys.readouterr().err == ""


def test_a_classifier_of_another_width_is_left_out_and_named(tmp_path, capsys):
    source = tiny(num_classes=7)
    save_file(source.state_dict(), tmp_path / "seven.safetensors")
    model = tiny(pretrained_path=tmp_path / "seven.safetensors")
    assert "has 7 outputs, this model has 3: a new classifier is trained" in capsys.readouterr().err
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, source.state_dict()[name], rtol=0, atol=0)


def test_a_file_without_classifier_is_named(tmp_path, capsys):
    state = {name: tensor for name, tensor in tiny().state_dict().items() if not name.startswith("head.")}
    tiny(pretrained_path=saved(tmp_path, state))
    assert "it has no classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, before, after",
    [
        (SWIN, {"img_size": 32, "window_size": 4}, {"img_size": 64, "window_size": 8}),
        (SWIN_V2, {"img_size": 32, "window_size": 4}, {"img_size": 64, "window_size": 8}),
        ("test_vit", {"img_size": 64}, {"img_size": 96}),
    ],
)
def test_weights_made_for_another_size_are_resampled_as_timm_does(tmp_path, name, before, after):
    kwargs = {} if name == "test_vit" else TINY
    path = saved(tmp_path, timm.create_model(name, num_classes=3, **before, **kwargs).state_dict())
    size = after.pop("img_size")
    mine = build_model(
        name=name,
        num_classes=3,
        img_size=size,
        pretrained_path=path,
        model_kwargs={**kwargs, **after},
        attention="timm",
    )
    reference = timm.create_model(
        name,
        num_classes=3,
        img_size=size,
        pretrained=True,
        **kwargs,
        **after,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 3},
    )
    torch.testing.assert_close(logits(mine, size), logits(reference, size), rtol=0, atol=0)


def test_an_original_swin_checkpoint_is_understood(tmp_path):
    source = tiny()
    renamed = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
        for name, tensor in source.state_dict().items()
    }
    assert renamed.keys() != source.state_dict().keys()
    model = tiny(pretrained_path=saved(tmp_path, {"model": renamed}))
    torch.testing.assert_close(logits(model, 32), logits(source, 32), rtol=0, atol=0)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    with pytest.raises(UserError, match="does not fit") as error:
        tiny(pretrained_path=saved(tmp_path, tiny(model_kwargs={**TINY, "embed_dim": 32}).state_dict()))
    assert "patch_embed.proj.weight is [32, 3, 4, 4] in the file and [16, 3, 4, 4] in the model" in str(error.value)
    state = tiny().state_dict()
    state["layers.9.extra"] = state.pop("norm.weight")
    with pytest.raises(UserError, match="2 weights") as error:
        tiny(pretrained_path=saved(tmp_path, state))
    assert "norm.weight is not in the file" in str(error.value)
    assert "layers.9.extra is not in the model" in str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("this pickle ran code",)


@pytest.mark.parametrize("content", [Harmful(), {"model": {"a": "text"}}, {}, [1, 2]])
def test_a_file_that_holds_no_weights(tmp_path, content, capsys):
    with pytest.raises(UserError, match=r"weights\.pth"):
        tiny(pretrained_path=saved(tmp_path, content))
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_or_missing_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        tiny(pretrained_path=tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        tiny(pretrained_path=tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    "name, size, expected",
    [("test_resnet", 64, True), ("test_convnext", 64, True), ("test_efficientnet", 64, True), ("test_vit", 160, False)],
)
def test_the_memory_format_changes_no_result(name, size, expected):
    torch.manual_seed(0)
    model = build_model(name=name, num_classes=3).eval().double()
    image = torch.randn(2, 3, size, size, dtype=torch.float64)
    logits = model(image)
    layout = fast_memory_format(model)
    model.to(memory_format=layout)
    assert (layout is torch.channels_last) == expected
    torch.testing.assert_close(model(image), logits)


def test_channels_last_by_device_and_family():
    names = {"resnet18": True, "fastvit_t8": False, "mobileone_s0": False}
    for name, tried in names.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert fast_memory_format(model, "cuda") is torch.channels_last
        assert (fast_memory_format(model, "cpu") is torch.channels_last) == tried
        assert fast_memory_format(model, "mps") is torch.contiguous_format


# The smallest quick one of each family of timm that has convolutions.
FAMILIES = (
    *("test_byobnet", "mobileone_s0", "mobilevitv2_050", "test_convnext", "test_convnext2", "cpubone_nano"),
    *("cs3darknet_focus_s", "edgenext_xx_small", "test_efficientnet", "test_efficientnet_ln", "efficientvit_b0"),
    *("fasternet_t0", "fastvit_t8", "ghostnet_050", "inception_next_atto", "iformer_t", "levit_128s"),
    *("test_mambaout", "mobilenetv3_small_050", "test_nfnet", "repghost_050", "hgnetv2_b0", "regnetx_002"),
    *("test_resnet", "skresnet18", "starnet_s1", "shvit_s1", "convnextv2_atto", "pvt_v2_b0", "mobilenetv4_conv_small"),
)
_PASSES = """
import faulthandler, sys
faulthandler.enable()
import timm, torch
from mlc.models.build import build_model, on_device
torch.manual_seed(0)
for name in filter(timm.is_model, sys.argv[1:]):
    print(name, flush=True)
    model = on_device(build_model(name=name, num_classes=3, img_size=64), "cpu")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), name
print("all")
"""


def test_no_family_of_convnets_crashes_on_a_cpu():
    """In a process of its own, whose last printed name is the one that crashed."""
    done = subprocess.run([sys.executable, "-c", _PASSES, *FAMILIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("all\n"), done.stdout[-100:] + done.stderr[-2000:]
