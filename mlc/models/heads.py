"""What turns a backbone's features into one logit per class. A head changes timm's own classifier in place instead of
wrapping the model, so that parameter names, weight decay lists and gradient checkpointing stay timm's.
"""

from collections.abc import Callable

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from shards.console import UserError

# Builds the backbone, weights loaded, with so many outputs; None for as many as its published weights have.
Create = Callable[[int | None], nn.Module]


def linear(create: Create, num_classes: int) -> nn.Module:
    """timm's own classifier with `num_classes` outputs."""
    return create(num_classes)


def extra_linear(create: Create, num_classes: int) -> nn.Module:
    """The pretrained classifier is kept, and a Linear maps its logits (1000 for ImageNet) to the classes.

    UserError for a backbone whose classifier is not one Linear.
    """
    model = create(None)
    name = model.pretrained_cfg.get("classifier")
    classifier = model.get_submodule(name) if isinstance(name, str) else None
    if not isinstance(classifier, nn.Linear):
        raise UserError(
            f"{model.pretrained_cfg['architecture']} has no single linear classifier to build on; "
            "use --head linear instead of extra_linear"
        )
    model.set_submodule(name, nn.Sequential(classifier, nn.Linear(classifier.out_features, num_classes)))
    model.num_classes = num_classes
    return model


HEADS = {
    "linear": linear,
    "extra_linear": extra_linear,
}


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


@torch.no_grad()
def init_head_bias(model: nn.Module, prior: ArrayLike) -> None:
    """Lets the untrained model predict each class's frequency, `prior` [C], everywhere: bias logit(prior), weight 0.

    With rare classes the first steps otherwise go into learning that nearly everything is absent (Lin et al. 2017,
    "Focal Loss for Dense Object Detection", section 4.1). Frequencies are kept within 1e-4 of 0 and 1. UserError for a
    classifier without a bias.
    """
    bias = torch.logit(torch.as_tensor(prior, dtype=torch.float64), eps=1e-4)
    classifier = model.get_classifier()
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        if not layers or layers[-1].bias is None:
            raise UserError("this model's classifier has no bias to set; use --head-bias zero")
        layers[-1].weight.zero_()
        layers[-1].bias.copy_(bias)


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's parameters begin with."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
