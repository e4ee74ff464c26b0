"""Settings that cannot be meant: each is one line that names the flag, before anything is read or built."""

import math
import re
from collections.abc import Iterator
from typing import Any

from shards.console import UserError

RECOMPUTED = r"none|all|attention|every:([1-9]\d*)"  # what --grad-checkpointing takes
# What only a model with captions has.
_CAPTIONS = ("fusion", "fusion_kwargs", "text_kwargs", "text_pool", "max_tokens", "clean", "word_dropout")
_CAPTIONS += ("caption_dropout", "mix_captions", "embeddings", "text_lr_mult", "text_layer_decay", "group_by_length")
_CAPTIONS += ("load", "load_text", "load_combine")

# What changes images, or the models that see them.
_IMAGES = ("model", "pretrained", "pretrained_path", "img_size", "drop_path", "model_kwargs", "freeze", "layer_decay")
_IMAGES += ("init_head", "grad_checkpointing", "compile", "text_model", "kd_feature")
_IMAGES += ("vflip", "color_jitter", "aa", "reprob", "cutout")
_WITH_POS_WEIGHT = ("bce", "focal", "asl")  # whose value is of one class alone
_ON_FEATURES = ("linear", "mlp", "lstm")  # heads that look at no places of an image

_RANGES = (
    (("hard_mining",), lambda x: 0 <= x <= 1, "in [0, 1]"),
    (("cutout", "mixup_switch_prob", "splicemix", "focal_alpha"), lambda x: 0 <= x <= 1, "in [0, 1]"),
    (("asl_clip", "momentum"), lambda x: 0 <= x < 1, "in [0, 1)"),
    (("word_dropout", "caption_dropout"), lambda x: 0 <= x <= 1, "in [0, 1]"),
    (("layer_decay", "text_layer_decay"), lambda x: 0 < x <= 1, "in (0, 1]"),
    (("patience", "max_tokens"), lambda x: x >= 1, "at least 1"),
    (("weighted_beta",), lambda x: 0 < x < 1, "in (0, 1)"),
    (("zero_division",), lambda x: x in (0, 1), "0 or 1"),
    (
        ("two_way_temp", "db_neg_scale", "fbeta", "head_lr_mult", "text_lr_mult", "decay_rate"),
        lambda x: x > 0,
        "above 0",
    ),
    (
        ("color_jitter", "cutmix", "focal_gamma", "asl_gamma_neg", "asl_gamma_pos", "db_gamma", "db_bias"),
        lambda x: x >= 0,
        "at least 0",
    ),
)


def impossible(c: Any) -> Iterator[str]:
    """One line for each value and combination of a `Config` that cannot be meant."""
    for name, value in vars(c).items():
        for number in _numbers(value):
            if not math.isfinite(number):
                yield f"{flag(name)} must be finite, not {number}"
    for name in ("batch_size", "img_size", "log_interval", "checkpoint_hist"):
        if getattr(c, name) != "auto" and getattr(c, name) < 1:
            yield f"{flag(name)} must be at least 1, not {getattr(c, name)}"
    if c.batch_size == "auto" and c.global_batch_size is None:
        yield "--batch-size auto needs --global-batch-size, the samples of a step, which it divides"
    for name in ("hflip", "vflip", "reprob", "mixup_prob", "kd_alpha", "smoothing", "drop", "drop_path", "threshold"):
        if not 0 <= getattr(c, name) <= 1:
            yield f"{flag(name)} must be in [0, 1], not {getattr(c, name)}"
    for name in ("epochs", "lr", "kd_temp", "opt_eps", "crop_pct", "cache_gb", "collective_timeout"):
        if getattr(c, name) != "auto" and not getattr(c, name) > 0:
            yield f"{flag(name)} must be above 0, not {getattr(c, name)}"
    at_least_0 = ("workers", "max_bad_samples", "mixup", "weight_decay", "warmup_lr", "min_lr", "wandb_samples")
    for name in (*at_least_0, "kd_feature"):
        if getattr(c, name) < 0:
            yield f"{flag(name)} must not be negative, not {getattr(c, name)}"
    for names, allowed, text in _RANGES:
        for name in names:
            if (value := getattr(c, name)) not in (None, "auto") and not allowed(value):
                yield f"{flag(name)} must be {text}, not {value}"
    for group, weight in c.group_weight.items():
        if weight < 0:
            yield f"--group-weight {group}={weight} must not be negative"
    for name in ("scale", "ratio"):
        low, high = getattr(c, name)
        if not 0 < low <= high:
            yield f"{flag(name)} takes a smaller and a larger number above 0, not {low} {high}"
    if c.db_map[0] < 0 or c.db_map[1] <= 0:
        yield f"--db-map takes a least weight of at least 0, a slope above 0 and a middle, not {_spaced(c.db_map)}"
    for name in (c.loss, *c.group_loss.values()):
        if c.pos_weight != "none" and name not in _WITH_POS_WEIGHT:
            losses = ", ".join(_WITH_POS_WEIGHT)
            yield f"--pos-weight {c.pos_weight} weighs the positives of {losses}; take --pos-weight none with {name}"
    if not re.fullmatch(RECOMPUTED, c.grad_checkpointing):
        yield f"--grad-checkpointing {c.grad_checkpointing}: choose none, all, attention or every:K (every K-th block)"
    if c.max_steps is not None and c.max_steps < 1:
        yield f"--max-steps must be at least 1, not {c.max_steps}"
    if c.pretrained and c.pretrained_path:
        yield "--pretrained and --pretrained-path exclude each other; keep one"
    if c.resume_weights_only and c.resume in ("", "auto"):
        yield "--resume-weights-only needs --resume PATH, the checkpoint or run whose weights to start from"
    if c.kd_alpha and not c.kd_teacher and c.kd_alpha != type(c).kd_alpha:
        yield f"--kd-alpha {c.kd_alpha} needs --kd-teacher"
    if c.kd_rule == "max" and not c.kd_teacher:
        yield "--kd-rule max needs --kd-teacher"
    if "ema" in c.kd_teacher and not c.model_ema:
        yield "--kd-teacher ema needs the averaged weights; take out --no-model-ema"
    if c.kd_feature and (len(c.kd_teacher) != 1 or c.kd_teacher[0].lower().endswith((".csv", ".arrow"))):
        yield "--kd-feature needs one --kd-teacher that is a model: a file has no features, several have no common ones"
    yield from _impossible_features(c)
    if c.hard_list and not c.hard_mining:
        yield "--hard-list needs --hard-mining, the share of the samples to take from it"
    yield from _impossible_captions(c)
    if c.init_head and (c.head != "linear" or c.text_model):
        yield "--init-head starts the classifier of an image model with --head linear, and no other"
    if c.lr == "auto" and c.resume_weights_only:
        yield "--resume-weights-only trains on what a run has learned; give the --lr for that"


def _impossible_features(c: Any) -> Iterator[str]:
    if not c.features:
        if c.feature_norm != type(c).feature_norm:
            yield f"--feature-norm {c.feature_norm} needs --features FILE, which `mlc features` makes"
        return
    for name in _IMAGES:
        if getattr(c, name) not in (getattr(type(c), name, None), {}, None):
            yield f"{flag(name)} is for models that see images or captions; with --features a head is trained alone"
    if c.head not in _ON_FEATURES:
        yield f"--head {c.head} looks at an image; with --features choose one of {', '.join(_ON_FEATURES)}"
    if len(c.data) > 1:
        yield "--features are of one data set; give one --data"
    if not c.experiment:
        yield "--features needs --experiment NAME, the name of the run"
    for name in c.kd_teacher:
        if name != "ema" and not name.lower().endswith((".csv", ".arrow")):
            yield f"--kd-teacher {name} sees images; with --features give its predictions (`mlc predict --split train`)"


def _impossible_captions(c: Any) -> Iterator[str]:
    if not c.text_model:
        for name in _CAPTIONS:
            if getattr(c, name) not in ("", "none", None, {}, []) and getattr(c, name) != getattr(type(c), name, None):
                image = "; an image model starts from --pretrained-path RUN/best" if name == "load" else ""
                yield f"{flag(name)} needs --text-model, which reads the captions{image}"
        return
    from mlc.models.fusion import check_fusion  # which imports torch, and most settings have no captions

    try:
        check_fusion(c.fusion, c.fusion_kwargs)
    except UserError as error:
        yield str(error)
    if c.fusion == "none" and (c.load or c.load_combine):
        yield f"{flag('load' if c.load else 'load_combine')} needs a --fusion: without one there is no image model"
    if c.load_combine and (c.load or c.load_text):
        yield "--load-combine has both parts; leave --load and --load-text out"
    if c.load and (c.pretrained or c.pretrained_path):
        yield "--load and --pretrained, --pretrained-path exclude each other; keep one"
    if c.embeddings and c.text_model != "bigru":
        yield f"--embeddings are word vectors for --text-model bigru, not for {c.text_model}"
    if c.text_layer_decay and c.text_model == "bigru":
        yield "--text-layer-decay: bigru has one layer; take --text-lr-mult"
    if c.text_pool != "cls" and c.text_model == "bigru":
        yield "--text-pool: bigru has a pooling of its own, --text-kwargs attention=true|false"
    if c.kd_feature and c.fusion == "none":
        yield "--kd-feature compares features of images, and without a --fusion none is looked at"


def _numbers(value: Any) -> Iterator[float]:
    """The floats in a setting: itself, or those of a list, tuple or dict."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _spaced(numbers: tuple[float, ...]) -> str:
    return " ".join(map(str, numbers))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
