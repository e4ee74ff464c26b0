"""Weights in the layouts in which they are published, written here from models with random weights."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table

from mlc.models.build import build_model
from mlc.models.convert import from_hugging_face, is_hugging_face
from shards.console import UserError

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
SMALL = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 4)}


def spoil(model: torch.nn.Module) -> torch.nn.Module:
    """No weight zero or one: what an initialisation leaves alike would hide a swap."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def hugging_face(name: str, size: int, window: int, classes: int = 5, **more) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    kind = "Swin" if name == V1 else "Swinv2"
    config, model = (getattr(transformers, f"{kind}{part}") for part in ("Config", "ForImageClassification"))
    short = {"embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "drop_path_rate": 0.0}
    return spoil(model(config(image_size=size, window_size=window, num_labels=classes, **short, **more)))


def mine(name: str, size: int, window: int, path, classes: int = 5, **more) -> torch.nn.Module:
    kwargs = {**SMALL, "window_size": window, **more.pop("model_kwargs", {})}
    model = build_model(
        name=name, num_classes=classes, img_size=size, pretrained_path=path, model_kwargs=kwargs, **more
    )
    return model.eval()


def image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["folder", "safetensors", "bin"])
@pytest.mark.parametrize("name", [V1, V2])
def test_hugging_face(tmp_path, name, kind):
    source = hugging_face(name, 64, 4)
    source.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors" if kind == "safetensors" else tmp_path
    if kind == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    x = image(64)
    with torch.no_grad():
        torch.testing.assert_close(mine(name, 64, 4, path)(x), source(x).logits, rtol=1e-4, atol=1e-4)


def test_hugging_face_pretrained_in_a_smaller_window(tmp_path):
    """SwinV2's positions are a function of log-spaced distances as shares of the window it was pretrained in."""
    source = hugging_face(V2, 128, 8, pretrained_window_sizes=[4, 4, 4])
    source.save_pretrained(tmp_path)
    model = mine(V2, 128, 8, tmp_path, model_kwargs={"pretrained_window_sizes": (4, 4, 4)})
    x = image(128)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [V1, V2])
def test_hugging_face_without_classifier_and_of_a_pre_training(tmp_path, name, capsys):
    source = hugging_face(name, 64, 4)
    base = source.swin if name == V1 else source.swinv2
    base.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    torch.save(state | {"embeddings.mask_token": torch.zeros(1, 1, 16)}, tmp_path / "w.pth")
    model = mine(name, 64, 4, tmp_path / "w.pth")
    assert "it has no classifier" in capsys.readouterr().err
    torch.testing.assert_close(model.norm.weight, base.layernorm.weight)


def test_only_hugging_faces_swin_is_renamed():
    assert not is_hugging_face(timm.create_model(V1).state_dict())
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert not is_hugging_face(transformers.ViTForImageClassification(vit).state_dict())


# ---- Microsoft -------------------------------------------------------------------------------------------------------


def microsoft(model: torch.nn.Module, window: int, size: int) -> dict:
    """The checkpoint that Microsoft's code would have written of the same network: a stage ends with its merging, the
    classifier is `head`, and positions, masks and (SwinV2) coordinates are saved with the weights."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        state[name.replace("head.fc.", "head.")] = tensor
    side = size // 4
    for stage, depth in enumerate(SMALL["depths"]):
        for block in range(depth):
            prefix, own = f"layers.{stage}.blocks.{block}", min(window, side >> stage)
            state[f"{prefix}.attn.relative_position_index"] = torch.zeros(own**2, own**2, dtype=torch.int64)
            if f"{prefix}.attn.logit_scale" in state:
                state[f"{prefix}.attn.relative_coords_table"] = torch.zeros(1, 2 * own - 1, 2 * own - 1, 2)
            if block % 2:
                state[f"{prefix}.attn_mask"] = torch.zeros(((side >> stage) // own) ** 2, own**2, own**2)
    return {"model": state, "epoch": 299, "max_accuracy": 81.2}


def published(tmp_path, name: str, size: int, window: int, classes: int = 5, **more):
    """(timm's model, the file) of a network in Microsoft's layout."""
    model = timm.create_model(name, img_size=size, window_size=window, num_classes=classes, **SMALL, **more)
    torch.save(microsoft(spoil(model), window, size), tmp_path / "ms.pth")
    return model, tmp_path / "ms.pth"


@pytest.mark.parametrize("name", [V1, V2])
def test_microsoft(tmp_path, name):
    source, path = published(tmp_path, name, 64, 4)
    state = torch.load(path)["model"]
    assert "layers.0.downsample.reduction.weight" in state and "layers.2.downsample.reduction.weight" not in state
    assert {"head.weight", "layers.1.blocks.1.attn_mask"} <= state.keys()
    x = image(64)
    with torch.no_grad():
        torch.testing.assert_close(mine(name, 64, 4, path)(x), source(x), rtol=1e-4, atol=1e-4)


def test_microsofts_swinv2_in_a_larger_window_and_image(tmp_path):
    """Window 12 at 192 px -> 16 at 256 px: the same weights; the network knows the window it was pretrained in."""
    source, path = published(tmp_path, V2, 192, 12)
    model = mine(V2, 256, 16, path, model_kwargs={"pretrained_window_sizes": (12, 12, 6)})
    reference = timm.create_model(
        V2, img_size=256, window_size=16, num_classes=5, pretrained_window_sizes=(12, 12, 6), **SMALL
    ).eval()
    reference.load_state_dict(source.state_dict())
    x = image(256)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


def test_microsofts_swin_in_a_larger_window_and_image(tmp_path):
    """Window 7 at 224 px -> 8 at 256 px: the tables of relative positions are interpolated."""
    source, path = published(tmp_path, V1, 224, 7)
    model = mine(V1, 256, 8, path)
    for (name, table), own in zip(source.state_dict().items(), model.state_dict().values(), strict=True):
        if name.endswith("relative_position_bias_table"):
            assert table.shape[0] == 13**2 and own.shape[0] == 15**2
            table = resize_rel_pos_bias_table(table, (8, 8), own.shape)
        torch.testing.assert_close(own, table)


def test_microsofts_22k_classifier_is_left_out(tmp_path, capsys):
    source, path = published(tmp_path, V2, 64, 4, classes=21841)
    model = mine(V2, 64, 4, path)
    assert "its classifier has 21841 outputs, this model has 5: a new classifier" in capsys.readouterr().err
    torch.testing.assert_close(model.layers[2].downsample.norm.weight, source.layers[2].downsample.norm.weight)


def test_extra_linear_keeps_1000_classes_and_says_where_there_are_others(tmp_path, capsys):
    source, path = published(tmp_path, V2, 64, 4, classes=1000)
    model = mine(V2, 64, 4, path, head="extra_linear")
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(model.get_classifier()[0].weight, source.get_classifier().weight)
    _, path = published(tmp_path, V2, 64, 4, classes=21841)
    mine(V2, 64, 4, path, head="extra_linear")
    said = capsys.readouterr().err
    assert "21841 outputs, this model has 1000" in said and "extra_linear builds on an untrained classifier" in said


def test_a_folder_of_our_own_or_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors or pytorch_model\.bin in this folder"):
        mine(V2, 64, 4, tmp_path)


def test_biases_of_q_and_v_stay_theirs():
    own, state = "swinv2.encoder.layers.0.blocks.0.attention.self", {}
    for number, part in enumerate(("query", "key", "value")):
        state[f"{own}.{part}.weight"] = torch.full((2, 2), float(number))
        if part != "key":
            state[f"{own}.{part}.bias"] = torch.full((2,), float(number))
    found = from_hugging_face(state)
    assert found["layers.0.blocks.0.attn.qkv.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["layers.0.blocks.0.attn.v_bias"].tolist() == [2, 2] and len(found) == 3
