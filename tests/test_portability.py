"""On Windows and macOS everything but Slurm, ZeRO and several processes works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, environment
from PIL import Image

from mlc.parallel import launch, memory


def test_without_what_only_linux_has(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 9, 9)).save(raw / "images" / f"{number}.png")
    rows = "".join(f"{number}.png,{'a' * (number % 2)} b\n" for number in range(6))
    (raw / "train.csv").write_text("ImageID,Labels\n" + rows)
    program = [sys.executable, str(Path(__file__).parent / "other_systems.py")]
    done = subprocess.run(
        [*program, str(raw), str(tmp_path / "out"), *TINY],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out" / "run" / "predictions" / "images-submission.csv").exists()


@pytest.mark.parametrize(
    "cuda, apple, world, group, asked, cpu",
    [
        (False, False, 1, False, "", True),
        (False, True, 1, False, "", False),
        (False, True, 1, False, "true", True),
        (False, True, 2, False, "", True),
        (False, True, 1, True, "", True),
        (True, False, 2, True, "", False),
    ],
)
def test_apples_gpu_is_used_by_a_process_that_is_alone(monkeypatch, cuda, apple, world, group, asked, cpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    assert launch.uses_cpu(world, group=group) == cpu
    assert {"cpu", "cuda", "mps"} == memory.USABLE.keys()


def test_free_memory_where_there_is_no_proc(tmp_path):
    assert memory.host_memory(tmp_path) > 2**20
