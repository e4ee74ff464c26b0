"""Weights leave a run as plain timm: `model.safetensors` and `config.json` in the layout of timm's hub models, so that

    timm.create_model("local-dir:runs/NAME/best", pretrained=True)

gives the same logits without this package, and no pickle is ever opened to read them. Only the heads of
mlc/models/label_*.py and `mlp`, which timm does not have, need this package: `load_exported`. So do models of images
and captions, whose `text/` beside these files says what the text's encoder is and holds its tokenizer.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlc.models.build import fast_memory_format
from mlc.models.feature_head import FeatureHead
from mlc.models.fusion import Fused
from mlc.models.heads import add_label_head, fold
from mlc.models.swin_attention import use_fast_attention
from shards.console import UserError
from shards.files import check_download, disk_errors, whole
from shards.json_text import to_json

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_FIX = "give a folder with exported weights, such as RUN/best"
CROP_MODES = {"squish": "squash", "center": "center", "pad": "border"}  # ours -> timm's
_REQUIRED = ("architecture", "num_classes", "label_names", "pretrained_cfg")


def timm_config(
    model: nn.Module,
    *,
    architecture: str,
    model_args: dict,
    num_classes: int,
    label_names: Sequence[str],
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    extra: dict,
    crop: str = "squish",
    crop_pct: float = 1.0,
) -> dict:
    """The content of `config.json`.

    model: the bare model from `build_model` or its EMA.
    architecture: timm's name without a tag, `model.pretrained_cfg["architecture"]`.
    model_args: arguments that timm needs to build it again (`img_size` of a backbone that takes none is left out).
    label_names: [num_classes], in the order of the logits.
    img_size, mean, std, crop, crop_pct: preprocessing (pixels; RGB in 0..1); `crop` as in `--val-crop`, for timm's
        `resolve_data_config` translated to its `crop_mode`, of which "squash" is the nearest to `if-needed`.
    extra: kept under "mlc" in `config.json`, for our own use.
    """
    assert len(label_names) == num_classes, f"{len(label_names)} label names for {num_classes} classes"
    source = model.pretrained_cfg
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "label_names": list(label_names),
        "model_args": {key: value for key, value in model_args.items() if key not in getattr(model, "not_taken", ())},
        "pretrained_cfg": {
            "input_size": [3, img_size, img_size],
            "fixed_input_size": source.get("fixed_input_size", False),
            "interpolation": source.get("interpolation", "bicubic"),
            "crop_pct": crop_pct,
            "crop_mode": CROP_MODES.get(crop, "squash"),
            "mean": list(mean),
            "std": list(std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
        },
        "mlc": {**extra, "crop": crop, **getattr(model, "head_spec", {}), **getattr(model, "fusion_spec", {})},
    }


def export(model: nn.Module, folder: str | Path, *, state: dict[str, Tensor] | None = None, **described) -> None:
    """Writes `model.safetensors` and `config.json` into `folder`, each whole or not at all.

    model: the bare model from `build_model` or its EMA; an `extra_linear` head is folded into timm's one classifier.
    state: the model's whole state dict, where the model holds only a part of it (FSDP2, ZeRO-3).
    described: what `timm_config` takes.

    The tokenizer of captions is left to the caller: `tokenizer.save(folder / "text")`.
    """
    config = timm_config(model, **described)
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state = fold(model.state_dict() if state is None else state, model.pretrained_cfg.get("classifier"))
    with whole(folder / _WEIGHTS, SafetensorError) as building:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, building, {"format": "pt"})
    write_config(config, folder)
    if isinstance(model, Fused):
        from mlc.models.text_export import export_text

        export_text(model.text.encoder, folder, weights=False)


def write_config(config: dict, folder: Path) -> None:
    with whole(folder / _CONFIG) as building:
        building.write_text(to_json(config, indent=2) + "\n")


def exported_crop(config: dict) -> str:
    """The `--val-crop` of an exported model; for one that timm wrote, what its `crop_mode` means."""
    meaning = {mode: crop for crop, mode in CROP_MODES.items()}
    return config.get("mlc", {}).get("crop") or meaning.get(config["pretrained_cfg"].get("crop_mode"), "center")


def load_exported(folder: str | Path) -> tuple[nn.Module, dict]:
    """(model in eval mode on the CPU, the content of its `config.json`) from a folder that `export` wrote, with our
    attention and in the fastest memory format.

    The preprocessing is in `config["pretrained_cfg"]`, the class names are `config["label_names"]`. UserError for a
    file that is missing, damaged or does not fit the other.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    try:
        model = _built(config)
        if "fusion" in config.get("mlc", {}):
            model = _fused(model, config, folder)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{folder / _CONFIG}: timm {timm.__version__} cannot build this model: {error}") from error
    weights = folder / _WEIGHTS
    check_download(weights)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights}: missing or damaged ({error}); {_FIX}") from error
    except RuntimeError as error:
        raise UserError(f"{weights} does not fit the {_CONFIG} beside it: {error}") from error
    use_fast_attention(model)
    return model.to(memory_format=fast_memory_format(model)).eval(), config


def _built(config: dict) -> nn.Module | None:
    own, classes = config.get("mlc", {}), config["num_classes"]
    if "features" in own:
        return FeatureHead(own["sizes"], classes, **{name: own[name] for name in ("head", "head_kwargs", "norm")})
    if own.get("fusion") == "none":
        return None
    args = {**config.get("model_args", {}), "num_classes": 0 if "head" in own else classes, "pretrained": False}
    model = timm.create_model(config["architecture"], **args)
    if "head" in own:
        add_label_head(model, own["head"], classes, own["head_kwargs"])
    return model


def _fused(image: nn.Module | None, config: dict, folder: Path) -> Fused:
    from mlc.models.text_export import load_text

    own, encoder = config["mlc"], load_text(folder, weights=False)
    kwargs = {name: own[name] for name in ("fusion", "fusion_kwargs", "empty")}
    return Fused(image, encoder, num_classes=config["num_classes"], **kwargs)


def _read_config(path: Path) -> dict:
    check_download(path)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_FIX}") from error
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise UserError(f"{path}: no {missing[0]!r} in it; {_FIX}")
    own = config.get("mlc", {})
    if own.get("fusion") != "none" and "features" not in own and not timm.is_model(str(config["architecture"])):
        raise UserError(f"{path}: timm {timm.__version__} has no model {config['architecture']!r}")
    if len(config["label_names"]) != config["num_classes"]:
        raise UserError(f"{path}: {len(config['label_names'])} label names for {config['num_classes']} classes")
    return config
