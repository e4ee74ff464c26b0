"""Where a model looks: Grad-CAM on its last map of features, for Swin and every other timm backbone that keeps one.

Selvaraju et al. 2017, "Grad-CAM": the features, weighted by how much each raises a class's logit, where that is
positive.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mlc.data.reader import TarReader
from mlc.data.transforms import EvalTransform, normalize
from mlc.models.export import exported_crop, load_exported
from mlc.report.gallery import data_url
from mlc.report.runs import Run
from shards.console import UserError, say
from shards.image import BadImage

SIDE = 176  # pixels of an overlay
HOT = np.array([255, 90, 0], np.float32)


def grad_cam(model: nn.Module, image: torch.Tensor, column: int) -> torch.Tensor:
    """float32 [H, W] of the image's size, 0..1: how much each place speaks for a class.

    model: timm's, in eval mode; image float [1, 3, H, W], normalised; column: of the class.

    Raises:
        ValueError: the model has no map of features, or its head does not look at it (a ViT's class token).
    """
    with torch.no_grad():
        features = model.forward_features(image)
    with torch.enable_grad():
        features.requires_grad_()
        (slope,) = torch.autograd.grad(model.forward_head(features)[0, column], features)
    features = features.detach()
    return F.interpolate(_cam(model, features, slope), size=image.shape[-2:], mode="bicubic")[0, 0].clamp(0, 1)


def _cam(model: nn.Module, features: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """[1, 1, h, w]. Channels come last in Swin, first in CNNs; tokens of a ViT are made a square again."""
    if features.ndim == 3:
        first = getattr(model, "num_prefix_tokens", 0)
        features, slope = (_square(tokens[:, first:]) for tokens in (features, slope))
    elif features.ndim != 4:
        raise ValueError(f"features of shape {tuple(features.shape)} are no map")
    if not slope.any():
        raise ValueError("its head does not look at the map of features")
    axis = -1 if features.shape[-1] == model.num_features != features.shape[1] else 1
    features, slope = features.movedim(axis, 1), slope.movedim(axis, 1)
    cam = (features * slope.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    return cam / cam.max().clamp_min(1e-12)


def _square(tokens: torch.Tensor) -> torch.Tensor:
    """[B, h * w, C] -> [B, h, w, C]."""
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square")
    return tokens.unflatten(1, (side, side))


def overlays(run: Run, reader: TarReader, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[str, str]]:
    """{(row, class column): (the image as the model sees it, the same with its attention)}, data URLs.

    Empty, with a line that says why, for models that have no map of features or read captions.
    """
    try:
        model, info = load_exported(run.folder / "best")
        if "fusion" in info.get("mlc", {}):
            raise ValueError("it reads captions")
        return dict(_overlay(model, info, reader, row, column) for row, column in wanted)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, UserError, BadImage) as error:
        say(f"{run.name}: no attention maps ({str(error).splitlines()[0]})")
        return {}


def _overlay(model: nn.Module, info: dict, reader: TarReader, row: int, column: int):
    own = info["pretrained_cfg"]
    size, mean, std = own["input_size"][-1], own["mean"], own["std"]
    transform = EvalTransform(size=size, crop=exported_crop(info), crop_pct=own["crop_pct"], mean=tuple(mean))
    pixels = np.ascontiguousarray(transform(reader.read(row)))  # [H, W, 3]
    image = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], mean, std)
    cam = grad_cam(model, image, column).numpy()
    seen = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    heat = np.asarray(Image.fromarray((255 * cam).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    share = 0.65 * (heat.astype(np.float32) / 255)[..., None]
    grey = np.asarray(seen.convert("L").convert("RGB"), np.float32)
    hot = Image.fromarray((grey * (1 - share) + HOT * share).astype(np.uint8))
    return (row, column), (_jpeg(seen), _jpeg(hot))


def _jpeg(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=78, optimize=True)
    return data_url(out.getvalue())
