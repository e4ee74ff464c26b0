"""Real processes: whatever is divided among them, the same training comes out.

The reference is one process. Everything is float32; a sum over processes has another order than one over a batch, so
losses, norms and weights agree to rounding, which the steps of AdamW enlarge.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, TINY, environment, log_of
from conftest import run as run_alone
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("strategies")]  # one goes on where another ended

STEPS = (20, 24, 28)  # two processes go so far, then (ZeRO) one, then two again
LOSS = 1e-4  # largest relative difference of a loss or a gradient norm
LAUNCHED = {"cpu2": "ddp", "fsdp2": "fsdp2"} | {name: name for name in ("zero1", "zero2", "zero3")}
LAUNCHED |= {"zero3-offload": "zero3"}
FROZEN = "tests/distributed/frozen.py"


def train_args(shards: Path, folder: Path, steps: int, batch: int, *more: str) -> list[str]:
    """Two accumulated micro-batches of `batch`, and clipping that bites."""
    run_flags = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-j", "0", "-b", str(batch)]
    length = ["--global-batch-size", "16", "--max-steps", str(steps), "--sched", "constant", "--lr", "1e-3"]
    often = ["--log-interval", "1", "--eval-every", "4st", "--checkpoint-every", "1000st", "--resume", "auto"]
    model = [*TINY, "--drop-path", "0", "--model-ema-decay", "0.9", "--clip-grad", "0.1", "--mixup", "0.4"]
    return [*model, *run_flags, *length, *often, *more]


def launch(config: str, *argv: str) -> subprocess.CompletedProcess:
    file = ROOT / "mlc" / "launch" / f"{config}.yaml"
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(file), "--main_process_port", "0", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_alone(FROZEN, *train_args(shards, folder, STEPS[-1], 8))
    return folder / "run"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each configuration, which one test after the other goes on with."""
    return {config: tmp_path_factory.mktemp(config) for config in LAUNCHED}


def assert_same_training(folder: Path, reference: Path, steps: int) -> None:
    mine, theirs = ([line for line in log_of(path) if line["step"] <= steps] for path in (folder / "run", reference))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for name in ("train/loss", "train/grad_norm", "val/loss", "val_ema/loss"):
        a, b = (torch.tensor([line[name] for line in lines if name in line]) for lines in (mine, theirs))
        assert len(a) and (name != "train/grad_norm" or a.min() > 0.1)  # the clipping was at work
        torch.testing.assert_close(a, b, rtol=LOSS, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_weights(folder: Path, reference: Path) -> None:
    """The EMA of all steps, as it is exported: whole tensors, written by rank 0."""
    mine, theirs = (load_file(path / "last" / "model.safetensors") for path in (folder / "run", reference))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", LAUNCHED)
def test_same_losses_as_one_process(config, shards, reference, folders, tmp_path):
    """Then a learning rate that makes the gradient overflow: all processes stop before the step, with one line."""
    steps = STEPS[-1] if LAUNCHED[config] in ("ddp", "fsdp2") else STEPS[0]
    good = train_args(shards, folders[config], steps, 4)
    bad = train_args(shards, tmp_path, STEPS[0], 4, "--lr", "1e20", "--strategy", LAUNCHED[config])
    done = launch(config, FROZEN, *good, "--", *bad)
    assert f", {LAUNCHED[config]}\n" in done.stderr
    assert_same_training(folders[config], reference, steps)
    assert done.stdout.count("exit codes [0, 2]") == 2, done.stdout + done.stderr
    assert "the gradient is nan; the weights were not changed" in done.stderr
    if steps == STEPS[-1]:
        assert_same_weights(folders[config], reference)


def test_zero_goes_on_with_one_process_and_with_two_again(shards, reference, folders):
    """The files of two processes are converted for one, and those of one for two."""
    resumed = [name for name in LAUNCHED if name in ("zero1", "zero2", "zero3")]
    for processes, steps in ((1, STEPS[1]), (2, STEPS[2])):
        argv = []
        for name in resumed:
            argv += [*train_args(shards, folders[name], steps, 8 // processes, "--strategy", name), "--"]
        done = run_alone(FROZEN, *argv[:-1], processes=processes)
        assert done.stdout.count(f"exit codes {[0] * len(resumed)}") == processes, done.stdout + done.stderr
        assert done.stderr.count(f"written by {3 - processes} process") == len(resumed)
    for name in resumed:
        assert_same_training(folders[name], reference, STEPS[-1])
        assert_same_weights(folders[name], reference)
        assert not [*(folders[name] / "run" / "checkpoints").glob("*/universal*")]
