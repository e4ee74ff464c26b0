"""What `auto` stands for: one rule for each setting, from optimizer, backbone, batch and length of the run.

A rate that suits one network trains another not at all: 1e-4 is that of a large pretrained transformer, and a small
ConvNet learns nothing with it in a short run. The noise of a gradient falls with the square root of the batch, so
Adam's rate may grow with it (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms").
Pretrained layers know the more the earlier they are: they learn slower, and a new classifier faster.
"""

import math
from dataclasses import replace

import timm

from mlc.captions import text_only
from mlc.config import Config
from mlc.models.build import resolve_name
from mlc.stages import Stage
from shards.console import UserError

BATCH = 16  # samples of a step, for which the rates stand
# Modules of timm whose networks have layer norm throughout; they want smaller rates than those with batch norm.
LAYER_NORM = ("beit", "cait", "convit", "convnext", "crossvit", "davit", "deit", "eva", "focalnet", "gcvit", "hiera")
LAYER_NORM += ("mambaout", "metaformer", "mlp_mixer", "mvitv2", "naflexvit", "nest", "pvt_v2", "swin", "tnt", "twins")
LAYER_NORM += ("vision_transformer", "vitamin", "volo", "xcit")
# (AdamW's peak rate at BATCH, the most for a large batch): batch or layer norm, from published weights or from nothing.
RATES = {
    ("batch norm", True): (2e-3, 5e-3),
    ("batch norm", False): (2e-3, 5e-3),
    ("layer norm", True): (2.5e-4, 1e-3),
    ("layer norm", False): (2e-3, 3e-3),
    ("features", True): (7e-4, 3e-3),
    ("text", True): (5e-5, 2e-4),
    ("text", False): (1e-3, 3e-3),
}
LAYER_DECAY, HEAD = 0.8, 3.0  # of a pretrained image model, and of its new classifier
OPTIMIZERS = {"adamw": 1.0, "adam": 1.0, "nadamw": 1.0, "lamb": 3.0, "lion": 0.2, "sgd": 10.0}  # times AdamW's
HORIZON = 0.1  # share of the run that a moving average looks back on
MOST_DECAY = 0.9998


def with_numbers(stage: Stage, global_batch: int) -> tuple[Stage, list[str]]:
    """(the stage with numbers for what is `auto`, a line for each that counts)."""
    config, said = stage.config, []
    found = {"head_lr_mult": 1.0}
    found |= {} if config.features else {"layer_decay": 1.0}  # settings of what is not there stay as they are
    found |= {"text_lr_mult": 1.0} if config.text_model else {}
    if config.lr == "auto":
        numbers, text = rates(config, global_batch)
        found |= numbers
        said.append(text)
    found["model_ema_decay"] = ema_decay(stage.total // global_batch)
    asked = {name: value for name, value in found.items() if getattr(config, name) == "auto"}
    if "model_ema_decay" in asked and config.model_ema and not config.swa_start:
        said.append(f"decay of the average auto: {asked['model_ema_decay']:.4g}")
    return replace(stage, config=replace(config, **asked)), said


def rates(config: Config, global_batch: int) -> tuple[dict[str, float], str]:
    """({lr and the factors of layers, classifier and text encoder that go with it}, how they came about).

    Raises:
        UserError: an optimizer that the rule does not know.
    """
    known = bool(config.pretrained or config.pretrained_path or config.load or config.load_combine)
    text_known = not config.text_kwargs and config.text_model != "bigru"
    if config.features:
        kind = "features", True
    elif text_only(config):
        kind = "text", text_known
    else:
        kind = norm_of(config.model), known
    rate = _rate(kind, config.opt, global_batch)
    found = {"lr": rate}
    start = "frozen" if config.features else "pretrained weights" if kind[1] else "new weights"
    text = f"learning rate auto: {rate:g} ({config.opt}, {kind[0]}, {start}, {global_batch} samples a step)"
    if config.text_model and not text_only(config):
        own = _rate(("text", text_known), config.opt, global_batch)
        found["text_lr_mult"] = own / rate
        text += _named(config, "text_lr_mult", f"; of the captions {own:g}")
    elif known and not config.features:
        found["layer_decay"], found["head_lr_mult"] = LAYER_DECAY, 1.0 if config.init_head else HEAD
        text += _named(config, "layer_decay", f"; {LAYER_DECAY} of it a layer further down")
        if not config.init_head:
            text += _named(config, "head_lr_mult", f"; {HEAD:g} times for the classifier")
    return found, text


def _named(config: Config, name: str, text: str) -> str:
    return text if getattr(config, name) == "auto" else ""


def _rate(kind: tuple[str, bool], opt: str, global_batch: int) -> float:
    """Rounded to two digits: the table's, times the optimizer's factor and the square root of the batch over BATCH."""
    if opt not in OPTIMIZERS:
        raise UserError(f"--lr auto knows no rate for --opt {opt}, only for {', '.join(OPTIMIZERS)}; give a number")
    rate, most = RATES[kind]
    return float(f"{OPTIMIZERS[opt] * min(most, rate * math.sqrt(global_batch / BATCH)):.2g}")


def norm_of(model: str) -> str:
    """`layer norm` or `batch norm`, by timm's module of the backbone."""
    architecture = resolve_name(model)[0].partition(".")[0]
    module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    return "layer norm" if module.startswith(LAYER_NORM) else "batch norm"


def ema_decay(steps: int) -> float:
    """The decay of a moving average that looks back on HORIZON of so many steps: one with a fixed decay still holds
    its first weights at the end of a short run."""
    return min(MOST_DECAY, 1 - 1 / max(2.0, HORIZON * steps))
