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
from conftest import BIN, ROOT, environment
from processes import PATIENCE, wait_until

SCRIPT = ROOT / "scripts" / "slurm-test-cluster.sh"


class Cluster:
    """`sbatch`, `scontrol` and `scancel` of the cluster below a folder."""

    def __init__(self, folder: Path):
        self.env = environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def __call__(self, *argv: str) -> str:
        done = subprocess.run(argv, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *argv: str) -> str:
        """Submits and returns the job's number."""
        return self("sbatch", "--parsable", *argv).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Waits until the job is in one of these states; how long only says when to give up on a slow machine."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            final = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not final and time.monotonic() < deadline, f"{job}\n{output(job)}"
            time.sleep(0.3)
        return job

    def start_requeued(self, number: str) -> None:
        """Spares a job the two minutes that Slurm lets it wait, but not the end of what it was before.

        A node refuses it in the second in which that ended ("Job credential revoked").
        """
        wait_until(lambda: not steps(number))
        self("scontrol", "update", f"JobId={number}", "StartTime=now+2")


def steps(number: str) -> list[psutil.Process]:
    """Slurm's own processes that look after a job on a node."""
    found = psutil.process_iter(["cmdline"])
    return [
        process for process in found if " ".join(process.info["cmdline"] or []).startswith(f"slurmstepd: [{number}.")
    ]


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
    done = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)
