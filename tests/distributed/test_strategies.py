"""Real processes: whatever is divided among them, the same training comes out.

The reference is one process. Everything is float32 but where bf16 is asked for; a sum over processes has another order
than one over a batch, so losses, norms and weights agree to rounding, which the steps of AdamW enlarge.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import worlds
from conftest import BIN, ROOT, TINY, environment, log_of
from processes import PATIENCE
from safetensors.torch import load_file

from mlc import ckpt
from mlc.parallel import storage

pytestmark = pytest.mark.distributed

STEPS = (20, 24, 28)  # two processes go so far, then (ZeRO) one, then two again
LOSS = 1e-4  # largest relative difference of a loss or a gradient norm
BF16 = 2e-2  # with autocast; bf16 itself has a resolution of 2^-8
LAUNCHED = {"cpu2": "ddp", "fsdp2": "fsdp2"} | {name: name for name in ("zero1", "zero2", "zero3")}
LAUNCHED |= {"zero3-offload": "zero3"}
ZEROS = ("zero1", "zero2", "zero3")
FROZEN = ("--freeze", "patch_embed")


def train_args(shards: Path, folder: Path, steps: int, batch: int, *more: str) -> list[str]:
    """Two accumulated micro-batches of `batch`, and clipping that bites."""
    run_flags = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-j", "0", "-b", str(batch)]
    length = ["--global-batch-size", "16", "--max-steps", str(steps), "--sched", "constant", "--lr", "1e-3"]
    length += ["--warmup", "0ep", "--head-bias", "zero"]  # a gradient that is cut from the first step on
    often = ["--log-interval", "1", "--eval-every", "4st", "--checkpoint-every", "1000st", "--resume", "auto"]
    model = [*TINY, "--drop-path", "0", "--model-ema-decay", "0.9", "--clip-grad", "0.1", "--mixup", "0.4"]
    return [*model, *run_flags, *length, *often, *more]


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    worlds.train(1, train_args(shards, folder, STEPS[-1], 8, *FROZEN))
    return folder / "run"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each configuration, which one test after the other goes on with."""
    return {config: tmp_path_factory.mktemp(config) for config in LAUNCHED}


def assert_same_training(folder: Path, reference: Path, steps: int, tolerance: float = LOSS) -> None:
    mine, theirs = ([line for line in log_of(path) if line["step"] <= steps] for path in (folder / "run", reference))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for name in ("train/loss", "train/grad_norm", "val/loss", "val_ema/loss"):
        a, b = (torch.tensor([line[name] for line in lines if name in line]) for lines in (mine, theirs))
        assert len(a) and (name != "train/grad_norm" or a.min() > 0.1)  # the clipping was at work
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_weights(folder: Path, reference: Path) -> None:
    """The EMA of all steps, as it is exported: whole tensors, written by rank 0."""
    mine, theirs = (load_file(path / "last" / "model.safetensors") for path in (folder / "run", reference))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---- the same training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", LAUNCHED)
def test_same_losses_as_one_process(config, shards, reference, folders):
    steps = STEPS[-1] if LAUNCHED[config] in ("ddp", "fsdp2") else STEPS[0]
    said = worlds.train(config, train_args(shards, folders[config], steps, 4, *FROZEN))
    assert f", {LAUNCHED[config]}\n" in said
    assert_same_training(folders[config], reference, steps)
    if steps == STEPS[-1]:
        assert_same_weights(folders[config], reference)


@pytest.mark.parametrize("config", LAUNCHED)
def test_a_gradient_that_overflows_stops_all_processes_before_the_step(config, shards, tmp_path):
    codes, said = worlds.ask(config, train_args(shards, tmp_path, STEPS[0], 4, *FROZEN, "--lr", "1e20"))
    assert codes == [2, 2] and "the gradient is nan; the weights were not changed" in said, said
    kept = json.loads((tmp_path / "run" / "non-finite.json").read_text())
    assert f"step {kept['step']}: " in said and "non-finite.json names the images of that step" in said
    assert {part["rank"] for part in kept["micro_batches"]} == {0, 1}
    positions = sorted(place for part in kept["micro_batches"] for place in part["positions"])
    assert positions == [*range(positions[0], positions[0] + len(positions))] and positions[0] % len(positions) == 0


def test_zero_goes_on_with_one_process_and_with_two_again(shards, reference, folders):
    """The files of two processes are converted for one, and those of one for two."""
    for processes, steps in ((1, STEPS[1]), (2, STEPS[2])):
        for name in ZEROS:
            argv = train_args(shards, folders[name], steps, 8 // processes, *FROZEN, "--strategy", name)
            said = worlds.train(processes, argv)
            assert said.count(f"was written by {3 - processes} process") == 1
    for name in ZEROS:
        assert_same_training(folders[name], reference, STEPS[-1])
        assert_same_weights(folders[name], reference)
        assert not [*(folders[name] / "run" / "checkpoints").glob("*/universal*")]


@pytest.mark.parametrize("name", ZEROS)
def test_a_checkpoint_of_zero_is_verified_and_exported_like_any(name, folders, tmp_path):
    """That of the end, whose average is exported as the run itself has exported it."""
    run = folders[name] / "run"
    assert ckpt.main(["verify", str(run)]) == 0
    ckpt.main(["export", str(run), str(tmp_path / "out"), "--ema"])
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "last"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    newest = storage.complete(run / "checkpoints")[-1]
    file = sorted((newest / "zero").rglob("*optim_states.pt"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert storage.damage(newest) == f"zero/{file.name} is not what was written (its sha256 differs)"


# ---- settings that each strategy must bear ---------------------------------------------------------------------------

OPTIONS = {
    "recompute-blocks": (["--grad-checkpointing", "every:2", "--attention", "fast"], LOSS),
    "recompute-attention": (["--grad-checkpointing", "attention", "--amp-dtype", "bf16"], BF16),
    "compile": (["--compile"], LOSS),
    "bf16": (["--amp-dtype", "bf16"], BF16),
}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", *ZEROS])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_go_with_every_strategy(option, strategy, shards, reference, tmp_path):
    """The average as well (`val_ema/loss`): divided like the model, never compiled, it follows a compiled one."""
    flags, tolerance = OPTIONS[option]
    argv = train_args(shards, tmp_path, 4, 4, *FROZEN, "--strategy", strategy, *flags)
    said = worlds.train(2, argv, "no_inductor")
    assert f"autocast {'bf16' if 'bf16' in flags else 'no'}, {strategy}\n" in said
    assert_same_training(tmp_path, reference, 4, tolerance)


def test_a_launch_from_the_command_line(shards, tmp_path):
    """All of `accelerate launch`; the other tests have it only read the configuration."""
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "mlc" / "launch" / "fsdp2.yaml")]
    argv = ["train.py", *train_args(shards, tmp_path, 2, 4)]
    done = subprocess.run(
        [*command, *argv], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert ", fsdp2\n" in done.stderr and "= 2 processes x" in done.stderr


# ---- a process that hangs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_the_others_end_when_a_process_hangs(strategy, shards, tmp_path):
    argv = train_args(shards, tmp_path, 8, 4, "--strategy", strategy, "--collective-timeout", "15")
    codes, said = worlds.ask(2, argv, "stopped")
    assert codes == [1, -9]
    lines = [line for line in said.splitlines() if "[rank 0]" in line or "Traceback" in line]
    assert len(lines) == 1 and "stopped: waited 15 s for another process" in lines[0], said
