"""Backbones that people choose now, at a small width: built, layer-decayed, recomputed, trained two steps, exported."""

import copy

import pytest
import torch

from mlc.models.build import build_model
from mlc.models.export import export, load_exported
from mlc.optim.param_groups import param_groups
from mlc.parallel.recompute import recompute

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
BACKBONES = {
    "vit_small_patch16_dinov3": (VIT, 32),
    "vit_small_plus_patch16_dinov3": (VIT, 32),
    "vit_base_patch16_siglip_224.v2_webli": (VIT, 32),
    "eva02_tiny_patch14_224": (VIT, 28),
    "convnextv2_atto": ({"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}, 32),
    "naflexvit_base_patch16_gap": (VIT, 32),
    "hiera_tiny_224": ({"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}, 224),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_of_today(name, tmp_path):
    torch.manual_seed(0)
    kwargs, size = BACKBONES[name]
    plain = build_model(name=name, num_classes=5, img_size=size, model_kwargs=kwargs)
    again = copy.deepcopy(plain)
    assert recompute(again, "all")
    images, target = torch.randn(4, 3, size, size), torch.randint(0, 2, (4, 5)).float()
    losses = {}
    for which, model in (("plain", plain), ("again", again)):
        groups = param_groups(model, 0.05, layer_decay=0.8)
        scales = sorted({group["lr_scale"] for group in groups})
        assert len(scales) >= 3 and scales[-1] == 1  # embedding, blocks and head learn at different rates
        optimizer = torch.optim.AdamW([group | {"lr": 1e-3 * group["lr_scale"]} for group in groups])
        losses[which] = []
        for _ in range(2):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[which].append(loss.item())
    assert losses["again"] == pytest.approx(losses["plain"], rel=1e-4) and losses["plain"][1] < losses["plain"][0]

    described = {"architecture": name.partition(".")[0], "model_args": kwargs | {"img_size": size}, "num_classes": 5}
    described |= {"label_names": list("abcde"), "img_size": size, "crop": "squish", "crop_pct": 1.0, "extra": {}}
    described |= {name: plain.pretrained_cfg[name] for name in ("mean", "std")}
    export(plain, tmp_path / "out", **described)
    loaded, config = load_exported(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), plain.eval()(images), atol=1e-5, rtol=1e-4)
    assert config["label_names"] == list("abcde")
