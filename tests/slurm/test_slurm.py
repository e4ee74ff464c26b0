"""A real Slurm stops, cuts and cancels runs; each goes on and ends as the one that nobody touched."""

import csv
import shlex
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import cluster as slurm
import psutil
import pytest
import worlds
import yaml
from cluster import output, started
from conftest import TINY, log_of
from processes import PATIENCE, alive, freeze, hold, pending, ranks, thaw, wait_until

from mlc import predict
from mlc.parallel import storage

pytestmark = pytest.mark.slurm

STEPS = 20
SAMPLES = 100  # of the training split
TWO_NODES = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1"]  # a process on each
ONE_NODE = ["--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2"]  # two processes on it


@pytest.fixture(scope="module")
def cluster():
    with started() as running:
        yield running


@pytest.fixture(scope="module")
def data(demo_csv, tmp_path_factory) -> Path:
    """The demo data in two folds."""
    from shards import pack

    folder = tmp_path_factory.mktemp("folds") / "shards"
    source = ["--csv", str(demo_csv / "train.csv"), "--images", str(demo_csv / "images")]
    tests = ["--test-csv", str(demo_csv / "test.csv")]
    pack.main([*source, *tests, "--val-fraction", "0.2", "--folds", "2", "--out", str(folder), "-j", "1"])
    return folder


def arguments(data: Path, output: Path, *more: str, name: str = "run") -> list[str]:
    """Steps of 16 samples, several epochs of them, with a checkpoint at every fifth."""
    run = ["--data", str(data), "--output", str(output), "--experiment", name, "-b", "8", "-j", "0"]
    every = ["--eval-every", "10st", "--checkpoint-every", "5st", "--log-interval", "1", "--max-steps", str(STEPS)]
    return [*TINY, *run, *every, "--global-batch-size", "16", "--mixup", "0.4", *more]


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory) -> Path:
    """A run of two processes that nobody stopped, without Slurm."""
    folder = tmp_path_factory.mktemp("untouched")
    worlds.train(2, arguments(data, folder))
    return folder / "run"


def losses(run: Path) -> list[dict]:
    """The log without what the clock and the memory say."""
    timed = ("train/img_per_sec", "data/wait_frac", "sys/mem_gb", "ckpt/blocked_s", "ckpt/write_s")
    return [{name: value for name, value in line.items() if name not in timed} for line in log_of(run)]


def newest(run: Path) -> dict:
    return storage.read_meta(storage.complete(run / "checkpoints")[-1])


def newest_step(checkpoints: Path) -> int:
    """0 before the first."""
    found = storage.complete(checkpoints)
    return storage.read_meta(found[-1])["progress"]["step"] if found else 0


def sbatch(cluster, folder: Path, script: str, *argv: str, options: list[str] = ONE_NODE) -> str:
    return cluster.sbatch(f"--output={folder}/%x-%j.out", *options, f"slurm/{script}.sbatch", *argv)


@pytest.fixture(scope="module")
def cut(cluster, data, tmp_path_factory) -> tuple[Path, str]:
    """(folder, job) that hangs after its checkpoint of step 10 until its time is over: a minute, which is why it is
    begun early.

    Slurm wakes it up some seconds before it kills it; awake, it may save and go back into the queue in time.
    """
    folder = tmp_path_factory.mktemp("cut")
    number = sbatch(cluster, folder, "train", *arguments(data, folder), options=[*ONE_NODE, "--signal=B:USR1@1"])
    checkpoints = folder / "run" / "checkpoints"
    held = freeze_while(folder / "run", lambda: newest_step(checkpoints) == 10 and not unfinished(checkpoints))
    cluster("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    threading.Thread(target=hold_until_killed, args=[held, PATIENCE, 0.01], daemon=True).start()
    return folder, number


def test_a_preempted_job_requeues_itself_and_ends_like_one_that_was_not(cluster, cut, data, untouched, tmp_path):
    run = tmp_path / "run"
    number = sbatch(cluster, tmp_path, "train", *arguments(data, tmp_path), options=TWO_NODES)
    held = freeze(run, at_step=7)
    assert len(held) == 2 and cluster.job(number)["NumNodes"] == "2"
    cluster("scancel", "--signal=USR1", "--batch", number)
    wait_until((run / "STOP").exists)
    thaw(held)

    cluster.wait(number, "PENDING")
    stopped = newest(run)["progress"]
    assert 7 <= stopped["step"] < STEPS and stopped["samples_seen"] % SAMPLES  # in mid-epoch
    cluster.start_requeued(number)
    job = cluster.wait(number, "COMPLETED")
    assert job["Restarts"] == "1"
    printed = output(job)
    assert "back into the queue" in printed and f"step {stopped['step']}, " in printed  # appended to, not replaced
    assert losses(run) == losses(untouched)
    assert not (run / "STOP").exists()


def test_a_job_cut_by_its_limit_then_cancelled_in_mid_checkpoint_ends_like_one_that_was_not(
    cluster, cut, data, untouched
):
    folder, number = cut
    run = folder / "run"
    checkpoints = run / "checkpoints"
    cluster.wait(number, "TIMEOUT")
    wait_until(lambda: not ranks(run))
    kept = newest(run)["progress"]["step"]
    assert kept == 10

    number = sbatch(cluster, folder, "train", *arguments(data, folder, "--checkpoint-every", "1st"))
    job = cluster.job(number)  # what it says goes through Slurm, and may come after what it does
    processes = freeze_while(run, lambda: unfinished(checkpoints) and f"step {kept}, " in output(job))
    good = newest(run)["progress"]["step"]
    cancelled = threading.Thread(target=hold_until_killed, args=[processes])
    cancelled.start()
    cluster("scancel", number)
    cancelled.join()
    job = cluster.wait(number, "CANCELLED")
    assert f"step {kept}, " in output(job) and "back into the queue" not in output(job)
    assert unfinished(checkpoints) and newest(run)["progress"]["step"] == good < STEPS

    job = cluster.wait(sbatch(cluster, folder, "train", *arguments(data, folder)), "COMPLETED")
    assert f"step {good}, " in output(job)
    assert losses(run) == losses(untouched)
    assert not unfinished(checkpoints)


def freeze_while(run: Path, true) -> list[psutil.Process]:
    """Holds a run at a moment that passes quickly: tries again until the moment was still there afterwards."""
    while True:
        wait_until(true)
        processes = ranks(run)
        hold(processes)
        if processes and true():
            return processes
        thaw(processes)


def hold_until_killed(processes: list[psutil.Process], seconds: float = PATIENCE, pause: float = 0.001) -> None:
    """As a disk that hangs: Slurm wakes up what it cancels, and kills it some seconds later."""
    deadline = time.monotonic() + seconds
    while processes:
        assert time.monotonic() < deadline
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        processes = [process for process in processes if alive(process)]
        time.sleep(pause)


def unfinished(checkpoints: Path) -> list[Path]:
    """Folders that are no checkpoints yet."""
    return [path for path in checkpoints.glob("*step-*") if path.is_dir() and not (path / storage.META).exists()]


def test_each_fold_is_a_run(cluster, data, tmp_path):
    """Rendered and submitted by `mlc slurm`."""
    own = ["--folds", "2", "--cpus", "1", "--local", str(tmp_path / "local"), "--sbatch=--parsable"]
    more = ["--max-steps", "4", "--checkpoint-every", "1ep"]
    said = cluster("mlc", "slurm", "kfold", *own, "--", *arguments(data, tmp_path, *more, name="cv"))
    number = said.split()[-1]
    for fold in (0, 1):
        job = cluster.wait(f"{number}_{fold}", "COMPLETED")
        assert "done; weights in" in output(job)
        folder = tmp_path / f"cv-fold{fold}"
        assert yaml.safe_load((folder / "args.yaml").read_text())["fold"] == fold
        assert (folder / "best" / "model.safetensors").exists()
    first, second = (log_of(tmp_path / f"cv-fold{fold}") for fold in (0, 1))
    assert first[0]["train/loss"] != second[0]["train/loss"]  # other samples
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cv-fold0", "cv-fold1", "cv-kfold", "local"]
    assert list((tmp_path / "local" / "shards").glob("*.tar"))


def test_prediction_on_two_nodes_is_the_prediction_of_one_process(cluster, data, untouched, tmp_path):
    argv = ["--run", str(untouched), "--data", str(data), "--split", "test", "-j", "0", "-b", "8"]
    number = sbatch(cluster, tmp_path, "predict", *argv, "--out", str(tmp_path / "two"), options=TWO_NODES)
    predict.main([*argv, "--out", str(tmp_path / "one")])
    job = cluster.wait(number, "COMPLETED")
    one, two = ((tmp_path / name / "test.csv").read_text() for name in ("one", "two"))
    assert one == two, output(job)
    assert len(list(csv.reader(one.splitlines()))) > 10


def test_tasks_of_plain_srun_train_together_and_save_at_a_signal(cluster, data, untouched, tmp_path):
    """No launcher: Slurm's own signal reaches every process."""
    run, script = tmp_path / "run", tmp_path / "job"
    script.write_text(f"#!/bin/bash\nexec srun --ntasks=2 python train.py {shlex.join(arguments(data, tmp_path))}\n")
    number = cluster.sbatch("--ntasks=2", "--nodes=1", "--gpus=2", f"--output={tmp_path}/%j.out", str(script))
    held = freeze(run, at_step=3)
    cluster("scancel", "--signal=USR1", number)
    wait_until(lambda: any(pending(process, signal.SIGUSR1) for process in held))
    thaw(held)
    job = cluster.wait(number, "COMPLETED")
    meta = newest(run)
    assert meta["world_size"] == 2 and 3 <= meta["progress"]["step"] < STEPS
    assert job["ExitCode"] == "0:0" and "--resume auto goes on" in output(job)
    assert losses(run) == losses(untouched)[: len(losses(run))]


def test_a_mistake_in_the_command_ends_the_job_before_any_training(cluster, data, tmp_path):
    number = sbatch(cluster, tmp_path, "train", *arguments(data, tmp_path, "--epoch", "3"))
    job = cluster.wait(number, "FAILED")
    assert job["ExitCode"] == "2:0" and "did you mean --epochs" in output(job)
    assert not (tmp_path / "run").exists()


def test_without_slurm_ci_fails_and_a_user_is_told(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name, path: None)
    monkeypatch.delenv("MLC_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no slurmctld, slurmd, sbatch, munged on this machine"), started():
        pass
    monkeypatch.setenv("MLC_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install slurm-wlm munge"), started():
        pass


def test_a_sweep_is_an_array_and_one_that_waits_for_it(cluster, data, tmp_path):
    """A student waits for the teacher that it needs; a third run needs nobody."""
    spec = {
        "base": {"max_steps": 2, "eval_every": "2st", "batch_size": 8, "workers": 0},
        "seeds": [1],
        "metric": "f1_samples",
        "variants": {"teacher": {}, "mixup": {"mixup": 0.4}, "student": {"kd_teacher": "{teacher}"}},
    }
    file, out = tmp_path / "spec.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(spec))
    flags = [*TINY, "--data", str(data)]
    sbatch_flags = "--gpus 1 --cpus 1 --time 10:00"
    printed = cluster("mlc", "sweep", str(file), *flags, "--out", str(out), f"--slurm={sbatch_flags}")
    first, second = (line.split()[-1] for line in printed.splitlines() if line.startswith("Submitted batch job"))
    for number in (first, second):
        cluster.wait(number, "COMPLETED")
    cluster("mlc", "sweep", str(file), *flags, "--out", str(out), "--report-only")
    with (out / "results.csv").open() as rows:
        assert {row["variant"] for row in csv.DictReader(rows)} == {"teacher", "mixup", "student"}
    assert "kd_teacher" in (out / "student-s1" / "args.yaml").read_text()
