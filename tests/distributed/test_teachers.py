"""Real processes: whatever is divided among them, the same student comes out of the same teacher.

The reference is one process; a sum over processes has another order than one over a batch.
"""

from pathlib import Path

import pytest
import torch
import worlds
from conftest import TINY, log_of

pytestmark = pytest.mark.distributed

LOSS = 1e-4  # largest relative difference of a loss or a gradient norm
BF16 = 2e-2  # with autocast; bf16 itself has a resolution of 2^-8
# A file knows nothing of strategies; an average is divided like the model.
CASES = [("live", name) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")] + [("file", "ddp")]
CASES += [("ema", name) for name in ("ddp", "fsdp2", "zero2", "zero3")]


def train_args(shards: Path, folder: Path, batch: int, *more: str) -> list[str]:
    """Eight steps of 16, in micro-batches of `batch`, mixed in pairs."""
    run_flags = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-j", "0", "-b", str(batch)]
    length = ["--global-batch-size", "16", "--max-steps", "8", "--sched", "constant", "--lr", "1e-3"]
    often = ["--log-interval", "1", "--eval-every", "8st", "--checkpoint-every", "1000st"]
    return [*TINY, "--drop-path", "0", "--model-ema-decay", "0.9", "--mixup", "0.4", *run_flags, *length, *often, *more]


@pytest.fixture(scope="module")
def taught(shards, tmp_path_factory) -> dict[str, list[str]]:
    """The flags of each kind of teacher. The model is wider than the student, for features of two widths."""
    folder = tmp_path_factory.mktemp("teacher")
    wide = ["--model-kwargs", "embed_dim=24", "depths=[2,2]", "num_heads=[1,2]", "window_size=4", "--lr", "1e-2"]
    worlds.train(1, train_args(shards, folder, 16, *wide))
    run = str(folder / "run")
    done = worlds.call(1, "mlc", ["predict", "--run", run, "--data", str(shards), "--split", "train", "-j", "0"])
    assert not done.returncode, done.stderr
    return {
        "live": ["--kd-teacher", run, "--kd-feature", "1"],
        "file": ["--kd-teacher", f"{run}/predictions/train.csv", "--kd-rule", "max"],
        "ema": ["--kd-teacher", "ema", "--kd-alpha", "0.8"],
    }


@pytest.fixture(scope="module")
def references(shards, taught, tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("one")
    for kind, flags in taught.items():
        worlds.train(1, train_args(shards, folder / kind, 16, *flags))
    return {kind: log_of(folder / kind / "run") for kind in taught}


def assert_same(mine: list[dict], theirs: list[dict], tolerance: float = LOSS) -> None:
    for name in ("train/loss", "train/grad_norm", "val/loss", "val_ema/loss"):
        a, b = (torch.tensor([line[name] for line in log if name in line]) for log in (mine, theirs))
        assert len(a) == (1 if name.startswith("val") else 8)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind, strategy", CASES)
def test_two_processes_teach_as_one(kind, strategy, shards, taught, references, tmp_path):
    """Two micro-batches of 4 in each process, one of 16 in the reference."""
    said = worlds.train(2, train_args(shards, tmp_path, 4, "--strategy", strategy, *taught[kind]))
    assert f", {strategy}\n" in said
    assert_same(log_of(tmp_path / "run"), references[kind])


@pytest.mark.parametrize("kind, strategy", [("live", "fsdp2"), ("ema", "fsdp2"), ("ema", "zero3")])
def test_compiled_and_recomputed(kind, strategy, shards, taught, references, tmp_path):
    more = ["--strategy", strategy, "--compile", "--grad-checkpointing", "every:2", *taught[kind]]
    said = worlds.train(2, train_args(shards, tmp_path, 4, *more), "no_inductor")
    assert_same(log_of(tmp_path / "run"), references[kind])
    compiled = [line for line in said.splitlines() if "graphs compiled" in line]
    assert all("step 1:" in line for line in compiled), compiled


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_student_and_teacher_under_autocast(kind, shards, taught, references, tmp_path):
    said = worlds.train(1, train_args(shards, tmp_path, 8, "--amp-dtype", "bf16", *taught[kind]))
    assert "autocast bf16" in said
    assert_same(log_of(tmp_path / "run"), references[kind], BF16)
