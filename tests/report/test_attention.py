"""Grad-CAM against its formula, with the gradients taken by finite differences, for the three layouts of features."""

import pytest
import timm
import torch

from mlc.report.attention import grad_cam

SWIN = {"img_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


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
    found = grad_cam(model, image, column)
    assert found.shape == image.shape[-2:] and found.min() >= 0 and 0.1 < found.max() <= 1
    with torch.no_grad():
        features = model.forward_features(image)
        tokens = features[:, 1:] if "vit" in name else features
    # By finite differences of the logit along each channel, which is what the weights are.
    last = name != "resnet10t"
    channels = tokens.shape[-1] if last else tokens.shape[1]
    weights = []
    for channel in range(channels):
        step = torch.zeros_like(features, dtype=torch.float64)
        part = step[:, 1:] if "vit" in name else step
        (part[..., channel] if last else part[:, channel]).fill_(1e-3)
        ends = [model.double().forward_head(features.double() + sign * step)[0, column] for sign in (1, -1)]
        weights.append(((ends[0] - ends[1]) / 2e-3).item())
    weights = torch.tensor(weights, dtype=torch.float64)
    cam = (tokens.double() @ weights if last else (tokens.double() * weights[:, None, None]).sum(1)).relu()
    side = int(cam.numel() ** 0.5)
    cam = cam.reshape(1, 1, side, side)
    cam = torch.nn.functional.interpolate(cam / cam.max(), size=image.shape[-2:], mode="bicubic")[0, 0].clamp(0, 1)
    torch.testing.assert_close(found.double(), cam, atol=2e-3, rtol=0)


def test_a_class_token_has_no_map():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    with pytest.raises(ValueError, match="does not look at the map"):
        grad_cam(model, torch.randn(1, 3, 32, 32), 0)
