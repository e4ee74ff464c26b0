"""Small models of images and captions for several tests."""

import torch
from torch import nn

from mlc.models.build import build_model
from mlc.models.fusion import Fused

SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
BACKBONES = {  # name: (image size, arguments that make it small)
    "swinv2_tiny_window8_256": (32, SWIN),
    "resnet10t": (64, {}),
    "test_vit": (32, {"depth": 2}),
}
SMALL = {
    "early": {"width": 8, "hidden": 6},
    "gated": {"width": 8},
    "cross-attention": {"width": 8, "heads": 2, "hidden": 6, "dropout": 0.0},
}
EMPTY = [1, 2]
TOKENS = torch.tensor([[1, 5, 6, 2, 0], [1, 2, 0, 0, 0], [1, 7, 2, 0, 0], [1, 9, 5, 3, 2]])  # the second one is empty
MASK = TOKENS > 0


class TinyText(nn.Module):
    """A text encoder with blocks: words alone, and their mean."""

    num_features = 10
    any_length = True  # of captions: asked for by compile_blocks

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 10)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(10, 10), nn.GELU()) for _ in range(2))

    def forward(self, tokens, token_mask):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        weight = token_mask[..., None].float()
        return x, (x * weight).sum(1) / weight.sum(1)


def image_model(name="swinv2_tiny_window8_256", head="linear", **more) -> nn.Module:
    size, kwargs = BACKBONES[name]
    return build_model(name=name, num_classes=3, img_size=size, head=head, model_kwargs=kwargs, **more)


def build(fusion: str, name="swinv2_tiny_window8_256", seed=0, head="linear") -> Fused:
    torch.manual_seed(seed)
    image = None if fusion == "none" else image_model(name, head)
    return Fused(
        image, TinyText(), fusion=fusion, num_classes=3, empty=EMPTY, fusion_kwargs=dict(SMALL.get(fusion, {}))
    )


def images(name="swinv2_tiny_window8_256", count=4) -> torch.Tensor:
    return torch.randn(count, 3, *[BACKBONES[name][0]] * 2, generator=torch.Generator().manual_seed(1))


def spoilt(module: nn.Module) -> nn.Module:
    """With no parameter zero or one, so that none can be left out unseen; in eval mode."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()
