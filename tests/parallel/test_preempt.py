import math
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import PATIENCE

from mlc.parallel import preempt
from mlc.parallel.preempt import StopFlag, allocation_end
from shards.console import UserError


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_END_TIME", "MLC_STOP_BEFORE_END", "MLC_KEEP_STOP"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_raises_the_flag(tmp_path, number):
    stop = StopFlag(tmp_path, watches_file=False)
    assert not stop.check()
    os.kill(os.getpid(), number)
    assert stop.check()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_stops_now(tmp_path, second):
    stop = StopFlag(tmp_path, watches_file=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.check()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), second)


def test_one_interrupt_of_a_run_that_is_stopping_already_lets_it_save(tmp_path):
    stop = StopFlag(tmp_path, watches_file=False)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert stop.check()


def test_a_third_interrupt_does_not_wait_for_python(tmp_path):
    """A process that holds on in a `finally`, as one does whose peers have gone."""
    code = (
        "import sys, time; from pathlib import Path; from mlc.parallel.preempt import StopFlag\n"
        "stop = StopFlag(Path(sys.argv[1]), watches_file=False)\n"
        "try:\n"
        "    while True: print('step', int(stop.raised), flush=True); time.sleep(0.05)\n"
        "finally:\n"
        "    print('interrupted', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for said in (b"step 0\n", b"step 1\n", b"interrupted\n"):
        while (line := process.stdout.readline()) != said:
            assert line.startswith(b"step")
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == -signal.SIGINT


def ticking(monkeypatch):
    """A clock that is two seconds further at each look."""
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr(preempt.time, "monotonic", lambda: next(clock))


def test_a_stop_file_raises_the_flag_and_an_old_one_does_not(tmp_path, monkeypatch):
    (tmp_path / "STOP").touch()
    stop = StopFlag(tmp_path, watches_file=True)
    ticking(monkeypatch)
    assert not stop.check()
    (tmp_path / "STOP").touch()
    assert stop.check()
    stop.clear()
    assert not (tmp_path / "STOP").exists() and stop.check()


def test_a_stop_file_that_came_during_the_start_counts_under_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("MLC_KEEP_STOP", "1")
    (tmp_path / "STOP").touch()
    ticking(monkeypatch)
    assert StopFlag(tmp_path, watches_file=True).check()
    assert not StopFlag(tmp_path, watches_file=False).check()


def test_the_end_of_the_allocation_raises_the_flag(tmp_path, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(preempt.time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 3600))
    stop = StopFlag(tmp_path, watches_file=False)
    ticking(monkeypatch)
    now += 3299
    assert not stop.check()
    now += 1
    assert stop.check()


@pytest.mark.parametrize(
    "left, before, expected", [(3600, "", 3300), (3600, "60", 3540), (600, "", 450), (60, "300", 45), (-5, "", -5)]
)
def test_when_an_allocation_is_left(monkeypatch, left, before, expected):
    monkeypatch.setattr(preempt.time, "time", lambda: 1_000_000.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(1_000_000 + left))
    monkeypatch.setenv("MLC_STOP_BEFORE_END", before)
    assert allocation_end() == 1_000_000 + expected


def test_outside_of_slurm_there_is_no_end(monkeypatch):
    assert allocation_end() == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME=soon is not a number of seconds"):
        allocation_end()


RANK = """
import os, sys, time
from pathlib import Path
from mlc.parallel import preempt
preempt.LOOK = 0.05
preempt.stop_with_launcher()
stop, parent = preempt.StopFlag(Path(sys.argv[1]), watches_file=False), os.getppid()
print("begun", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
begin = time.monotonic()
while not stop.check() and time.monotonic() < begin + float(sys.argv[2]):
    time.sleep(0.01)
print("saves" if stop.check() else "goes on", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def outlived(launcher: list[str], folder, seconds: float, **environment: str) -> tuple[str, str]:
    """(what a process says that outlives its parent, on stdout; on stderr)"""
    parent = subprocess.Popen(
        [*launcher, "-c", RANK, str(folder), str(seconds)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    said = parent.communicate()  # ends with the child, which has the other end
    return said[0].strip(), said[1].strip()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2", "RANK": "1"}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_a_rank_whose_launcher_is_killed_stops(tmp_path, environment):
    said, warned = outlived([sys.executable, "-c", LAUNCHER], tmp_path, 60, **environment)
    assert said == "saves" and warned == f"[rank {environment.get('RANK', 0)}] the launcher has gone: stopping"


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}], ids=["alone", "one of two"])
def test_a_program_outlives_the_shell_it_was_started_from(tmp_path, environment):
    shell = ["bash", "-c", '"$@"; true', "bash", sys.executable]
    assert outlived(shell, tmp_path, 0.3, **environment) == ("goes on", "")
