"""Any timm backbone by name, for any image size and number of classes, with weights from timm or from a file.

timm answers a wrong name, size or file in many ways, some of them silent (weights that do not fit are skipped). Here
each is one line that says what to change, and a weight is either loaded or named as not loaded.
"""

import difflib
import re
import sys
from pathlib import Path

import timm
import torch
from numpy.typing import ArrayLike
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model_in_modules
from torch import nn

from mlc.models.convert import read_weights
from mlc.models.heads import (
    add_label_head,
    check_head,
    classifier_prefixes,
    extra_linear,
    outputs,
    timm_classifiers,
    unfold,
)
from mlc.models.swin_attention import use_fast_attention
from shards.console import UserError, listed, say

# What timm and torch raise for arguments, a size or weights that make no model: they check little and fail anywhere.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


def build_model(
    *,
    name: str,
    num_classes: int,
    img_size: int | None = None,
    head: str = "linear",
    head_kwargs: dict | None = None,
    cooccurrence: ArrayLike | None = None,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    model_kwargs: dict | None = None,
    attention: str = "fast",
) -> nn.Module:
    """A timm model in training mode: float [B, 3, H, W], normalised -> logits [B, num_classes].

    name: timm's, with or without a tag, older timm names, or `NAME_linear` for the `extra_linear` head.
    img_size: pixels of a side, given to backbones that are built for one size (Swin, ViT); others take any size.
    head_kwargs: arguments of the head, see mlc/models/heads.py and its neighbours label_*.py.
    cooccurrence: for the head `gcn`: training samples that have class i and j, [C, C].
    pretrained, pretrained_path: timm's published weights, or a file in their place (see `load_weights`).
    drop, drop_path: rates of dropout before the classifier and of stochastic depth.
    model_kwargs: further arguments of the timm model; they win over the above.
    attention: `fast` gives Swin and SwinV2 our window attention, `timm` leaves timm's; weights are the same.
    UserError for an unknown name or head, arguments that the backbone refuses, and weights out of reach.
    """
    name, head = resolve_name(name, head)
    optional = {"img_size": img_size, "drop_rate": drop, "drop_path_rate": drop_path}
    asked = {key: value for key, value in optional.items() if value and key != "img_size"} | (model_kwargs or {})
    # Not every backbone knows these: a size is a wish, and a rate of 0 is what a backbone without the argument does.
    wished = {key: value for key, value in optional.items() if value is not None and key not in asked}

    check_head(head, head_kwargs or {})
    published = pretrained and not pretrained_path
    model = _create(name, {**asked, "num_classes": outputs(head, num_classes), "pretrained": published}, wished)
    if head not in ("linear", "extra_linear"):
        add_label_head(model, head, num_classes, head_kwargs or {}, cooccurrence)
    kept = load_weights(model, pretrained_path) if pretrained_path else True
    if head == "extra_linear":
        if not kept:
            say("--head extra_linear builds on an untrained classifier; use linear, or a --model that has the file's")
        extra_linear(model, num_classes)
    if attention == "fast":
        use_fast_attention(model)
    return model


# timm's modules whose larger models run and train as fast or faster in channels last on a CPU. PyTorch's kernels there
# write over foreign memory for some others, such as FastViT and byobnet's MobileOne: a family must have been tried.
CHANNELS_LAST_ON_CPU = ("convnext", "efficientnet", "resnet")


def fast_memory_format(model: nn.Module, device: str | torch.device = "cpu") -> torch.memory_format:
    """Channels last for a ConvNet on CUDA, whose kernels read all channels of a pixel at once, and for families that
    were tried on a CPU; contiguous elsewhere and for a transformer, whose only convolution is the patch embedding.
    Results are the same up to rounding.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    kind = torch.device(device).type
    fast = convolutions > 1 and (kind == "cuda" or (kind == "cpu" and _tried_on_cpu(model)))
    return torch.channels_last if fast else torch.contiguous_format


def on_device(model: nn.Module, device: str | torch.device) -> nn.Module:
    """The model itself, moved there and in the memory format that is fast there."""
    return model.to(device, memory_format=fast_memory_format(model, device))


def _tried_on_cpu(model: nn.Module) -> bool:
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    return is_model_in_modules(architecture, CHANNELS_LAST_ON_CPU)


def resolve_name(name: str, head: str = "linear") -> tuple[str, str]:
    """(timm's current name, head). UserError with near names when timm does not know it, or for an unknown head."""
    check_head(head, {})
    bare = name.removesuffix("_linear")
    if bare != name and not timm.is_model(name) and timm.is_model(bare):
        name, head = bare, "extra_linear"
    name = get_deprecated_models().get(name) or name
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=5))
        raise UserError(f"timm {timm.__version__} has no model {name!r}" + (f"; near it: {near}" if near else ""))
    tags = [known.partition(".")[2] for known in timm.list_models(architecture, include_tags=True)]
    if tag and tag not in tags:
        raise UserError(f"{architecture} has no weights tagged {tag!r}; there are: {', '.join(filter(None, tags))}")
    return name, head


def _create(name: str, asked: dict, wished: dict) -> nn.Module:
    """timm.create_model(name, **asked, **wished); a wish whose argument the backbone lacks is dropped and left in
    `model.not_taken` for the export, which must not write it down.
    """
    wished, not_taken = dict(wished), []
    while True:
        try:
            model = timm.create_model(name, **asked, **wished)
            model.not_taken = tuple(not_taken)
            return model
        except OSError as error:
            raise UserError(_out_of_reach(name, error)) from error
        except _REFUSALS as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in wished:
                given = ", ".join(f"{key}={value}" for key, value in (asked | wished).items() if value is not None)
                raise UserError(f"timm cannot build {name} with {given}: {_first_line(error)}") from error
            del wished[unknown[1]]
            not_taken.append(unknown[1])


def _out_of_reach(name: str, error: OSError) -> str:
    source = get_pretrained_cfg(name)
    where = source.hf_hub_id or source.url or name
    return (
        f"the pretrained weights {where} are not in the local cache and their hub could not be reached "
        f"({type(error).__name__}); download them elsewhere and give --pretrained-path FILE"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def load_weights(model: nn.Module, path: str | Path, *, part: str = "") -> bool:
    """Loads published or trained weights of the same backbone, see `read_weights`, into a model of `build_model`.

    part: `image.` to take the image model's out of the weights of a model of images and captions.

    Weights made for another image or window size are resampled by timm's own `checkpoint_filter_fn` of the backbone.
    A classifier of another width or kind is left out, with a line that says so and False as the result. UserError for
    an unreadable file, and with a list for any other weight that is missing, left over or of another shape.
    """
    state = read_weights(Path(path))
    if part:
        state = {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
    state = unfold(_resampled(state, model, path), model)
    note = _drop_other_classifier(state, model)
    head = classifier_prefixes(model)
    own = model.state_dict()
    problems = [
        f"{key} is {list(state[key].shape)} in the file and {list(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not problems:
        result = model.load_state_dict(state, strict=False)
        problems += [f"{key} is not in the file" for key in result.missing_keys if not key.startswith(head)]
        problems += [f"{key} is not in the model" for key in result.unexpected_keys]
    if problems:
        raise UserError(
            f"{path} does not fit {model.pretrained_cfg['architecture']} ({len(problems)} weights):\n"
            f"{listed(problems, 10)}"
        )
    if note and model.num_classes:
        say(f"{path}: {note}")
    return not note


def _resampled(state: dict[str, torch.Tensor], model: nn.Module, path: str | Path) -> dict[str, torch.Tensor]:
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    try:
        return dict(adapt(state, model))
    except _REFUSALS as error:
        raise UserError(f"{path} does not fit {model.pretrained_cfg['architecture']}: {_first_line(error)}") from error


def _drop_other_classifier(state: dict[str, torch.Tensor], model: nn.Module) -> str:
    """Takes a classifier that is not the model's out of `state`; a line about it, or nothing where it fits."""
    known = _shapes(state, ("label_head.", *timm_classifiers(model)))
    if known == _shapes(model.state_dict(), classifier_prefixes(model)):
        return ""
    for key in known:
        del state[key]
    if any(key.startswith("label_head.") for key in known):
        found = "its classifier is of another --head"
    elif known:
        found = f"its classifier has {', '.join(map(str, sorted({shape[0] for shape in known.values()})))} outputs"
    else:
        found = "it has no classifier"
    head = f" and --head {model.head_spec['head']}" if hasattr(model, "head_spec") else ""
    return f"{found}, this model has {model.num_classes}{head}: a new classifier is trained"


def _shapes(state: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items() if key.startswith(prefixes)}
