"""Frozen encoders of images and captions, from wherever there are trained ones: timm, Hugging Face (an image or a text
model, or one tower of a CLIP-like pair), or a finished run. All give one vector per image or caption.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlc.models.build import build_model
from mlc.models.fusion import Captions, Fused
from mlc.models.heads import feature_map
from mlc.models.text import build_text_model, cached_first, files_of, quiet_transformers
from shards.console import UserError

_PAIR = "get_{}_features"  # methods of a model with two towers


class ImageEncoder(nn.Module):
    """image float [B, 3, H, W], normalised by `mean` and `std` and of `size` pixels a side -> [B, D].

    A timm model gives what it pools for its classifier; one of Hugging Face its `pooler_output` (CLIP-like ones in the
    space that image and text share), or where it has none its first token.
    """

    def __init__(self, model: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model, self.size, self.mean, self.std = model, size, tuple(mean), tuple(std)

    def forward(self, image: Tensor) -> Tensor:
        if hasattr(self.model, "forward_features"):
            seen = self.model.forward_head(self.model.forward_features(image), pre_logits=True)
            return seen if seen.ndim == 2 else feature_map(self.model, seen).mean((1, 2))
        seen = getattr(self.model, _PAIR.format("image"), self.model)(pixel_values=image)
        return _vector(seen, "image_embeds")


class TextTower(nn.Module):
    """The text's tower of a CLIP-like model: tokens and token_mask [B, L] -> (words [B, L, D'], float [B, D])."""

    def __init__(self, model: nn.Module, features: int):
        super().__init__()
        self.model, self.num_features = model, features
        config = getattr(model.config, "text_config", model.config)
        self.max_tokens: int | None = config.max_position_embeddings
        # SigLIP looks at the last of a fixed number of places and was trained on padding; it takes no mask.
        self._pad = config.pad_token_id if config.model_type.startswith("siglip") else None

    def forward(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        told = {"attention_mask": token_mask.long()}
        if self._pad is not None:
            tokens = F.pad(tokens.where(token_mask, self._pad), (0, self.max_tokens - tokens.shape[1]), value=self._pad)
            told = {}
        seen = getattr(self.model, _PAIR.format("text"), self.model)(input_ids=tokens, **told)
        return seen.last_hidden_state, _vector(seen, "text_embeds")


def _vector(seen: Any, projected: str) -> Tensor:
    """[B, D] of an output of transformers."""
    for name in (projected, "pooler_output"):
        if getattr(seen, name, None) is not None:
            return seen[name].flatten(1)
    return seen.last_hidden_state[:, 0]


class Encoders(nn.Module):
    """Image and captions -> their features side by side, float32 [B, D]; either encoder may be missing."""

    def __init__(self, image: ImageEncoder | None, text: Captions | None):
        super().__init__()
        self.image, self.text = image, text

    def forward(
        self, image: Tensor | None, tokens: Tensor | None, mask: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """tokens and mask [B, K, L], weight [B, K]: of the sample's captions, whose features are averaged; those of an
        empty caption are zero."""
        parts = [] if self.image is None else [self.image(image).float()]
        if self.text is not None:
            each = self.text(tokens.flatten(0, 1), mask.flatten(0, 1))[1].float()
            parts.append((each.unflatten(0, weight.shape) * weight[..., None]).sum(1))
        return torch.cat(parts, 1)


# ---- by name ---------------------------------------------------------------------------------------------------------


def image_encoder(name: str, *, pretrained: bool, path: str | None, img_size: int | None) -> ImageEncoder:
    """Of timm, with its published weights or those of a file; or of Hugging Face, by a folder or OWNER/NAME.

    img_size: pixels of a side; None for what it was trained with.

    Raises:
        UserError: there is no such model, or no trained weights of it.
    """
    if Path(name).expanduser().is_dir() or "/" in name:
        if img_size or path:
            raise UserError(f"--model {name}: {'--img-size' if img_size else '--pretrained-path'} is for timm's models")
        return _hugging_face_image(name)
    if pretrained and path:
        raise UserError("--pretrained and --pretrained-path exclude each other; keep one")
    if not (pretrained or path):
        raise UserError(f"--model {name}: give --pretrained or --pretrained-path FILE; random weights see nothing")
    size = img_size or build_model(name=name, num_classes=0).pretrained_cfg["input_size"][-1]
    model = build_model(name=name, num_classes=0, img_size=size, pretrained=pretrained, pretrained_path=path)
    norm = {key: model.pretrained_cfg[key] for key in ("mean", "std")}
    return ImageEncoder(model.eval(), size=size, **norm)


def text_encoder(name: str, pool: str, vocabulary: int) -> nn.Module:
    """Of Hugging Face, by a folder or name: tokens, token_mask -> (words, pooled [B, D]), with `num_features` and
    `max_tokens`. `pool`: of POOLS; a CLIP-like model pools for itself.

    Raises:
        UserError: there is no such model.
    """
    if not _is_tower(name):
        return build_text_model(name, pool=pool, vocabulary=vocabulary).eval()
    if pool != "cls":
        raise UserError(f"--text-pool {pool}: {name} pools for itself; leave it out")
    model = _load(name, "--text-model")
    config = getattr(model.config, "text_config", model.config)
    if vocabulary > config.vocab_size:
        raise UserError(f"--text-model {name} knows {config.vocab_size} tokens and the tokenizer {vocabulary}")
    tower = TextTower(model, 0)
    with torch.no_grad():
        tokens = torch.zeros((1, 2), dtype=torch.long)
        tower.num_features = tower(tokens, torch.ones_like(tokens, dtype=torch.bool))[1].shape[1]
    return tower


def encoders_of_run(model: nn.Module, info: dict) -> tuple[ImageEncoder | None, nn.Module | None]:
    """(the image's, the text's encoder) of an exported run, either None where it has none.

    Raises:
        UserError: a run that was itself trained on features.
    """
    if info["architecture"] == "features":
        raise UserError("this run was trained on features; take the encoders that they were made with")
    image, text = (model.image, model.text.encoder) if isinstance(model, Fused) else (model, None)
    if image is None:
        return None, text
    config = info["pretrained_cfg"]
    return ImageEncoder(image, size=config["input_size"][-1], mean=config["mean"], std=config["std"]), text


def digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over all weights of a state dict and their names: equal for equal encoders."""
    whole = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


def _hugging_face_image(name: str) -> ImageEncoder:
    model = _load(name, "--model")
    config = getattr(model.config, "vision_config", model.config)
    with quiet_transformers(name, "--model"):
        from transformers import AutoImageProcessor

        seen = cached_first(AutoImageProcessor.from_pretrained, files_of(name, True, "--model"))
        size = getattr(config, "image_size", None) or seen.size.get("shortest_edge") or seen.size["height"]
        mean, std = seen.image_mean, seen.image_std
    return ImageEncoder(model, size=size if isinstance(size, int) else size[0], mean=mean, std=std)


def _is_tower(name: str) -> bool:
    from transformers import AutoConfig

    with quiet_transformers(name):
        config = cached_first(AutoConfig.from_pretrained, files_of(name, True))
    return hasattr(config, "vision_config") or _with_projection(config) is not None


def _with_projection(config: Any) -> type | None:
    """CLIP's towers that were saved alone: AutoModel would leave their projection out."""
    import transformers

    kind = (config.architectures or [""])[0]
    return getattr(transformers, kind, None) if kind.endswith("WithProjection") else None


def _load(name: str, flag: str) -> nn.Module:
    """transformers' model in eval mode and float32; every weight is from its files."""
    source = files_of(name, True, flag)
    with quiet_transformers(name, flag):
        from transformers import AutoConfig, AutoModel

        kind = _with_projection(cached_first(AutoConfig.from_pretrained, source)) or AutoModel
        model, report = cached_first(kind.from_pretrained, source, output_loading_info=True, dtype=torch.float32)
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"{flag} {name}: {len(missing)} weights are not in its files, such as {missing[0]}; give the folder "
                "of the bare model"
            )
    return model.eval()
