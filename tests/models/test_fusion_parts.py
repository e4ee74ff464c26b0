"""What leaves a run of images and captions comes back, whole or in parts."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_fusion import EMPTY, MASK, SMALL, SWIN, TOKENS, build, image_model, images, spoilt
from torch import nn

from mlc.models.bigru import BiGru
from mlc.models.export import export, load_exported
from mlc.models.fusion import FUSIONS, Fused
from mlc.models.fusion_parts import load_combined, load_parts
from shards.console import UserError

CLASSES = ["a", "b", "c"]


def exported(model: nn.Module, folder, *, classes=CLASSES) -> nn.Module:
    spoilt(model)
    export(
        model,
        folder,
        architecture=model.pretrained_cfg["architecture"],
        model_args={**SWIN, "img_size": 32},
        num_classes=3,
        label_names=classes,
        img_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        extra={"clean": ["lower"], "max_tokens": 64},
    )
    return model


def with_bigru(fusion: str, *, head: str = "linear", vocabulary: int = 12, seed: int = 0) -> Fused:
    torch.manual_seed(seed)
    image = None if fusion == "none" else image_model(head=head)
    kwargs = dict(SMALL.get(fusion, {}))
    encoder = BiGru(vocabulary, dim=4, hidden=5)
    return Fused(image, encoder, fusion=fusion, num_classes=3, empty=EMPTY, fusion_kwargs=kwargs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_pooling_of_an_encoder_is_trained_by_every_fusion(fusion):
    model = with_bigru(fusion)
    model(images(), TOKENS, MASK).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def same(one: nn.Module, other: nn.Module) -> bool:
    own, theirs = one.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fusion, head", [*((fusion, "linear") for fusion in FUSIONS), ("concat", "extra_linear"), ("late", "csra")]
)
def test_an_export_comes_back(tmp_path, fusion, head):
    model = exported(with_bigru(fusion, head=head), tmp_path)
    again, config = load_exported(tmp_path)
    assert isinstance(again, Fused) and not again.training
    assert config["mlc"]["fusion"] == fusion and config["mlc"]["clean"] == ["lower"]
    expected = model(images(), TOKENS, MASK)
    torch.testing.assert_close(again(images(), TOKENS, MASK), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "text").iterdir()) == ["config.json"]  # no weight is there twice


def test_an_image_models_export_is_what_it_was(tmp_path):
    exported(image_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mlc"] == {"clean": ["lower"], "max_tokens": 64, "crop": "squish"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert not isinstance(load_exported(tmp_path)[0], Fused)


def test_damage_is_one_line(tmp_path):
    exported(with_bigru("gated"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlc": config["mlc"] | {"fusion": "gate"}}))
    with pytest.raises(UserError, match="did you mean gated"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text" / "config.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_exported(tmp_path)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "none"])
def test_two_runs_are_the_start(tmp_path, fusion):
    image = exported(image_model(), tmp_path / "image" / "best")
    text = exported(with_bigru("none", seed=1), tmp_path / "text")
    model = with_bigru(fusion, seed=2)
    fresh = {name: p.clone() for name, p in model.named_parameters() if name.startswith("fusion.")}
    load_parts(model, tmp_path / "image", tmp_path / "text", classes=CLASSES)
    assert same(model.text.encoder, text.text.encoder)
    backbone = {name: t for name, t in image.state_dict().items() if not name.startswith("head.fc.")}
    found = model.image.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in backbone.items())
    if fusion in ("concat", "bilinear", "late"):
        assert same(model.image, image) and same(model.text.classifier, text.text.classifier)
    if fusion != "late":
        assert torch.equal(model.text.no_caption, text.text.no_caption)
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters() if name in fresh)


def test_late_fusion_of_two_runs_is_the_mean_of_their_probabilities(tmp_path):
    image = exported(image_model(), tmp_path / "image")
    text = exported(with_bigru("none", seed=1), tmp_path / "text")
    model = with_bigru("late", seed=2).eval()
    load_parts(model, tmp_path / "image", tmp_path / "text")
    captioned = [0, 2, 3]
    expected = (image(images()).sigmoid() + text(None, TOKENS, MASK).sigmoid()) / 2
    torch.testing.assert_close(model(images(), TOKENS, MASK).sigmoid()[captioned], expected[captioned])


def test_a_whole_run_and_one_of_another_fusion(tmp_path, capsys):
    source = exported(with_bigru("concat"), tmp_path)
    same_fusion, other = with_bigru("concat", seed=3), with_bigru("early", seed=3)
    load_combined(same_fusion, tmp_path, classes=CLASSES)
    assert same(same_fusion, source) and capsys.readouterr().err == ""
    load_combined(other, tmp_path, classes=CLASSES)
    assert same(other.text.encoder, source.text.encoder)
    assert "its fusion is another" in capsys.readouterr().err
    part = with_bigru("bilinear", seed=4)
    load_parts(part, tmp_path)  # the image's part of a run of both
    assert same(part.image, source.image) and not same(part.text, source.text)


def test_other_words_do_not_fit(tmp_path):
    exported(with_bigru("none"), tmp_path)
    with pytest.raises(UserError, match=r"text.encoder.embedding.weight is \[12, 4\] in the file and \[13, 4\]"):
        load_parts(with_bigru("early", vocabulary=13), None, tmp_path)
    with pytest.raises(UserError, match="is not in the model"):
        load_parts(build("early"), None, tmp_path)


@pytest.mark.parametrize(
    "load, says",
    [
        (lambda folder: load_parts(build("early"), None, folder), "no text model in it"),
        (lambda folder: load_parts(build("none"), folder), "no image part"),
        (lambda folder: load_parts(build("early"), folder / "nowhere"), "no such folder"),
        (lambda folder: load_parts(build("concat"), folder, classes=["c", "b", "a"]), "in another order"),
        (lambda folder: load_combined(build("concat"), folder), "not of images and captions"),
    ],
)
def test_mistakes_are_one_line(tmp_path, load, says):
    exported(image_model(), tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_features_do_not_mind_the_order_of_classes(tmp_path):
    exported(image_model(), tmp_path)
    load_parts(build("early"), tmp_path, classes=["c", "b", "a"])


def test_all_weights_are_in_one_file(tmp_path):
    model = exported(with_bigru("cross-attention"), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
