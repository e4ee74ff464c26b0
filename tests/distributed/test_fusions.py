"""Models of images and captions, divided: what two processes learn is what one learns."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from tiny_fusion import TOKENS, build, images
from torch import nn

from mlc.models.fusion import FUSIONS
from mlc.optim.ema import Ema
from mlc.parallel import launch, strategy
from mlc.parallel.recompute import recompute

STRATEGIES = {"ddp": FUSIONS, "fsdp2": FUSIONS, "zero3": ("bilinear", "cross-attention", "late")}
COUNT = 8
MIX = (
    torch.stack([torch.arange(COUNT), torch.arange(COUNT) ^ 1], 1),
    torch.tensor([[0.7, 0.3], [0.7, 0.3], [1.0, 0.0], [1.0, 0.0]]).repeat(2, 1),
)


def model_of(fusion: str) -> nn.Module:
    """Without batch norm, which sees a process's own samples."""
    model = build(fusion, "test_vit")
    if fusion == "early":
        model.fusion.image[1] = model.fusion.text[1] = nn.Identity()
    recompute(model, "all")
    return model


def loss_of(model: nn.Module, own: slice) -> torch.Tensor:
    """Of a part of eight samples; the first half has no caption in the second process alone."""
    tokens = torch.cat([TOKENS, TOKENS[[1, 1, 1, 1]]])
    index, share = MIX[0][own] - (own.start or 0), MIX[1][own]
    logits = model(images("test_vit", COUNT)[own], tokens[own], tokens[own] > 0, (index, share))
    return (logits - torch.tensor([1.0, -1.0, 2.0])).square().sum()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01)


def trained(fusion: str) -> dict[str, torch.Tensor]:
    model = model_of(fusion)
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(model, slice(0, COUNT)) / 2).backward()  # two processes have the mean of their sums
        optimizer.step()
    return model.state_dict()


def member(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "warning"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    accelerator = launch.start(group=True)
    own = slice(rank * COUNT // 2, (rank + 1) * COUNT // 2)
    for name, fusions in STRATEGIES.items():
        for fusion in fusions:
            model = model_of(fusion)
            averaged = Ema(model).module if name == "fsdp2" else None
            make = partial(strategy.divide, strategy.Choice(name=name), accelerator, model, averaged, sgd)
            divided = make(clip=None, batch_size=4, accumulation=1)
            for _ in range(2):
                with divided.accumulate(True):
                    divided.backward(loss_of(divided.model, own))
                divided.step()
            state = strategy.full_state(model)
            if rank == 0:
                torch.save(state, folder / f"{name}-{fusion}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_learn_what_one_does(tmp_path):
    torch.multiprocessing.spawn(member, (tmp_path,), nprocs=2)
    for fusion in FUSIONS:
        expected, start = trained(fusion), model_of(fusion).state_dict()
        assert not any(torch.equal(expected[name], start[name]) for name in expected if name.startswith("text.cl"))
        for name in (name for name, fusions in STRATEGIES.items() if fusion in fusions):
            found = torch.load(tmp_path / f"{name}-{fusion}.pt", weights_only=True)
            wrong = partial("{} {}: {}".format, name, fusion)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=wrong)


@pytest.fixture
def bf16(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training that ran in this process before
    yield launch.start("bf16", group=True)
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_divided_weights_in_bfloat16(bf16, fusion):
    """FSDP2 under autocast hands a fusion weights of another type than its input."""
    whole, model = model_of(fusion), model_of(fusion)
    make = partial(strategy.divide, strategy.Choice(name="fsdp2"), bf16, model, None, sgd)
    divided = make(clip=None, batch_size=8, accumulation=1)
    with bf16.autocast():
        loss = loss_of(divided.model, slice(0, COUNT))
    torch.testing.assert_close(loss, loss_of(whole, slice(0, COUNT)), rtol=0.05, atol=0.5)
    divided.backward(loss)
    assert divided.step().isfinite()
