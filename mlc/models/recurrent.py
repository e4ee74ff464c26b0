"""An LSTM under bfloat16 on any CPU: oneDNN has that kernel only where the processor knows the type, and PyTorch does
not fall back. There it computes in float32; everywhere else it is called as it is."""

import torch
from torch import Tensor, nn


def states_of(cell: nn.LSTM | nn.GRU, inputs: Tensor) -> Tensor:
    """The cell's states [B, L, directions x hidden] for inputs [B, L, D]. The cell works batch first."""
    if isinstance(cell, nn.LSTM) and inputs.device.type == "cpu" and _lacks_bfloat16(cell):
        return _in_float32(cell, inputs)
    return cell(inputs)[0]


def _lacks_bfloat16(cell: nn.LSTM) -> bool:
    asked = torch.is_autocast_enabled("cpu") or cell.weight_hh_l0.dtype == torch.bfloat16
    return asked and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _in_float32(cell: nn.LSTM, inputs: Tensor) -> Tensor:
    # the weights may be of another type than the inputs: FSDP2's mixed precision hands them over in bfloat16
    weights = [weight.float() for weight in cell._flat_weights]
    directions = 2 if cell.bidirectional else 1
    start = inputs.new_zeros(cell.num_layers * directions, len(inputs), cell.hidden_size, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        return torch.lstm(
            inputs.float(),
            (start, start),
            weights,
            cell.bias,
            cell.num_layers,
            cell.dropout,
            cell.training,
            cell.bidirectional,
            cell.batch_first,
        )[0]
