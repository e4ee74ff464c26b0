"""A trained text encoder leaves a run as Hugging Face's own files, which transformers reads without this package:

    RUN/best/text/  config.json  model.safetensors  [pool.safetensors]  and the tokenizer's files

`bigru`, which transformers does not have, has a `config.json` of our own there.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlc.models.bigru import BiGru
from mlc.models.text import HuggingFace, build_text_model, text_folder
from shards.console import UserError
from shards.files import check_download, disk_errors, whole
from shards.json_text import to_json

_BIGRU = "mlc-bigru"
_FIX = "give a folder with an exported text model, such as RUN/best"


def export_text(
    encoder: HuggingFace | BiGru,
    folder: str | Path,
    *,
    tokenizer=None,
    state: dict[str, Tensor] | None = None,
    weights: bool = True,
) -> None:
    """Writes the encoder into `folder/text`, each file whole or not at all.

    tokenizer: of mlc/data/text.py, saved beside it.
    state: the encoder's whole state dict, where it holds only a part of it (FSDP2, ZeRO-3).
    weights: False where another file has them, for `load_text(folder, weights=False)`.
    """
    folder = Path(folder) / "text"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _described(encoder))
    if tokenizer is not None:
        tokenizer.save(folder)
    if weights:
        state = encoder.state_dict() if state is None else state
        if isinstance(encoder, BiGru):
            _save(state, folder / "model.safetensors")
        else:
            _save(_part(state, "model."), folder / "model.safetensors")
            _save(_part(state, "pool."), folder / "pool.safetensors")


def load_text(folder: str | Path, *, weights: bool = True) -> HuggingFace | BiGru:
    """The encoder in eval mode on the CPU from a folder that `export_text` was given, without network.

    weights: False for random ones, to be replaced.

    Raises:
        UserError: a file is missing, damaged or does not fit the others.
    """
    folder = text_folder(Path(folder))
    path = folder / "config.json"
    check_download(path)
    try:
        config = json.loads(path.read_text())
        if config["model_type"] == _BIGRU:
            encoder: nn.Module = BiGru(**config["settings"])
        else:
            encoder = build_text_model(str(folder), pretrained=weights, pool=config["mlc"]["pool"])
    except (OSError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"{path}: missing or damaged ({type(error).__name__}: {error}); {_FIX}") from error
    if weights and isinstance(encoder, BiGru):
        _load(encoder, folder / "model.safetensors")
    elif weights and next(encoder.pool.parameters(), None) is not None:
        _load(encoder.pool, folder / "pool.safetensors")
    return encoder.eval()


def _described(encoder: HuggingFace | BiGru) -> dict:
    if isinstance(encoder, BiGru):
        return {"model_type": _BIGRU, "settings": encoder.settings}
    config = json.loads(encoder.model.config.to_json_string())
    return {**config, "architectures": [type(encoder.model).__name__], "mlc": {"pool": encoder.pool_kind}}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _save(state: dict[str, Tensor], path: Path) -> None:
    if not state:
        path.unlink(missing_ok=True)  # of an encoder that was here before
        return
    with whole(path, SafetensorError) as building:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, building, {"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    with whole(path) as building:
        building.write_text(to_json(content, indent=2) + "\n")


def _load(module: nn.Module, path: Path) -> None:
    check_download(path)
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_FIX}") from error
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the config.json beside it: {error}") from error
