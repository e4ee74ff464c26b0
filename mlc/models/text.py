"""Text encoders: any of Hugging Face's by name or folder, or the small `bigru`, in one shape for every fusion.

All take tokens int64 [B, L] and a mask bool [B, L] (True for a real token, which come first in a row; at least one in
each) and return (sequence float [B, L, D], pooled float [B, D]) with D in `num_features`.

transformers answers a wrong name, folder or file in many ways, some of them silent: weights that do not fit are left
random. Here each is one line that says what to change, and no parameter is there that the output does not depend on.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from torch import Tensor, nn

from mlc.models.bigru import BiGru
from mlc.models.text_pool import POOLS, pooling
from shards.console import UserError, did_you_mean
from shards.files import check_downloads

# What transformers raises for names, files and arguments that make no model.
_REFUSALS = (OSError, TypeError, ValueError, LookupError, AttributeError, RuntimeError)
_REFUSALS += (SafetensorError, UnpicklingError)
_WEIGHTS = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]
_LAYER = re.compile(r"(?:.*\.)?(?:layers?|albert_layers)\.\d+\.")  # of nested lists the innermost


class HuggingFace(nn.Module):
    """A transformers encoder without its own pooling layer, and a pooling of POOLS.

    max_tokens: how many tokens it has positions for; None where positions are relative.
    """

    any_length = True  # torch.compile: one code for all

    def __init__(self, model: nn.Module, pool: str):
        super().__init__()
        self.model, self.pool_kind = model, pool
        self.num_features = model.config.hidden_size
        self.pool = pooling(pool, self.num_features)
        self.max_tokens = _positions(model)
        # A mask per query is what transformers would make of ours, after asking the device whether all is real. With
        # local attention it makes several.
        local = any(hasattr(model.config, name) for name in ("sliding_window", "local_attention"))
        self._fused = model.config._attn_implementation == "sdpa" and not local

    def forward(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.max_tokens and tokens.shape[1] > self.max_tokens:
            raise UserError(f"--max-tokens: this text model reads {self.max_tokens}, not {tokens.shape[1]}")
        mask = token_mask[:, None, None] if self._fused else token_mask.long()
        sequence = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return sequence, self.pool(sequence, token_mask)


def build_text_model(
    name: str,
    *,
    pretrained: bool = True,
    pool: str = "cls",
    kwargs: dict | None = None,
    vocabulary: int | None = None,
    embeddings: ArrayLike | None = None,
) -> HuggingFace | BiGru:
    """An encoder in training mode, on the CPU, in float32.

    name: `bigru`, a name of Hugging Face's hub, or a folder with its files or that `export_text` wrote into.
    pretrained: False for random weights from the configuration alone.
    pool: of POOLS, for Hugging Face's; `bigru` has its own, see there.
    kwargs: fields of the encoder's configuration (`hidden_dropout_prob`, ...), or arguments of BiGru.
    vocabulary: how many tokens the tokenizer knows; needed by `bigru`, and else a check.
    embeddings: for `bigru`, word vectors [vocabulary, dim] to start from.

    Raises:
        UserError: a name, folder, file or argument that makes no encoder.
    """
    if name == "bigru":
        assert vocabulary, "bigru needs a vocabulary"
        return _bigru(vocabulary, embeddings, kwargs or {})
    if pool not in POOLS:
        raise UserError(f"--text-pool {pool}: choose one of {', '.join(POOLS)}{did_you_mean(pool, POOLS)}")
    source = files_of(name, pretrained)
    with quiet_transformers(name):
        config = _config(name, source, kwargs or {})
        _refuse_tokenizer(name, config.vocab_size, vocabulary)
        model = _model(name, source, config, pretrained)
    return HuggingFace(model.float(), pool).train()


def layer_indices(encoder: nn.Module) -> dict[str, int]:
    """{parameter's name: how many layers lie before it}: 0 for embeddings, 1 to n for the layers, n + 1 for all that is
    not pretrained, a classifier behind the encoder being as high.

    A layer is one set of weights: those that ALBERT runs through twelve times are one layer.
    """
    layers = _layers(encoder)

    def index(name: str) -> int:
        found = _LAYER.match(name)
        if found:
            return layers.index(found[0]) + 1
        if name.startswith("model.encoder.conv."):  # DeBERTa's, beside its first layer
            return 1
        pretrained = name.startswith("model.") and not re.search(r"\.final_(layer_)?norm\.", name)
        return 0 if pretrained else len(layers) + 1

    return {name: index(name) for name, _ in encoder.named_parameters()}


def shares_layers(encoder: nn.Module) -> bool:
    """Whether one layer's weights are run through several times, as ALBERT's are."""
    count = encoder.model.config.num_hidden_layers if isinstance(encoder, HuggingFace) else 0
    return 0 < len(_layers(encoder)) < count


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """{parameter's name: factor of the learning rate}, `decay ^ (layers after it)`: Clark et al. 2020, "ELECTRA"."""
    indices, top = layer_indices(encoder), len(_layers(encoder)) + 1
    return {name: decay ** (top - index) for name, index in indices.items()}


def _layers(encoder: nn.Module) -> list[str]:
    """What the names of each layer's parameters begin with, in order."""
    found = (_LAYER.match(name) for name, _ in encoder.named_parameters())
    return list(dict.fromkeys(layer[0] for layer in found if layer))


def _bigru(vocabulary: int, embeddings: ArrayLike | None, kwargs: dict) -> BiGru:
    known = [name for name in inspect.signature(BiGru).parameters if name not in ("vocabulary", "embeddings")]
    for name in kwargs:
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(f"--text-kwargs: bigru has no argument {name!r}; it takes {', '.join(known)}{near}")
    start = None if embeddings is None else torch.as_tensor(embeddings)
    try:
        return BiGru(vocabulary, embeddings=start, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"--text-model bigru with {given or 'no arguments'}: {error}") from error


def text_folder(folder: Path) -> Path:
    """Where the encoder's files are: `folder`, or `folder/text` of an exported run."""
    return folder / "text" if (folder / "text" / "config.json").is_file() else folder


def files_of(name: str, pretrained: bool, flag: str = "--text-model") -> str:
    """What transformers is given: a folder that has what is asked of it, or a name of the hub."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"{flag} {name}: there is no such folder; give one with config.json")
        return name
    folder = text_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {name}: no config.json in it; {_fix(name, flag)}")
    if pretrained and not any((folder / file).is_file() for file in _WEIGHTS):
        raise UserError(f"{flag} {name}: no model.safetensors in it; {_fix(name, flag)}")
    check_downloads(folder, r"config\.json", flag)
    if pretrained:  # of both kinds of weights transformers takes the first
        kind = "safetensors" if any(folder.glob("model*.safetensors")) else "bin"
        check_downloads(folder, rf"(pytorch_)?model.*\.{kind}", flag)
    return str(folder)


def _fix(name: str, flag: str = "--text-model") -> str:
    hub = "NAME" if Path(name).is_dir() else name
    return f"`hf download {hub} --local-dir FOLDER` where there is a network, then {flag} FOLDER"


def _config(name: str, source: str, kwargs: dict):
    from transformers import AutoConfig

    config = cached_first(AutoConfig.from_pretrained, source)
    for key, value in kwargs.items():
        if not hasattr(config, key):
            near = did_you_mean(key, list(config.to_dict()))
            raise UserError(f"--text-kwargs: {config.model_type} has no {key!r} in its configuration{near}")
        setattr(config, key, value)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UserError(f"--text-model {name}: {config.model_type} is no text encoder; choose BERT or one of its kin")
    return config


def cached_first(load: Callable[..., Any], source: str, **how: Any) -> Any:
    """What is in the local cache is not asked for again: without a network every file would be waited for."""
    try:
        return load(source, trust_remote_code=False, local_files_only=True, **how)
    except OSError:
        if Path(source).is_dir():
            raise
        return load(source, trust_remote_code=False, **how)


def _refuse_tokenizer(name: str, known: int, vocabulary: int | None) -> None:
    if vocabulary is not None and vocabulary > known:
        raise UserError(
            f"--text-model {name} knows {known} tokens and the tokenizer {vocabulary}; they are of different models"
        )


def _model(name: str, source: str, config, pretrained: bool) -> nn.Module:
    """transformers' bare encoder; all of its weights are from the files, or none."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kind = MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    how = {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        how["add_pooling_layer"] = False
    if not pretrained:
        config.dtype = torch.float32
        return AutoModel.from_config(config, trust_remote_code=False, **how)
    model, report = cached_first(AutoModel.from_pretrained, source, config=config, output_loading_info=True, **how)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"--text-model {name}: {len(missing)} weights are not in its files, such as {missing[0]}: they are of "
            f"another model than its config.json, a {config.model_type}"
        )
    return model


def _positions(model: nn.Module) -> int | None:
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return None
    first = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from there
    return table.num_embeddings - first


@contextmanager
def quiet_transformers(name: str, flag: str = "--text-model") -> Iterator[None]:
    """It is quiet within, no progress bars and warnings, and what it raises is one line: what matters is an error."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from huggingface_hub.utils import logging as hub
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("text models need transformers: pip install 'mlc[text]'") from error
    levels, bars = [(log, log.get_verbosity()) for log in (logging, hub)], logging.is_progress_bar_enabled()
    for log, _ in levels:
        log.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (*_REFUSALS, StrictDataclassError) as error:
        raise UserError(_refusal(f"{flag} {name}", name, error)) from error
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _refusal(given: str, name: str, error: Exception) -> str:
    fix = _fix(name, given.split()[0])
    if isinstance(error, OSError) and not Path(name).expanduser().is_dir():
        return f"{given}: not in the local cache, and the hub has it not or is out of reach; {fix}"
    if isinstance(error, UnpicklingError):
        return f"{given}: its pytorch_model.bin is damaged or no mere weights; give its model.safetensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{given}: transformers cannot build it: {' '.join(lines[:2]) or type(error).__name__}"
