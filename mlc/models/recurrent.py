"""An LSTM under bfloat16 autocast on any CPU: oneDNN has that kernel only where the processor knows the type, and
PyTorch does not fall back. There it computes in float32; everywhere else it is called as it is."""

import torch
from torch import Tensor, nn


def states_of(cell: nn.LSTM | nn.GRU, inputs: Tensor) -> Tensor:
    """The cell's states [B, L, directions x hidden] for inputs [B, L, D]."""
    if isinstance(cell, nn.LSTM) and inputs.device.type == "cpu" and not _knows_bfloat16():
        with torch.autocast("cpu", enabled=False):
            return cell(inputs.float())[0]
    return cell(inputs)[0]


def _knows_bfloat16() -> bool:
    return not torch.is_autocast_enabled("cpu") or torch.ops.mkldnn._is_mkldnn_bf16_supported()
