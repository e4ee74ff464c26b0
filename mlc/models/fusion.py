"""One model of an image and its caption. It looks to the rest of the house like a timm model, with the names

    image.*     a timm model: whole where logits are fused, else without its classifier
    text.*      `text.encoder`, and `text.classifier` where the text has logits of its own
    fusion.*    what makes one answer of the two (fusion_kinds.py)

so that freezing, learning rates and the loading of parts are expressions of names. An image whose caption is empty gets
its answer too: a learned vector `text.no_caption` stands for what the encoder says about nothing.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from torch import Tensor, nn

from mlc.models.fusion_kinds import Bilinear, Concat, CrossAttention, Early, Gated, Late, TextMix, mixed
from mlc.models.heads import classifier_prefixes, feature_map, last_layers
from shards.console import UserError, did_you_mean

# Modules (numbers of features of image and text unless they read logits, num_classes, **fusion_kwargs).
_KINDS = {
    "concat": Concat,
    "bilinear": Bilinear,
    "early": Early,
    "gated": Gated,
    "cross-attention": CrossAttention,
    "late": Late,
}
FUSIONS = ("none", *_KINDS)
_NO_ARGUMENTS = ("self", "image_features", "text_features", "num_classes")


def check_fusion(fusion: str, fusion_kwargs: dict) -> None:
    """Raises UserError with near names for an unknown fusion, or an argument that it does not take."""
    if fusion not in FUSIONS:
        raise UserError(f"--fusion {fusion}: choose one of {', '.join(FUSIONS)}{did_you_mean(fusion, FUSIONS)}")
    taken = inspect.signature(_KINDS[fusion].__init__).parameters if fusion in _KINDS else {}
    known = [name for name in taken if name not in _NO_ARGUMENTS]
    for name in fusion_kwargs:
        if name not in known:
            what = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"--fusion {fusion} has no argument {name!r}; {what}{did_you_mean(name, known)}")


class Captions(nn.Module):
    """The text's part of the model."""

    def __init__(self, encoder: nn.Module, num_classes: int, empty: Sequence[int], *, learned: bool):
        """encoder: tokens, token_mask -> (sequence [B, L, D], pooled [B, D]), with its `num_features` D.
        num_classes: of a linear classifier on the pooled features, 0 for none.
        empty: the tokens of an empty caption, by which rows without a caption are known.
        learned: whether a learned vector stands for an empty caption; else it is zeros.
        """
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.num_features, num_classes) if num_classes else None
        self.no_caption = nn.Parameter(torch.zeros(encoder.num_features)) if learned else None
        self.register_buffer("empty", torch.tensor(list(empty), dtype=torch.long), persistent=False)

    def forward(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence [B, L, D], pooled [B, D], float32 [B, 1]: 0 where the caption is empty, else 1)."""
        sequence, pooled = self.encoder(tokens, token_mask)
        there = self._there(tokens, token_mask)[:, None]
        if self.no_caption is None:
            return sequence, torch.where(there, pooled, 0.0), there.float()
        # Not in place of the encoder's call: with every row's pass through it, no parameter is ever without gradient.
        sequence = torch.where(there[..., None], sequence, self.no_caption)
        return sequence, torch.where(there, pooled, self.no_caption), there.float()

    def _there(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        count = len(self.empty)
        if tokens.shape[1] < count:
            return tokens.new_ones(len(tokens), dtype=torch.bool)
        return (token_mask.sum(1) != count) | (tokens[:, :count] != self.empty).any(1)

    def none_for(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their mask of an empty caption for each of the images."""
        tokens = self.empty.expand(len(images), -1)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)


class Fused(nn.Module):
    """image float [B, 3, H, W], normalised, and its caption's tokens -> logits [B, num_classes]."""

    def __init__(
        self,
        image: nn.Module | None,
        encoder: nn.Module,
        *,
        fusion: str,
        num_classes: int,
        empty: Sequence[int],
        fusion_kwargs: dict | None = None,
    ):
        """image: of `build_model`, None for the fusion `none`: the text alone. Its classifier is taken away, in place,
            where the fusion reads features.
        encoder, empty: see `Captions`.
        fusion_kwargs: arguments of the class in fusion_kinds.py.
        UserError for an unknown fusion, arguments that make none, and a backbone that does not suit it.
        """
        super().__init__()
        check_fusion(fusion, fusion_kwargs or {})
        if (image is None) != (fusion == "none"):
            raise UserError(f"--fusion {fusion} {'needs an image model' if image is None else 'is the text alone'}")
        kind, features = _KINDS.get(fusion), ()
        reads = kind.reads if kind else "logits"
        if reads != "logits":
            features = (_without_classifier(image, fusion, reads), encoder.num_features)
        self.image = image
        self.text = Captions(encoder, num_classes * (reads == "logits"), empty, learned=kind is not Late)
        self.fusion = kind and _made(kind, fusion, (*features, num_classes), fusion_kwargs or {})
        self.num_classes = num_classes
        self.fusion_spec = {
            "fusion": fusion,
            "fusion_kwargs": dict(fusion_kwargs or {}),
            "empty": list(empty),
        }

    def forward(
        self,
        image: Tensor | None,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        mix: TextMix | None = None,
    ) -> Tensor:
        """tokens int64 [B, L] and token_mask bool [B, L], one or more True in each row; None for no captions at all.
            [B, K, L] for K captions of each image, which is looked at once -> logits [B, K, num_classes].

        mix: how the images were mixed (`Mix.shares`), for captions to be mixed alike; None leaves them as they are.
            Pooled features are mixed, which for a linear classifier is the same as to mix its logits.
        """
        if tokens is None:
            tokens, token_mask = self.text.none_for(image)
        seen = None if self.image is None else self.image(image)
        if tokens.ndim == 2:
            return self._answer(seen, tokens, token_mask, mix)
        captions = zip(tokens.unbind(1), token_mask.unbind(1), strict=True)
        return torch.stack([self._answer(seen, *caption, mix) for caption in captions], 1)

    def _answer(self, seen: Tensor | None, tokens: Tensor, token_mask: Tensor, mix: TextMix | None) -> Tensor:
        """seen: what the image's part says, None without one."""
        words, pooled, there = self.text(tokens, token_mask)
        if seen is None:
            return self.text.classifier(mixed(pooled, mix))
        if self.fusion.reads == "places":
            # The caption as a whole is one more word: an encoder's pooling is trained too.
            words, token_mask = torch.cat((words, pooled[:, None]), 1), F.pad(token_mask, (0, 1), value=True)
            return self.fusion(feature_map(self.image, seen), words, token_mask, mix)
        if self.fusion.reads == "features":
            return self.fusion(seen, mixed(pooled, mix))
        if not isinstance(self.fusion, Late):
            return self.fusion(seen, self.text.classifier(mixed(pooled, mix)))
        there = mixed(there, mix)  # the share of captions that are not empty; the text's answer is about these alone
        said = mixed(pooled, mix) / there.clamp_min(torch.finfo(there.dtype).tiny)
        return self.fusion(seen, self.text.classifier(said), there)

    # ---- What the house asks of a model ------------------------------------------------------------------------------

    @property
    def pretrained_cfg(self) -> dict:
        """The image model's; `classifier` as it is called here."""
        if self.image is None:
            own = {"architecture": "text", "input_size": (3, 224, 224)}
            norm = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
            return own | norm | {"classifier": "text.classifier"}
        names = self.image.pretrained_cfg.get("classifier")
        if isinstance(names, str):
            return self.image.pretrained_cfg | {"classifier": f"image.{names}"}
        return self.image.pretrained_cfg | {"classifier": names and tuple(f"image.{name}" for name in names)}

    @property
    def head_spec(self) -> dict:
        """Which label head the image model has, {} for timm's own."""
        return getattr(self.image, "head_spec", {})

    @property
    def not_taken(self) -> tuple[str, ...]:
        """As `build_model` left it in the image model."""
        return getattr(self.image, "not_taken", ())

    def no_weight_decay(self) -> set[str]:
        return {
            f"{part}.{name}"
            for part, module in (("image", self.image), ("text.encoder", self.text.encoder))
            if hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layers of the image model; classifiers, text and fusion are after the last of them."""
        layers, last = {}, (float("inf"),)
        if hasattr(self.image, "group_matcher"):
            layers = group_parameters(self.image, self.image.group_matcher(coarse=coarse), reverse=True)
            layers = {f"image.{name}": (float(layer),) for name, layer in layers.items()}
        heads = self.classifier_prefixes()
        return lambda name: last if name.startswith(heads) else layers.get(name, last)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """What the logits come from; two for the fusion `late`."""
        if isinstance(self.fusion, Late):
            own = self.image.get_classifier()
            return (*(own if isinstance(own, tuple) else (own,)), self.text.classifier)
        return self.text.classifier if self.fusion is None else self.fusion

    def classifier_prefixes(self) -> tuple[str, ...]:
        of_image = () if self.image is None else classifier_prefixes(self.image)
        prefixes = ("fusion.", "text.classifier.", *(f"image.{prefix}" for prefix in of_image))
        names = [name for name, _ in self.named_parameters()]
        return tuple(prefix for prefix in prefixes if any(name.startswith(prefix) for name in names))

    def last_layers(self) -> list[tuple[Tensor, Tensor | None]]:
        own = [] if self.text.classifier is None else [(self.text.classifier.weight, self.text.classifier.bias)]
        if isinstance(self.fusion, Late):
            return [*last_layers(self.image), *own]
        return own if self.fusion is None else [self.fusion.last()]


def _without_classifier(image: nn.Module, fusion: str, reads: str) -> int:
    """Takes the classifier of a timm model away, in place; how many features it now gives."""
    name = image.pretrained_cfg["architecture"]
    if hasattr(image, "label_head"):
        raise UserError(f"--fusion {fusion} has a classifier of its own: use it with --head linear")
    try:
        image.reset_classifier(0, "") if reads == "places" else image.reset_classifier(0)
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{name} takes no --fusion {fusion}: {error}") from error
    return image.num_features if reads == "places" else getattr(image, "head_hidden_size", image.num_features)


def _made(kind: type[nn.Module], fusion: str, sizes: tuple[int, ...], kwargs: dict) -> nn.Module:
    try:
        return kind(*sizes, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"--fusion {fusion} with {given or 'no arguments'}: {error}") from error
