import json
from copy import deepcopy

import pytest
import timm
import torch
from timm.data import resolve_data_config

from mlc.models.build import build_model
from mlc.models.export import export, load_exported
from shards.console import UserError

BACKBONES = {
    "swinv2_tiny_window8_256": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)},
    "test_vit": {"depth": 2},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def exported(folder, name="swinv2_tiny_window8_256", head="linear", size=32, **more):
    torch.manual_seed(0)
    model = build_model(name=name, num_classes=3, img_size=size, head=head, drop_path=0.1, model_kwargs=BACKBONES[name])
    for parameter in model.parameters():  # fresh zeros would hide a swapped or a missing weight
        torch.nn.init.normal_(parameter, std=0.1)
    export(
        model,
        folder,
        architecture=model.pretrained_cfg["architecture"],
        model_args={**BACKBONES[name], "img_size": size},
        num_classes=3,
        label_names=["one", "two", "10"],
        img_size=size,
        mean=MEAN,
        std=STD,
        extra={"step": 7},
        **more,
    )
    return model.eval()


def logits(model, size=32):
    with torch.no_grad():
        return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("head", ["linear", "extra_linear"])
@pytest.mark.parametrize("name, size", [(name, 32) for name in BACKBONES] + [("swinv2_tiny_window8_256", 48)])
def test_plain_timm_and_our_loader_give_the_same_logits(tmp_path, name, size, head):
    model = exported(tmp_path, name, head, size)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours, _ = load_exported(tmp_path)
    assert not ours.training and plain.num_classes == 3
    expected = logits(model, size)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits(plain, size), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(ours, size), expected, rtol=1e-5, atol=1e-5)


def test_timm_reads_the_labels_and_the_preprocessing(tmp_path):
    exported(tmp_path, crop="center", crop_pct=0.9)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert list(plain.pretrained_cfg["label_names"]) == ["one", "two", "10"]
    data = resolve_data_config({}, model=plain)
    assert data["input_size"] == (3, 32, 32) and tuple(data["mean"]) == MEAN and tuple(data["std"]) == STD
    assert data["crop_mode"] == "center" and data["crop_pct"] == 0.9


def test_a_convnets_input_size_is_data_and_no_argument(tmp_path):
    exported(tmp_path, "resnet18", size=48)
    _, config = load_exported(tmp_path)
    assert "img_size" not in config["model_args"] and config["pretrained_cfg"]["input_size"] == [3, 48, 48]


def test_config_comes_back_with_our_own_part(tmp_path):
    exported(tmp_path)
    _, config = load_exported(tmp_path)
    assert config["mlc"] == {"step": 7, "crop": "squish"} and config["label_names"] == ["one", "two", "10"]
    assert config["model_args"]["window_size"] == 4


def test_a_second_export_replaces_the_first_and_leaves_nothing_else(tmp_path):
    exported(tmp_path, head="extra_linear")
    model = exported(tmp_path, "resnet18")
    torch.testing.assert_close(logits(load_exported(tmp_path)[0]), logits(model))
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = exported(tmp_path, head="extra_linear")
    before = deepcopy(model.state_dict())
    export(
        model,
        tmp_path,
        architecture="swinv2_tiny_window8_256",
        model_args={},
        num_classes=3,
        label_names=["a", "b", "c"],
        img_size=32,
        mean=MEAN,
        std=STD,
        extra={},
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_names_must_be_as_many_as_the_classes(tmp_path):
    model = build_model(name="test_resnet", num_classes=3)
    with pytest.raises(AssertionError, match="2 label names for 3"):
        export(
            model,
            tmp_path,
            architecture="test_resnet",
            model_args={},
            num_classes=3,
            label_names=["a", "b"],
            img_size=32,
            mean=MEAN,
            std=STD,
            extra={},
        )


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: missing or damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no 'architecture' in it"),
        (lambda folder: change(folder, architecture="swinv9"), "has no model 'swinv9'"),
        (lambda folder: change(folder, label_names=["one"]), "1 label names for 3 classes"),
        (lambda folder: change(folder, model_args={"colour": 3}), "cannot build this model"),
        (lambda folder: change(folder, model_args=[]), "cannot build this model"),
        (lambda folder: change(folder, num_classes=1, label_names=["one"]), "does not fit the config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: missing"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
            "model.safetensors: missing or damaged",
        ),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, damage, says):
    exported(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_exported(tmp_path)
    assert str(tmp_path) in str(error.value)


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
