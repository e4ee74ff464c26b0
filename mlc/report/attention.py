"""Where a model looks: Grad-CAM on its last map of features, for Swin and every other timm backbone that keeps one.

Selvaraju et al. 2017, "Grad-CAM": the features, weighted by how much each raises a class's logit, where that is
positive. Of a model of images and captions it is the map of the image's part, with the caption fed as it is: what the
image adds to what is written.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mlc.captions import captions_of
from mlc.data.captions import EvalCaptions
from mlc.data.dataset import Batch
from mlc.data.reader import TarReader
from mlc.data.transforms import EvalTransform, normalize
from mlc.inference import answered
from mlc.models.export import exported_crop, load_exported
from mlc.models.fusion import Fused
from mlc.report.gallery import data_url
from mlc.report.runs import Run
from shards.console import UserError, say
from shards.image import BadImage

SIDE = 176  # pixels of an overlay
HOT = np.array([255, 90, 0], np.float32)


def grad_cam(model: nn.Module, batch: Batch, column: int) -> torch.Tensor:
    """float32 [1, 1, h, w] of the size of the map, 0..1: how much each place speaks for a class.

    model: timm's or `Fused`, in eval mode; batch: of one image, `image` float [1, 3, H, W], normalised, and for `Fused`
    its captions; column: of the class.

    Raises:
        ValueError: the model has no map of features, or its head does not look at it (a ViT's class token).
    """
    looks = model.image if isinstance(model, Fused) else model
    if looks is None or not hasattr(looks, "forward_features"):
        raise ValueError("it does not look at images")
    kept = []

    def keeping(image: torch.Tensor, **masks) -> torch.Tensor:
        with torch.no_grad():
            kept.append(plain(image, **masks).requires_grad_())
        return kept[-1]

    plain, looks.forward_features = looks.forward_features, keeping
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(answered(model, batch["image"], batch)[0, column], kept)
    finally:
        del looks.forward_features  # of the object: the class has its own
    return _cam(looks, kept[-1].detach(), slope)


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


@dataclass(frozen=True)
class Overlay:
    """An image as the model sees it and the same with its attention, data URLs; `places` (h, w) of the map; `empty`:
    none of them speaks for the class."""

    seen: str
    hot: str
    places: tuple[int, int]
    empty: bool


def overlays(
    run: Run, reader: TarReader, wanted: Sequence[tuple[int, int]]
) -> tuple[dict[tuple[int, int], Overlay], str]:
    """({(row, class column): its overlay}, why there are none: "" where there are)."""
    try:
        model, info = load_exported(run.folder / "best")
        captions = captions_of(run.folder / "best", info, reader)
        return {key: _overlay(model, info, reader, captions, *key) for key in wanted}, ""
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, UserError, BadImage) as error:
        why = str(error).splitlines()[0]
        say(f"{run.name}: no attention maps ({why})")
        return {}, why


def _overlay(
    model: nn.Module, info: dict, reader: TarReader, captions: EvalCaptions | None, row: int, column: int
) -> Overlay:
    own = info["pretrained_cfg"]
    size, mean, std = own["input_size"][-1], own["mean"], own["std"]
    transform = EvalTransform(size=size, crop=exported_crop(info), crop_pct=own["crop_pct"], mean=tuple(mean))
    pixels = np.ascontiguousarray(transform(reader.read(row)))  # [H, W, 3]
    batch = {"image": normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None], mean, std)}
    cam = grad_cam(model, batch | (captions(np.array([row])) if captions else {}), column)
    whole = F.interpolate(cam, size=pixels.shape[:2], mode="bicubic")[0, 0].clamp(0, 1).numpy()
    seen = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    heat = np.asarray(Image.fromarray((255 * whole).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    share = 0.65 * (heat.astype(np.float32) / 255)[..., None]
    grey = np.asarray(seen.convert("L").convert("RGB"), np.float32)
    hot = Image.fromarray((grey * (1 - share) + HOT * share).astype(np.uint8))
    return Overlay(_jpeg(seen), _jpeg(hot), tuple(cam.shape[-2:]), not cam.any())


def _jpeg(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=78, optimize=True)
    return data_url(out.getvalue())
