"""Every setting of a run: one flat dataclass, read from YAML files (`-c`) and the command line, which wins.

The text under a field is its `--help`; the banners are its help groups. Names and meanings are timm's where timm has the flag.
Durations are written `2ep`, `500st` or `10000ex` (epochs, optimizer steps, examples); a bare number counts epochs.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from shards.console import Parser, UserError, did_you_mean


@dataclass(kw_only=True)
class Config:
    # ---- Data ----
    data: str = ""
    """folder made by `mlc pack` or `mlc index`"""
    train_split: str = "train"
    """split to train on"""
    val_split: str = "val"
    """split to evaluate on while training; '' for none"""
    workers: int = 4
    """processes that decode images, per device; 0 decodes in the training process"""
    log_samples: str = ""
    """write one JSON line per step to this file: the keys of the global batch in order, a checksum of each augmented image, its mixing partner and lambda"""

    # ---- Model ----
    model: str = "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"
    """any timm backbone"""
    pretrained: bool = False
    """start from timm's published weights of that name"""
    pretrained_path: str = ""
    """start from these weights: .safetensors or .pth of the same backbone"""
    img_size: int = 256
    """pixels of a side of the square the model sees"""
    head: Literal["linear", "extra_linear"] = "linear"
    """`linear`: the backbone's own classifier; `extra_linear`: its 1000 logits -> the classes"""
    head_bias: Literal["zero", "prior"] = "zero"
    """first bias of the classifier; `prior`: logit of each class's frequency in the training split"""
    drop: float = 0.0
    """dropout before the classifier"""
    drop_path: float = 0.0
    """stochastic depth, rate at the last block"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third slower"""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """more arguments of the timm model, as k=v, e.g. --model-kwargs embed_dim=48 'depths=[2,2,2]'"""

    # ---- Batch and length ----
    batch_size: int = 32
    """samples per device and forward pass"""
    global_batch_size: int | None = None
    """samples per optimizer step over all devices; gradient accumulation follows from it (default: batch size x devices)"""
    validation_batch_size: int | None = None
    """samples per device in evaluation (default: the batch size)"""
    epochs: float = 20
    """length of the training in passes over the data; a fraction is allowed"""
    max_steps: int | None = None
    """length of the training in optimizer steps instead"""
    seed: int = 42
    """one number behind data order, augmentation, initial weights and dropout"""

    # ---- Optimisation ----
    lr: float = 1e-4
    """peak learning rate of AdamW"""
    weight_decay: float = 0.05
    """decoupled weight decay; norms, biases, position parameters and logit_scale take none"""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas"""
    opt_eps: float = 1e-8
    """AdamW's epsilon"""
    clip_grad: float | None = None
    """largest gradient norm over all parameters (default: no clipping)"""
    sched: Literal["cosine", "step", "constant"] = "cosine"
    """learning rate after the warm-up"""
    warmup: str = "0ep"
    """duration of the linear warm-up"""
    warmup_lr: float = 0.0
    """learning rate at the start of the warm-up"""
    min_lr: float = 0.0
    """learning rate at the end of `cosine`"""
    decay_every: str = "8ep"
    """`step`: duration between two cuts of the learning rate"""
    decay_rate: float = 0.5
    """`step`: factor of each cut"""
    amp_dtype: Literal["auto", "none", "bf16", "fp16"] = "auto"
    """autocast; `auto` takes the launcher's --mixed_precision on a GPU and none on a CPU"""
    model_ema: bool = True
    """keep an exponential moving average of the weights and evaluate it as well"""
    model_ema_decay: float = 0.9998
    """decay of the average per optimizer step"""
    model_ema_warmup: bool = True
    """start the average with a smaller decay, (1 + step) / (10 + step)"""

    # ---- Loss ----
    loss: Literal["bce", "focal"] = "bce"
    """loss of one logit"""
    focal_gamma: float = 2.0
    """`focal`: how much less an easy label counts"""
    focal_alpha: float | None = None
    """`focal`: weight of the positives in [0, 1], 1 - alpha of the negatives (default: no weights)"""
    smoothing: float = 0.0
    """label smoothing s of a sigmoid: targets y (1 - s) + s / 2"""
    kd_teacher: str = ""
    """distil from this run (its best weights) or exported model folder"""
    kd_alpha: float = 0.5
    """share of the distillation loss; the labels keep 1 - alpha"""
    kd_temp: float = 2.0
    """temperature of the distillation"""

    # ---- Augmentation ----
    crop: Literal["rrc", "squish", "center"] = "rrc"
    """training crop: random resized crop, the whole image squeezed, or the centre square"""
    val_crop: Literal["squish", "center"] = "squish"
    """crop in evaluation and prediction"""
    crop_pct: float = 1.0
    """`--val-crop center`: side of the crop as a share of the short side"""
    scale: tuple[float, float] = (0.08, 1.0)
    """`rrc`: smallest and largest area of the crop, as shares of the image"""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """`rrc`: smallest and largest aspect of the crop"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    vflip: float = 0.0
    """probability of a vertical flip"""
    aa: str = ""
    """timm's policy: rand-m9-mstd0.5-inc1, original, v0, 3a, augmix-m5-w4"""
    reprob: float = 0.0
    """probability of random erasing"""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """what the erased box is filled with: the mean colour, one random colour, noise"""
    mixup: float = 0.0
    """alpha of mixup's Beta distribution; 0 is off"""
    mixup_prob: float = 1.0
    """probability that a pair of samples is mixed"""
    mixup_off: str = ""
    """stop mixing after this duration"""

    # ---- Evaluation and checkpoints ----
    eval_every: str = "1ep"
    """duration between evaluations; one more at the end"""
    eval_metric: str = "f1_samples"
    """the best weights are those with the highest value of this (or the lowest `loss`)"""
    threshold: float = 0.5
    """a class is predicted above this probability (the tuned threshold is reported as well)"""
    checkpoint_every: str = "1ep"
    """duration between checkpoints; one more at the end and at a stop"""
    checkpoint_hist: int = 2
    """checkpoints kept"""
    resume: str = ""
    """`auto`: go on from the newest checkpoint of this run if there is one; or a path of a checkpoint or a run"""

    # ---- Run and log ----
    output: str = "runs"
    """folder of the runs"""
    experiment: str = ""
    """name of the run, its folder below --output (default: model and image size)"""
    log_interval: int = 50
    """optimizer steps between two lines of the log"""
    log_wandb: bool = False
    """mirror the log to Weights & Biases; WANDB_MODE=offline works"""
    wandb_project: str = "mlc"
    """project at Weights & Biases"""

    def __post_init__(self):
        for message in _impossible(self):
            raise UserError(message)


def _impossible(c: Config) -> typing.Iterator[str]:
    """One line for each combination that cannot be meant."""
    for name in ("batch_size", "img_size", "log_interval", "checkpoint_hist"):
        if getattr(c, name) < 1:
            yield f"{flag(name)} must be at least 1, not {getattr(c, name)}"
    for name in ("hflip", "vflip", "reprob", "mixup_prob", "kd_alpha", "smoothing", "drop", "drop_path", "threshold"):
        if not 0 <= getattr(c, name) <= 1:
            yield f"{flag(name)} must be in [0, 1], not {getattr(c, name)}"
    for name in ("epochs", "lr", "kd_temp", "opt_eps", "crop_pct"):
        if not getattr(c, name) > 0:
            yield f"{flag(name)} must be above 0, not {getattr(c, name)}"
    for name in ("workers", "mixup", "weight_decay", "warmup_lr", "min_lr"):
        if getattr(c, name) < 0:
            yield f"{flag(name)} must not be negative, not {getattr(c, name)}"
    for name in ("scale", "ratio"):
        low, high = getattr(c, name)
        if not 0 < low <= high:
            yield f"{flag(name)} takes a smaller and a larger number above 0, not {low} {high}"
    if c.max_steps is not None and c.max_steps < 1:
        yield f"--max-steps must be at least 1, not {c.max_steps}"
    if c.pretrained and c.pretrained_path:
        yield "--pretrained and --pretrained-path exclude each other; keep one"
    if c.kd_alpha and not c.kd_teacher and c.kd_alpha != Config.kd_alpha:
        yield f"--kd-alpha {c.kd_alpha} needs --kd-teacher"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- reading ---------------------------------------------------------------------------------------------------------

SHORT = {"batch_size": "-b", "workers": "-j", "validation_batch_size": "-vb"}
RECIPES = Path(__file__).parent / "recipes"


def read_config(argv: list[str] | None = None, prog: str = "train.py") -> Config:
    """The configuration of a command line: defaults, then each -c file in order, then the flags.

    Raises:
        UserError: an unknown key, a wrong type or an impossible combination, naming the field.
    """
    given = vars(_parser(prog).parse_args(argv))
    settings: dict[str, Any] = {}
    for source in given.pop("config", []):
        settings |= read_yaml(source)
    return Config(**(settings | given))


def read_yaml(source: str | Path) -> dict[str, Any]:
    """Checked settings of a YAML file, or of a packaged recipe by its name."""
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise UserError(f"-c {source}: neither a file nor a recipe{did_you_mean(str(source), names)} (recipes: {', '.join(names)})")
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected `name: value` lines, found a {type(loaded).__name__}")
    types_of = typing.get_type_hints(Config)
    settings = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in types_of:
            raise UserError(f"{path}: unknown setting {key!r}{did_you_mean(name, list(types_of))}")
        try:
            settings[name] = convert(value, types_of[name])
        except ValueError as error:
            raise UserError(f"{path}: {key}: {error}") from error
    return settings


def write_yaml(config: Config, path: Path) -> None:
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def convert(value: Any, kind: Any) -> Any:
    """A value from YAML or the command line as the type of its field; ValueError says what was expected."""
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None or value in ("none", "None") else convert(value, typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, not {value!r}{did_you_mean(str(value), choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(members):
            raise ValueError(f"expected {len(members)} numbers, not {value!r}")
        return tuple(convert(v, k) for v, k in zip(value, members, strict=True))
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"expected `name: value` pairs, not {value!r}")
        return value
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        named = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in named:
            raise ValueError(f"expected true or false, not {value!r}")
        return named[str(value).lower()]
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except (ValueError, OverflowError):
            pass
    noun = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ValueError(f"expected {noun}, not {value!r}")


def _parser(prog: str) -> Parser:
    """One flag per field; a flag that is not given leaves no attribute, so that YAML and defaults show through."""
    parser = Parser(prog=prog, argument_default=argparse.SUPPRESS, description="Trains a multi-label classifier on shards.",
                    epilog="example: accelerate launch --config_file accelerate_config.yaml train.py -c demo --data data/demo-shards "
                           "--experiment demo")
    parser.add_argument("-c", "--config", action="append", metavar="RECIPE|FILE",
                        help="YAML settings: a recipe's name (`mlc recipes`) or a file; may be repeated, later ones win")
    kinds, defaults = typing.get_type_hints(Config), {f.name: f for f in dataclasses.fields(Config)}
    for group, fields in documented_fields(Config).items():
        section = parser.add_argument_group(group)
        for name, text in fields.items():
            _add_flag(section, name, kinds[name], f"{text}{_default_text(defaults[name])}")
    return parser


def _add_flag(section, name: str, kind: Any, text: str) -> None:
    names = [SHORT[name]] if name in SHORT else []
    names.append(flag(name))
    text = text.replace("%", "%%")
    metavar = re.sub(r".*_", "", name).upper()

    def parse(value: str) -> Any:
        try:
            return convert(value, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    if kind is bool:
        section.add_argument(*names, nargs="?", const=True, type=parse, metavar="true|false", help=text)
        section.add_argument(f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is tuple:
        section.add_argument(*names, nargs=len(typing.get_args(kind)), type=float, metavar=metavar, action=_AsTuple, help=text)
    elif typing.get_origin(kind) is dict:
        section.add_argument(*names, nargs="+", type=_key_value, action=_AsDict, metavar="K=V", help=text)
    elif typing.get_origin(kind) is Literal:
        section.add_argument(*names, type=parse, metavar="|".join(typing.get_args(kind)), help=text)
    else:
        section.add_argument(*names, type=parse, metavar=metavar, help=text)


class _AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _AsDict(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, dict(values))


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected name=value, not {text!r}")
    return key, yaml.safe_load(value)


def _default_text(f: dataclasses.Field) -> str:
    if f.default is dataclasses.MISSING or f.default in (None, "") or isinstance(f.default, bool):
        return " (on by default; --no-" + f.name.replace("_", "-") + " turns it off)" if f.default is True else ""
    shown = " ".join(f"{x:g}" for x in f.default) if isinstance(f.default, tuple) else f.default
    return f" (default: {shown})"


def documented_fields(cls: type) -> dict[str, dict[str, str]]:
    """{banner: {field: the text under it}}, read from the source, so that help and code cannot drift apart."""
    source = inspect.getsource(cls)
    banners = [(number, match[1]) for number, line in enumerate(source.splitlines(), 1)
               if (match := re.match(r"\s*# ---- (.*?) -*$", line))]
    groups: dict[str, dict[str, str]] = {title: {} for _, title in banners}
    body = ast.parse(inspect.cleandoc(source)).body[0].body
    for node, text in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
            title = [title for number, title in banners if number < node.lineno][-1]
            groups[title][node.target.id] = " ".join(text.value.value.split())
    return groups
