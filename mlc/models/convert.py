"""Published weights come under other names and in other layouts than timm's; a file says itself which it is.

Read are timm's own .safetensors and .pth, the folders of its hub and of our exports, Microsoft's Swin and SwinV2
checkpoints (`{"model": ...}`, one merging of patches late; buffers, which timm computes), and Hugging Face's
`SwinForImageClassification` and `Swinv2ForImageClassification`, whose q, k and v are three layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor

from shards.console import UserError
from shards.files import check_download

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder, the first that is there

# Hugging Face's names -> timm's; the merging of patches ends a stage there and begins the next one here.
_HF = (
    (r"^swin(v2)?\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
    (r"^encoder\.layers\.", "layers."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a file, or of the file in a folder, with names of timm, or of Microsoft, which timm's
    `checkpoint_filter_fn` knows. UserError for what cannot be read as weights.

    .pth is read with `weights_only=True`; of a checkpoint its nested `state_dict_ema`, `model_ema`, `state_dict` or
    `model`, in this order; prefixes of DDP and torch.compile are taken off.
    """
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise UserError(f"--pretrained-path {path}: no {' or '.join(WEIGHTS)} in this folder")
        path = found[0]
    if not path.is_file():
        raise UserError(f"--pretrained-path {path}: no such file")
    check_download(path, "--pretrained-path")
    try:
        state = load_state_dict(str(path))
    except (SafetensorError, OSError, EOFError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as e:
        raise UserError(f"--pretrained-path {path}: cannot be read as weights: {_reason(e)}") from e
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--pretrained-path {path}: holds something else than weights by name")
    return from_hugging_face(state) if is_hugging_face(state) else dict(state)


def _reason(error: Exception) -> str:
    """torch's own advice, to read whatever the file holds, would run the code of a stranger."""
    if "weights_only" in str(error):
        found = re.search(r"Unsupported globals: (.*?)\.(?= |$)", str(error))
        more = f"more than tensors ({found[1]})" if found else "no tensors, or is damaged"
        return f"it holds {more}; ask for a .safetensors, or what torch.save(state_dict) writes"
    if isinstance(error, LookupError):  # whose text is a number or a name of torch's own
        return "it is damaged, or another kind of file"
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of Hugging Face's Swin or SwinV2, with or without a classifier."""
    return any(re.search(r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.query\.weight$", name) for name in state)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with timm's names, q, k and v in one matrix; SwinV2's k has no bias, so q and v keep theirs."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in _HF:
            name = re.sub(old, new, name)
        if not name.endswith("mask_token"):  # of masked pre-training
            renamed[name] = tensor
    for name in [name for name in renamed if name.endswith(".attn.query.weight")]:
        block = name.removesuffix("query.weight")
        biases = [f"{block}{part}.bias" for part in ("query", "key", "value")]
        renamed[f"{block}qkv.weight"] = _joined(renamed, [f"{block}{p}.weight" for p in ("query", "key", "value")])
        if all(bias in renamed for bias in biases):
            renamed[f"{block}qkv.bias"] = _joined(renamed, biases)
        elif biases[0] in renamed:
            renamed[f"{block}q_bias"], renamed[f"{block}v_bias"] = renamed.pop(biases[0]), renamed.pop(biases[2])
    return renamed


def _joined(state: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state.pop(name) for name in names])
