"""What turns a backbone's features into one logit per class. A head changes timm's own classifier in place instead of
wrapping the model, so that parameter names, weight decay lists and gradient checkpointing stay timm's.

`linear` and `extra_linear` are a timm classifier, and exported as one. The others are a module `label_head` beside the
backbone, which `model.forward_head` hands the features to.
"""

import inspect
import math
from types import MethodType

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mlc.models.label_attention import Csra, MlDecoder, Query2Label
from mlc.models.label_relations import Gcn, Lstm
from shards.console import UserError, did_you_mean


class Mlp(nn.Module):
    """Pooled features [B, D] -> a hidden layer -> logits [B, C].

    hidden: its width; act: `gelu` or `relu`; dropout: behind it.
    """

    sees_map = False

    def __init__(self, features: int, num_classes: int, *, hidden: int = 512, act: str = "gelu", dropout: float = 0.0):
        super().__init__()
        if act not in ("gelu", "relu"):
            raise ValueError(f"act {act}: choose gelu or relu")
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, num_classes)
        self.act, self.drop = nn.GELU() if act == "gelu" else nn.ReLU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))

    def last(self) -> tuple[Tensor, Tensor | None]:
        return self.fc2.weight, self.fc2.bias


# Modules (features D, num_classes C, **head_kwargs): pooled features [B, D], or where `sees_map` the map [B, H, W, D],
# -> logits [B, C]; `last()` gives the weight and bias (or None) that the logits come from.
LABEL_HEADS = {
    "mlp": Mlp,
    "ml_decoder": MlDecoder,
    "query2label": Query2Label,
    "csra": Csra,
    "lstm": Lstm,
    "gcn": Gcn,
}
HEADS = ("linear", "extra_linear", *LABEL_HEADS)
_PREFIX = "label_head"


def outputs(head: str, num_classes: int) -> int | None:
    """How many outputs timm's own classifier gets under a head; None for as many as its published weights have."""
    return {"linear": num_classes, "extra_linear": None}.get(head, 0)


def check_head(head: str, head_kwargs: dict) -> None:
    """Raises UserError with near names for an unknown head, or an argument that it does not take."""
    if head not in HEADS:
        raise UserError(f"unknown head {head!r}: choose one of {', '.join(HEADS)}{did_you_mean(head, HEADS)}")
    taken = inspect.signature(LABEL_HEADS[head]).parameters if head in LABEL_HEADS else {}
    known = [name for name in taken if name not in ("features", "num_classes", "cooccurrence")]
    for name in head_kwargs:
        if name not in known:
            what = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"--head {head} has no argument {name!r}; {what}{did_you_mean(name, known)}")


def extra_linear(model: nn.Module, num_classes: int) -> None:
    """The pretrained classifier is kept, and a Linear maps its logits (1000 for ImageNet) to the classes; in place.

    UserError for a backbone whose classifier is not one Linear.
    """
    name = model.pretrained_cfg.get("classifier")
    classifier = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(classifier, nn.Linear):
        raise UserError(
            f"{model.pretrained_cfg['architecture']} has no single linear classifier to build on; "
            "use --head linear instead of extra_linear"
        )
    model.set_submodule(name, nn.Sequential(classifier, nn.Linear(classifier.out_features, num_classes)))
    model.num_classes = num_classes


def add_label_head(
    model: nn.Module, head: str, num_classes: int, head_kwargs: dict, cooccurrence: ArrayLike | None = None
) -> None:
    """Puts one of LABEL_HEADS in the place of timm's classifier; in place, `model.head_spec` says which.

    cooccurrence: for `gcn`, counts [C, C]. UserError for arguments that make no head, and for a backbone whose
    classifier cannot be taken away.
    """
    check_head(head, head_kwargs)
    kind, kwargs = LABEL_HEADS[head], dict(head_kwargs)
    if kind is Gcn:
        kwargs["cooccurrence"] = None if cooccurrence is None else np.asarray(cooccurrence)
    try:
        model.reset_classifier(0, "") if kind.sees_map else model.reset_classifier(0)
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{model.pretrained_cfg['architecture']} takes no --head {head}: {error}") from error
    features = model.num_features if kind.sees_map else getattr(model, "head_hidden_size", model.num_features)
    model.label_head = make_label_head(head, features, num_classes, kwargs)
    model.num_classes = num_classes
    model.head_spec = {"head": head, "head_kwargs": dict(head_kwargs)}
    model.forward_head = MethodType(forward_head, model)


def make_label_head(head: str, features: int, num_classes: int, kwargs: dict) -> nn.Module:
    """One of LABEL_HEADS. UserError for arguments that it does not take, or that make no head."""
    try:
        return LABEL_HEADS[head](features, num_classes, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items() if key != "cooccurrence")
        raise UserError(f"--head {head} with {given or 'no arguments'}: {error}") from error


def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
    """Of a model with a label head, as a method: a deep copy of the model takes its own. The name is timm's.

    `pre_logits`: features as timm pools them [B, D], or the mean of the map that the head sees.
    """
    x = type(self).forward_head(self, x, pre_logits=True)
    if not self.label_head.sees_map:
        return x if pre_logits else self.label_head(x)
    places = feature_map(self, x)
    return places.mean((1, 2)) if pre_logits else self.label_head(places)


def feature_map(model: nn.Module, x: Tensor) -> Tensor:
    """[B, H, W, D] from what a backbone without pooling gives: [B, D, H, W], [B, H, W, D] (timm says by `output_fmt`),
    or tokens [B, N, D], whose prefix (class token, registers) is left out."""
    if x.ndim == 4:
        return x if getattr(model, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
    if x.ndim != 3:
        asked = f"--head {model.head_spec['head']}" if hasattr(model, "head_spec") else "--fusion cross-attention"
        raise UserError(
            f"{asked} looks at places and {model.pretrained_cfg['architecture']} gives none; choose another"
        )
    x = x[:, getattr(model, "num_prefix_tokens", 0) :]
    side = math.isqrt(x.shape[1])
    return x.unflatten(1, (side, side) if side**2 == x.shape[1] else (1, -1))


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's parameters begin with, whatever the head: all else is the backbone. Of a model
    of images and captions: of all its classifiers and of the fusion."""
    if hasattr(model, "classifier_prefixes"):
        return model.classifier_prefixes()
    return (f"{_PREFIX}.",) if hasattr(model, _PREFIX) else timm_classifiers(model)


def timm_classifiers(model: nn.Module) -> tuple[str, ...]:
    """The same for the backbone's published weights; some have two classifiers."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def fold(state: dict[str, Tensor], classifier: str | tuple[str, ...] | None) -> dict[str, Tensor]:
    """The state dict of the same function with one Linear: W = W2 W1, b = W2 b1 + b2, rounded once from float64.

    Two Linears without anything between them are one, so a model with `extra_linear` is plain timm again. Any other
    state dict comes back as it is. `classifier` is timm's `pretrained_cfg["classifier"]`.
    """
    parts = [f"{classifier}.{key}" for key in ("0.weight", "0.bias", "1.weight", "1.bias")]
    if not all(part in state for part in parts):
        return state
    w1, b1, w2, b2 = (state[part].double() for part in parts)
    one = {f"{classifier}.weight": w2 @ w1, f"{classifier}.bias": w2 @ b1 + b2}
    kept = {name: tensor for name, tensor in state.items() if name not in parts}
    return kept | {name: tensor.to(state[parts[0]].dtype) for name, tensor in one.items()}


def unfold(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The reverse, for a model with `extra_linear` and a state dict with one Linear to its classes: it becomes the
    first outputs of the first Linear, and the second one hands them on. Any other state dict comes back as it is."""
    own, names = model.state_dict(), timm_classifiers(model)
    parts = [f"{name}{part}" for name in names for part in ("0.weight", "0.bias", "1.weight", "1.bias")]
    one = [f"{name}{part}" for name in names for part in ("weight", "bias")]
    if len(names) != 1 or not all(part in own for part in parts) or not all(name in state for name in one):
        return state
    w1, b1, w2, b2 = (own[part].clone() for part in parts)
    weight, bias = (state[name] for name in one)
    classes = len(w2)
    if weight.shape != (classes, w1.shape[1]) or len(w1) < classes:
        return state
    w1[:classes], b1[:classes] = weight, bias
    torch.nn.init.eye_(w2)
    kept = {name: tensor for name, tensor in state.items() if name not in one}
    return kept | dict(zip(parts, (w1, b1, w2, torch.zeros_like(b2)), strict=True))


@torch.no_grad()
def init_head_bias(model: nn.Module, prior: ArrayLike) -> None:
    """Lets the untrained model predict each class's frequency, `prior` [C], everywhere: bias logit(prior), weight 0.

    With rare classes the first steps otherwise go into learning that nearly everything is absent (Lin et al. 2017,
    "Focal Loss for Dense Object Detection", section 4.1). Frequencies are kept within 1e-4 of 0 and 1. UserError for a
    classifier without a bias.
    """
    bias = torch.logit(torch.as_tensor(prior, dtype=torch.float64), eps=1e-4)
    for weight, own in last_layers(model):
        if own is None:
            raise UserError("this model's classifier has no bias to set; use --head-bias zero")
        weight.zero_()
        own.copy_(bias)


def last_layers(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of the layers that the logits come from."""
    if hasattr(model, "last_layers"):
        return model.last_layers()
    if hasattr(model, _PREFIX):
        return [model.label_head.last()]
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    layers = [[layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d)] for head in heads]
    return [(found[-1].weight, found[-1].bias) if found else (torch.empty(0), None) for found in layers]
