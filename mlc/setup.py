"""Model and optimizer of a run, from its settings."""

import re
from collections.abc import Sequence

import numpy as np
import torch

from mlc.captions import Reading, load_text_parts, text_only
from mlc.config import Config
from mlc.data.sources import Sources
from mlc.models.build import build_model
from mlc.models.feature_head import FeatureHead
from mlc.models.fusion import Fused
from mlc.models.heads import classifier_prefixes, init_head_bias, last_layers
from mlc.models.init_head import init_head
from mlc.models.text import layer_scales
from mlc.optim.optimizers import make_optimizer
from mlc.optim.param_groups import param_groups
from shards.console import UserError


def model_of(config: Config, sources: Sources, reading: Reading | None = None, *, published: bool) -> torch.nn.Module:
    """The model, on the CPU and in training mode; `reading`: of the captions, if any.

    published: start from the published weights of the settings, if any; else what is loaded afterwards replaces them.
    """
    sampler, classes = sources.sampler, sources.dataset.classes
    if config.features:
        model = _feature_head(config, sources)
    else:
        model = None if text_only(config) else _image_model(config, sources, published)
    if reading:
        model = reading.model(model, config, num_classes=len(classes), published=published)
    biased = all(bias is not None for _, bias in last_layers(model))
    if config.head_bias == "prior" or (config.head_bias == "auto" and biased):
        samples = sampler.epoch_samples
        init_head_bias(model, (sampler.expected_frequencies() * samples + 1) / (samples + 2))
    if published:
        load_text_parts(model, config, classes)
        if config.init_head:
            init_head(model, config.init_head, classes)
    return model


def _image_model(config: Config, sources: Sources, published: bool) -> torch.nn.Module:
    return build_model(
        name=config.model,
        num_classes=len(sources.dataset.classes),
        img_size=config.img_size,
        head=config.head,
        head_kwargs=config.head_kwargs,
        cooccurrence=sources.cooccurrence() if config.head == "gcn" else None,
        pretrained=config.pretrained and published,
        pretrained_path=config.pretrained_path or None if published else None,
        drop=config.drop,
        drop_path=config.drop_path,
        model_kwargs=config.model_kwargs,
        attention=config.attention,
    )


def refuse_sizes(parts: Sequence[Config], sources: Sources) -> None:
    """Raises UserError where stages see images of different sizes, and the shapes of the weights follow the size."""
    by_size = {part.img_size: part for part in parts if not text_only(part) and not part.features}
    if len(by_size) < 2:
        return
    shapes: dict[str, torch.Size] = {}
    for size, part in by_size.items():
        with torch.device("meta"):
            state = _image_model(part, sources, published=False).state_dict()
        for name, value in state.items():
            if shapes.setdefault(name, value.shape) != value.shape:
                raise UserError(
                    f"stages with images of {next(iter(by_size))} and {size} pixels: {name} of {part.model} has the "
                    f"shapes {list(shapes[name])} and {list(value.shape)}; only networks whose weights fit every size "
                    "(ConvNets, SwinV2 with a window that fits all) can change --img-size on the way"
                )


def _feature_head(config: Config, sources: Sources) -> torch.nn.Module:
    features, index = sources.features, sources.readers[0].index
    rows = sources.sampler.sources[0].rows
    standardize = config.feature_norm == "standardize"
    return FeatureHead(
        [encoder["features"] for encoder in features.encoders],
        len(sources.dataset.classes),
        head=config.head,
        head_kwargs=config.head_kwargs,
        norm=config.feature_norm,
        drop=config.drop,
        statistics=features.statistics(np.arange(len(index)) if rows is None else rows) if standardize else None,
    )


def _text_scales(model: Fused, config: Config) -> dict[str, float]:
    """{name of a parameter of the text encoder: factor of its learning rate}"""
    scales = layer_scales(model.text.encoder, config.text_layer_decay or 1.0)
    return {f"text.encoder.{name}": config.text_lr_mult * scale for name, scale in scales.items()}


def optimizer_of(model: torch.nn.Module, *, config: Config, only_elementwise: bool) -> torch.optim.Optimizer:
    """For the bare model, whole or divided; only_elementwise: as in `make_optimizer`."""
    factors = dict(config.lr_mult)
    if config.head_lr_mult != 1:  # where no expression of --lr-mult is found
        factors |= {f"^{re.escape(prefix)}": config.head_lr_mult for prefix in classifier_prefixes(model)}
    groups = param_groups(
        model,
        config.weight_decay,
        layer_decay=None if config.layer_decay in (1, "auto") else config.layer_decay,
        lr_mult=factors,
        wd_mult=config.wd_mult,
        scales=_text_scales(model, config) if config.text_model else None,
    )
    return make_optimizer(
        groups,
        name=config.opt,
        lr=config.lr,
        betas=config.opt_betas,
        eps=config.opt_eps,
        momentum=config.momentum,
        only_elementwise=only_elementwise,
    )
