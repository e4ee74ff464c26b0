"""`--lr auto` and `--model-ema-decay auto`: one rule each, from the optimizer, the backbone, the batch and the length.

A rate that suits one network trains another not at all: 1e-4 is that of a large pretrained transformer, and a small
ConvNet learns nothing with it in a short run. The noise of a gradient falls with the square root of the batch, so
Adam's rate may grow with it (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms").
"""

import math
from dataclasses import replace

import timm

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
}
OPTIMIZERS = {"adamw": 1.0, "adam": 1.0, "nadamw": 1.0, "lamb": 3.0, "lion": 0.2, "sgd": 10.0}  # times AdamW's
HORIZON = 0.1  # share of the run that a moving average looks back on
MOST_DECAY = 0.9998


def with_numbers(stage: Stage, global_batch: int) -> tuple[Stage, list[str]]:
    """(the stage with numbers for what is `auto`, a line for each)."""
    config, said, found = stage.config, [], {}
    if config.lr == "auto":
        pretrained = bool(config.pretrained or config.pretrained_path or config.load or config.load_combine)
        how = {"model": config.model, "opt": config.opt, "global_batch": global_batch, "pretrained": pretrained}
        found["lr"], text = learning_rate(**how)
        said.append(text)
    if config.model_ema_decay == "auto":
        found["model_ema_decay"] = ema_decay(stage.total // global_batch)
        if config.model_ema:
            said.append(f"decay of the average auto: {found['model_ema_decay']:.4g}")
    return replace(stage, config=replace(config, **found)), said


def learning_rate(*, model: str, opt: str, global_batch: int, pretrained: bool) -> tuple[float, str]:
    """(peak rate rounded to two digits, how it came about): the table's, times the optimizer's factor and the square
    root of the batch over BATCH.

    Raises:
        UserError: an optimizer that the rule does not know.
    """
    if opt not in OPTIMIZERS:
        raise UserError(f"--lr auto knows no rate for --opt {opt}, only for {', '.join(OPTIMIZERS)}; give a number")
    norm = norm_of(model)
    rate, most = RATES[norm, pretrained]
    found = float(f"{OPTIMIZERS[opt] * min(most, rate * math.sqrt(global_batch / BATCH)):.2g}")
    start = "pretrained weights" if pretrained else "new weights"
    return found, f"learning rate auto: {found:g} ({opt}, {norm}, {start}, {global_batch} samples a step)"


def norm_of(model: str) -> str:
    """`layer norm` or `batch norm`, by timm's module of the backbone."""
    architecture = resolve_name(model)[0].partition(".")[0]
    module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    return "layer norm" if module.startswith(LAYER_NORM) else "batch norm"


def ema_decay(steps: int) -> float:
    """The decay of a moving average that looks back on HORIZON of so many steps: one with a fixed decay still holds
    its first weights at the end of a short run."""
    return min(MOST_DECAY, 1 - 1 / max(2.0, HORIZON * steps))
