"""Stages and optimizers in two real processes: the same training as one process, whatever is divided among them."""

import pytest
import worlds
from conftest import log_of
from test_strategies import assert_same_training, assert_same_weights, train_args

pytestmark = pytest.mark.distributed

STAGES = (
    """[{freeze: backbone, for: 3st}, {opt: sgd, lr: 0.05, for: 3st}, {lr: 1.0e-3, layer_decay: 0.8, loss: focal}]"""
)
STEPS = 8


def parts(shards, folder, batch: int, *more: str) -> list[str]:
    return train_args(shards, folder, STEPS, batch, "--stages", STAGES, *more)


@pytest.fixture(scope="module")
def one_process(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    worlds.train(1, parts(shards, folder, 8))
    return folder / "run"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_stages_train_the_same_in_every_strategy(strategy, shards, one_process, tmp_path):
    said = worlds.train(2, parts(shards, tmp_path, 4, "--strategy", strategy))
    assert [f"stage {number} of 3" in said for number in (1, 2, 3)] == [True] * 3
    assert said.count("resumed from") == 2
    same_but_for_the_norm(tmp_path, one_process)


def same_but_for_the_norm(folder, reference) -> None:
    """With the head alone trained the gradient is smaller than the 0.1 at which `assert_same_training` wants it cut."""
    mine, theirs = (log_of(path) for path in (folder / "run", reference))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss", "val_ema/loss"):
        a, b = ([line[name] for line in lines if name in line] for lines in (mine, theirs))
        assert a == pytest.approx(b, rel=1e-4), name
    assert_same_weights(folder, reference)


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion"])
def test_optimizers_are_the_same_on_whole_and_divided_parameters(name, shards, tmp_path):
    flags = ["--opt", name, "--lr", "1e-3", "--layer-decay", "0.7"]
    worlds.train(1, train_args(shards, tmp_path / "one", 6, 8, *flags))
    for strategy in ("ddp", "fsdp2"):
        worlds.train(2, train_args(shards, tmp_path / strategy, 6, 4, "--strategy", strategy, *flags))
        assert_same_training(tmp_path / strategy, tmp_path / "one" / "run", 6)


def test_zero_refuses_what_looks_at_whole_parameters(shards, tmp_path):
    codes, said = worlds.ask(2, train_args(shards, tmp_path, 2, 4, "--opt", "lamb", "--strategy", "zero1"))
    assert codes == [2, 2] and "which ZeRO cuts into parts" in said


def test_patience_ends_all_processes_at_the_same_step(shards, tmp_path):
    flags = ["--lr", "1e-30", "--eval-metric", "loss", "--no-model-ema", "--patience", "1", "--strategy", "fsdp2"]
    said = worlds.train(2, train_args(shards, tmp_path, 20, 4, *flags))
    assert "ended at step 8" in said
