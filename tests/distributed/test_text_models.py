"""Text models in two real processes: the training of one process, whatever is divided among them."""

import os
import socket
from pathlib import Path

import pytest
import tiny_text
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_text import captions, tiny
from torch import Tensor, nn

from mlc.models.text import build_text_model
from mlc.parallel import launch, strategy
from mlc.parallel.recompute import recompute

pytestmark = pytest.mark.distributed
KINDS = [*tiny_text.KINDS, "bigru", "bilstm"]
STEPS, ROWS = 3, 4


class Classifier(nn.Module):
    """The simplest thing that a text model is part of."""

    def __init__(self, text: nn.Module):
        super().__init__()
        self.text, self.fusion = text, nn.Linear(text.num_features, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.fusion(self.text(tokens, mask)[1])


def model_of(kind: str, hub: Path) -> nn.Module:
    """Without dropout, which each process draws for itself."""
    torch.manual_seed(0)
    if kind in ("bigru", "bilstm"):
        kwargs = {"cell": kind[2:], "dropout": 0.0, "dim": 8, "hidden": 8}
        return Classifier(build_text_model("bigru", vocabulary=60, kwargs=kwargs))
    names = ("dropout", "attention_dropout")
    if kind != "distilbert":
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return Classifier(build_text_model(str(hub / kind), pool="attention", kwargs=dict.fromkeys(names, 0.0)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    """Two for each step. Lengths are those of the whole batch, as the loader pads it."""
    return [captions(rows=ROWS, pad=1 if kind == "roberta" else 0, seed=seed) for seed in range(2 * STEPS)]


def plain(kind: str, hub: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """(gradient norm of each step, weights after the last) of a loop in one process."""
    model, norms = model_of(kind, hub), []
    optimizer = sgd(model)
    for number, batch in enumerate(batches(kind)):
        model(*batch).square().mean().backward()
        if number % 2:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(norms), dict(model.state_dict())


def divided(kind: str, hub: Path, name: str, accelerator) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with each batch divided and each block computed again in the backward pass."""
    model, norms = model_of(kind, hub), []
    # DeepSpeed counts the gradients of weights that are used again and again, and computed again too, more than once.
    if strategy.blocks(model) and (kind, name) != ("albert", "zero3"):
        recompute(model, "all")
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = strategy.divide(
        strategy.choose(name), accelerator, model, None, sgd, clip=1.0, batch_size=ROWS // world, accumulation=2
    )
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for number, (tokens, mask) in enumerate(batches(kind)):
        with parts.accumulate(bool(number % 2)):
            with accelerator.autocast():
                loss = parts.model(tokens[mine], mask[mine]).float().square().mean()
            parts.backward(loss)
        if number % 2:
            norms.append(parts.step())
    return torch.stack(norms), strategy.full_state(model)


def member(rank: int, port: int, hub: Path, name: str, amp: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "warning"}
    accelerator = launch.start(amp)
    found = {kind: divided(kind, hub, name, accelerator) for kind in KINDS}
    if rank == 0:
        torch.save(found, hub / f"{name}-{amp}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for kind in tiny_text.KINDS:
        tiny(kind, folder)
    return folder


def in_two_processes(hub: Path, name: str, amp: str) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.start_processes(member, (port, hub, name, amp), nprocs=2, start_method="spawn")
    return torch.load(hub / f"{name}-{amp}.pt", weights_only=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_divided_training_is_that_of_one_process(name, hub):
    found = in_two_processes(hub, name, "no")
    for kind in KINDS:
        norms, weights = plain(kind, hub)
        torch.testing.assert_close(found[kind][0], norms, rtol=1e-4, atol=1e-6, msg=lambda m, kind=kind: f"{kind}: {m}")
        torch.testing.assert_close(found[kind][1], weights, rtol=1e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


def test_weights_that_travel_in_bfloat16(hub):
    """FSDP2 under autocast hands every layer weights of another type than what it works on."""
    found = in_two_processes(hub, "fsdp2", "bf16")
    for kind in KINDS:
        norms, _ = plain(kind, hub)
        torch.testing.assert_close(found[kind][0], norms, rtol=0.3, atol=0, msg=lambda m, kind=kind: f"{kind}: {m}")
