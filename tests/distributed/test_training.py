"""Real processes: whatever happens to a run, and however it is divided, the same training comes out."""

import json
import random
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, TINY, command, environment, log_of, run
from processes import PATIENCE, freeze, thaw, wait_for_step
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = pytest.mark.distributed

STEPS = 24
AUGMENTED = [
    "--mixup",
    "0.4",
    "--aa",
    "rand-m9-mstd0.5-inc1",
    "--reprob",
    "0.3",
    "--smoothing",
    "0.1",
    "--clip-grad",
    "1",
]


def train_args(shards: Path, folder: Path, *more: str) -> list[str]:
    """24 steps of 16 over 100 samples: the run crosses two ends of an epoch."""
    return [
        "train.py",
        *TINY,
        *AUGMENTED,
        "--data",
        str(shards),
        "--output",
        str(folder),
        "--experiment",
        "run",
        "--global-batch-size",
        "16",
        "--max-steps",
        str(STEPS),
        "--eval-every",
        "8st",
        "--checkpoint-every",
        "5st",
        "--log-interval",
        "1",
        "--lr",
        "1e-3",
        "--model-ema-decay",
        "0.9",
        "--log-samples",
        str(folder / "samples.jsonl"),
        *more,
    ]


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> Path:
    """An uninterrupted run: 2 processes, 3 workers each."""
    folder = tmp_path_factory.mktemp("reference")
    run(*train_args(shards, folder, "-b", "8", "-j", "3"), processes=2)
    return folder


def final_state(folder: Path, tmp_path: Path) -> dict:
    """Weights, optimizer state and EMA of the last checkpoint as plain tensors."""
    file = tmp_path / f"{folder.name}.pt"
    dcp_to_torch_save(folder / "run" / "checkpoints" / f"step-{STEPS:08d}", file)
    return torch.load(file, weights_only=True)


def assert_same_bits(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def samples(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def kill_when_at(step: int, argv: list[str], log: Path) -> None:
    """Starts a run on two processes and kills all of it with -9 once its log shows the step."""
    process = subprocess.Popen(
        command(*argv, processes=2), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    family = psutil.Process(process.pid)
    wait_for_step(log.parent, step)
    for victim in [*family.children(recursive=True), family]:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_three_times_and_resumed_equals_never_stopped(shards, reference, tmp_path):
    steps = sorted(random.sample(range(1, STEPS), 3))
    print("killed at steps", steps)  # shown when the test fails
    argv = train_args(shards, tmp_path, "-b", "8", "-j", "3", "--resume", "auto")
    for step in steps:
        kill_when_at(step, argv, tmp_path / "run" / "log.jsonl")
    run(*argv, processes=2)
    assert_same_bits(final_state(reference, tmp_path), final_state(tmp_path, tmp_path))
    for which in ("best", "last"):
        mine, theirs = (load_file(folder / "run" / which / "model.safetensors") for folder in (tmp_path, reference))
        assert_same_bits(mine, theirs)
    assert samples(tmp_path) == samples(reference)
    assert comparable(log_of(tmp_path / "run")) == comparable(log_of(reference / "run"))  # no line twice, none missing
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def comparable(log: list[dict]) -> list[dict]:
    timed = ("train/img_per_sec", "data/wait_frac", "sys/mem_gb", "ckpt/blocked_s", "ckpt/write_s")
    return [{name: value for name, value in line.items() if name not in timed} for line in log]


def test_one_process_without_workers_sees_the_same_augmented_samples(shards, reference, tmp_path):
    """1 rank without workers, accumulating 4 x 4, against 2 ranks x 8 with 3 workers each."""
    run(*train_args(shards, tmp_path, "-b", "4", "-j", "0"))
    assert samples(tmp_path) == samples(reference)
    mine, theirs = (comparable(log_of(folder / "run")) for folder in (tmp_path, reference))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]


def test_two_then_one_then_two_processes_resumed_in_mid_epoch(shards, reference, tmp_path):
    for steps, batch, workers, processes in ((9, "8", "1", 2), (17, "16", "2", 1), (STEPS, "2", "0", 2)):
        run(
            *train_args(shards, tmp_path, "-b", batch, "-j", workers, "--max-steps", str(steps), "--resume", "auto"),
            processes=processes,
        )
    assert samples(tmp_path) == samples(reference)
    steps = [line["step"] for line in log_of(tmp_path / "run") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))


def first_gradient(folder: Path, tmp_path: Path, shards: Path, batch: str, processes: int) -> dict[str, torch.Tensor]:
    """The gradient of step 1: AdamW's first moment is (1 - beta1) times it. No drop-path: it depends on the rank."""
    run(
        *train_args(shards, folder, "-b", batch, "-j", "0", "--max-steps", "1", "--drop-path", "0"), processes=processes
    )
    file = tmp_path / "gradient.pt"
    dcp_to_torch_save(folder / "run" / "checkpoints" / "step-00000001", file)
    state = torch.load(file, weights_only=True)["optimizer"]["state"]
    return {name: moments["exp_avg"] for name, moments in state.items()}


@pytest.mark.parametrize("batch, processes", [("4", 1), ("4", 2), ("2", 2)])
def test_accumulated_gradient_is_the_full_batch_gradient(shards, tmp_path, batch, processes):
    full = first_gradient(tmp_path / "full", tmp_path, shards, "16", 1)
    divided = first_gradient(tmp_path / "divided", tmp_path, shards, batch, processes)
    assert full.keys() == divided.keys() and len(full) > 20
    for name in full:
        torch.testing.assert_close(
            divided[name],
            full[name],
            rtol=1e-4,
            atol=1e-5 * float(full[name].abs().max()) + 1e-9,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_stop_file_saves_on_all_ranks_and_the_run_goes_on(shards, reference, tmp_path):
    argv = train_args(shards, tmp_path, "-b", "8", "-j", "1", "--resume", "auto")
    process = subprocess.Popen(
        command(*argv, processes=2),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    held = freeze(tmp_path / "run", at_step=2)
    (tmp_path / "run" / "STOP").touch()
    thaw(held)
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "--resume auto goes on" in printed, printed
    stopped_at = max(line["step"] for line in log_of(tmp_path / "run"))
    assert stopped_at < STEPS and (tmp_path / "run" / "checkpoints" / f"step-{stopped_at:08d}" / "meta.json").exists()
    run(*argv, processes=2)
    assert_same_bits(final_state(reference, tmp_path), final_state(tmp_path, tmp_path))


def test_a_finished_run_says_so_and_changes_nothing(shards, reference):
    before = (reference / "run" / "log.jsonl").read_text()
    done = run(*train_args(shards, reference, "-b", "8", "-j", "0", "--resume", "auto"))
    assert "is finished" in done.stderr and (reference / "run" / "log.jsonl").read_text() == before


def test_the_checkpoint_is_sharded_and_complete(reference):
    folder = reference / "run" / "checkpoints" / f"step-{STEPS:08d}"
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    assert len(sizes) == 2 and min(sizes.values()) > 0.2 * max(sizes.values())  # both ranks wrote a fair part
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["progress"]["samples_seen"] == STEPS * 16 and meta["world_size"] == 2
    assert dcp.FileSystemReader(folder).read_metadata()
