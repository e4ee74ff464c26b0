"""Fixtures that several rooms share: a small demo data set, packed, and processes started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing here: the machine may be doing something else.
settings.register_profile("mlc", deadline=None)
settings.load_profile("mlc")

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

# The smallest SwinV2 that still has a shifted window, a patch merging and drop-path.
TINY = [
    "--model",
    "swinv2_tiny_window8_256",
    "--img-size",
    "32",
    "--drop-path",
    "0.2",
    "--model-kwargs",
    "embed_dim=16",
    "depths=[2,2]",
    "num_heads=[1,2]",
    "window_size=4",
]
# For a test that computes a step by hand: nothing that follows the data, the network or the length of the run.
PLAIN = ["--lr", "1e-4", "--head-bias", "zero", "--warmup", "0ep", "--clip-grad", "none", "--scale", "0.08", "1"]
PLAIN += ["--model-ema-decay", "0.9998", "--eval-metric", "f1_samples"]


@pytest.fixture(scope="session")
def demo_csv(tmp_path_factory) -> Path:
    """`mlc demo-data`, small."""
    from shards import demo

    folder = tmp_path_factory.mktemp("raw") / "demo"
    demo.main([str(folder), "--samples", "150", "--workers", "1"])
    return folder


@pytest.fixture(scope="session")
def shards(demo_csv) -> Path:
    """`mlc pack` of it: several shards of 40 samples, a validation split that no batch size divides."""
    from shards import pack

    folder = demo_csv.parent / "shards"
    pack.main(
        [
            "--csv",
            str(demo_csv / "train.csv"),
            "--images",
            str(demo_csv / "images"),
            "--test-csv",
            str(demo_csv / "test.csv"),
            "--val-fraction",
            "0.2",
            "--shard-size",
            "40",
            "--out",
            str(folder),
            "-j",
            "1",
        ]
    )
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    """A training run in this process takes SIGTERM, SIGUSR1 and Ctrl-C for itself."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def command(*argv: str, processes: int = 1) -> list[str]:
    """A command line as a user types it: plain for one process, `accelerate launch` with the shipped file for more."""
    if processes == 1:
        return [sys.executable, *argv]
    return [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
        "--num_processes",
        str(processes),
        *argv,
    ]


def environment() -> dict[str, str]:
    """No GPU, one thread per process, no hub."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "200",
    }


def run(*argv: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """`train.py ...` or `-m mlc ...` in real processes, which a server forks; a launcher's time is only its imports."""
    import worlds

    done = worlds.call(processes, *(("train.py", [*argv[1:]]) if argv[0] == "train.py" else ("mlc", [*argv[2:]])))
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def log_of(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
