"""A real Slurm on this host, and words for what a person would type at it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT, environment, log_of

SCRIPT = ROOT / "scripts" / "slurm-test-cluster.sh"


class Cluster:
    """`sbatch`, `scontrol` and `scancel` of the cluster below a folder."""

    def __init__(self, folder: Path):
        self.env = environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def __call__(self, *argv: str) -> str:
        done = subprocess.run(argv, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *argv: str) -> str:
        """Submits and returns the job's number."""
        return self("sbatch", "--parsable", *argv).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Waits until the job is in one of these states and nowhere else."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            final = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not final and time.monotonic() < deadline, f"{job}\n{output(job)}"
            time.sleep(0.3)
        return job


def output(job: dict[str, str]) -> str:
    """What a job printed."""
    file = Path(job["StdOut"])
    return file.read_text() if file.exists() else ""


@contextmanager
def started() -> Iterator[Cluster]:
    """The cluster, while it runs; skips the test that asks for it where there is no Slurm, or fails it in CI."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=path)]
    if missing:
        reason = f"no {', '.join(missing)} on this machine (Debian: apt-get install slurm-wlm munge)"
        (pytest.fail if os.environ.get("MLC_REQUIRE_SLURM") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    done = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


# ---- The processes of a run ------------------------------------------------------------------------------------------


def ranks(run: Path) -> list[psutil.Process]:
    """The training processes of a run, and neither their launchers nor srun."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(run.parent) in words and run.name in words and "mlc" in words and "launch" not in words[:4]:
            found += [process] if "srun" not in words[0] and "bash" not in words[0] else []
    return found


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    log = run / "log.jsonl"
    while not log.exists() or max((line["step"] for line in log_of(run)), default=0) < step:
        printed = "".join(file.read_text() for file in run.parent.glob("*.out"))
        assert time.monotonic() < deadline, f"{run} has not reached step {step}\n{printed}"
        time.sleep(0.02)


def freeze(run: Path, *, at_step: int) -> list[psutil.Process]:
    """Holds a run shortly after a step, so that what happens next happens there on a machine of any speed."""
    wait_for_step(run, at_step)
    processes = ranks(run)
    assert processes
    for process in processes:
        process.suspend()
    return processes


def thaw(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.resume()
