import copy

import pytest
import torch
from torch import nn

from mlc.models.recurrent import states_of


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}])
def test_an_lstm_under_autocast_whatever_its_weights_are_held_in(weights, shape):
    """FSDP2's mixed precision hands bfloat16 weights to a layer whose inputs may be float32."""
    torch.manual_seed(0)
    cell = nn.LSTM(5, 7, batch_first=True, **shape).to(weights)
    inputs = torch.randn(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = states_of(cell, inputs)
    got.float().sum().backward()
    wanted = copy.deepcopy(cell).float()(inputs)[0]
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=0)
    assert all(weight.grad is not None for weight in cell.parameters())
