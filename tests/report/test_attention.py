"""Grad-CAM against its formula, with the gradients taken by finite differences, for the three layouts of features."""

from contextlib import suppress

import pytest
import timm
import torch
from tiny_fusion import MASK, TOKENS, build, images, spoilt

from mlc.report.attention import grad_cam

SWIN = {"img_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
LAST = {"swinv2_tiny_window8_256": True, "resnet10t": False, "vit_tiny_patch16_224": True}  # where the channels are


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("swinv2_tiny_window8_256", SWIN),
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "global_pool": "avg"}),
    ],
)
def test_grad_cam_is_its_formula(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    image = torch.randn(1, 3, 64 if "swin" not in name else 32, 64 if "swin" not in name else 32)
    column = int(model(image).argmax())  # of random weights, the class for which most speaks
    found = grad_cam(model, {"image": image}, column)
    with torch.no_grad():
        features = model.forward_features(image)
    model.double()
    expected = by_differences(
        lambda x: model.forward_head(x)[0, column], features, prefix="vit" in name, last=LAST[name]
    )
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)


def by_differences(logit, features, *, prefix: bool, last: bool) -> torch.Tensor:
    """The map with the weights of the channels taken by finite differences of the logit along each of them."""
    tokens = features[:, 1:] if prefix else features
    weights = []
    for channel in range(tokens.shape[-1] if last else tokens.shape[1]):
        step = torch.zeros_like(features, dtype=torch.float64)
        part = step[:, 1:] if prefix else step
        (part[..., channel] if last else part[:, channel]).fill_(1e-3)
        with torch.no_grad():
            ends = [logit(features.double() + sign * step) for sign in (1, -1)]
        weights.append(((ends[0] - ends[1]) / 2e-3).item())
    weights = torch.tensor(weights, dtype=torch.float64)
    cam = (tokens.double() @ weights if last else (tokens.double() * weights[:, None, None]).sum(1)).relu()
    side = int(cam.numel() ** 0.5)
    assert cam.max() > 0
    return (cam / cam.max()).reshape(1, 1, side, side)


@pytest.mark.parametrize("fusion", ["late", "gated", "early", "cross-attention"])
def test_of_a_fused_model_it_is_the_images_map_with_the_caption_as_it_is(fusion):
    model = spoilt(build(fusion)).double()
    image, plain = images(count=1).double(), type(model.image).forward_features
    with torch.no_grad():
        features = plain(model.image, image)
    tokens, mask = TOKENS[:1], MASK[:1]

    def logits(x):
        model.image.forward_features = lambda _: x
        try:
            return model(image, tokens, mask)[0]
        finally:
            del model.image.forward_features

    found = {}
    batch = {"image": image, "tokens": tokens[:, None], "token_mask": mask[:, None], "caption_weight": torch.ones(1, 1)}
    for column in range(3):  # of random weights, those for which something in the image speaks
        with suppress(AssertionError):
            found[column] = by_differences(lambda x, c=column: logits(x)[c], features, prefix=False, last=True)
    assert found
    for column, expected in found.items():
        torch.testing.assert_close(grad_cam(model, batch, column).double(), expected, atol=2e-3, rtol=0)
    assert "forward_features" not in vars(model.image)


def test_what_has_no_map():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    with pytest.raises(ValueError, match="does not look at the map"):
        grad_cam(model, {"image": torch.randn(1, 3, 32, 32)}, 0)
    with pytest.raises(ValueError, match="does not look at images"):
        grad_cam(build("none"), {"image": torch.randn(1, 3, 32, 32), "tokens": TOKENS[:1], "token_mask": MASK[:1]}, 0)
