"""Trainings as processes of their own, several at a time: one that fails, or eats memory, harms none of the others.

A job's folder holds `settings.yaml`, what it printed (`output.log`) and how long each of its processes took
(`seconds`, one line each); these say what became of it, whoever started it: this module or slurm/sweep.sbatch.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shards import owner
from shards.console import UserError, say
from shards.files import disk_errors
from shards.owner import RUN_LOCK
from shards.workers import default_workers

OUTPUT, SECONDS, SETTINGS = "output.log", "seconds", "settings.yaml"
LOCK = ".job"  # of the program that started a training, besides the training's own
FINISHED = ("done; weights in ", " is finished at ")  # what train.py says at the end of a run, or to one that is over


@dataclass(frozen=True)
class Job:
    """`needs`: folders of jobs that must be finished before."""

    folder: Path
    needs: tuple[Path, ...] = ()


def finished(folder: Path) -> bool:
    return any(words in line for line in _printed(folder) for words in FINISHED)


def seconds(folder: Path) -> float:
    """Over all processes that worked on it; 0 where nobody knows."""
    path = folder / SECONDS
    return sum(map(float, path.read_text().split())) if path.exists() else 0.0


def last_words(folder: Path) -> str:
    return next((line.strip() for line in reversed(_printed(folder)) if line.strip()), "it printed nothing")


def _printed(folder: Path) -> list[str]:
    path = folder / OUTPUT
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def command(folder: Path, launch_file: Path | None) -> list[str]:
    start = _launcher("--config_file", str(launch_file)) if launch_file else ["-m"]
    return [sys.executable, *start, "mlc", "train", "-c", str(folder / SETTINGS)]


def _launcher(*flags: str) -> list[str]:
    """Python's flags for `accelerate launch -m`, on any free port: several may run at once."""
    return ["-m", "accelerate.commands.launch", *flags, "--main_process_port", "0", "-m"]


def work(
    jobs: Sequence[Job], *, at_once: int, launch_file: Path | None, gpus: Sequence[str], say: Callable[[str], None]
) -> dict[Path, str]:
    """Runs all that are not finished, `at_once` at a time, each on one of `gpus` where there are several.

    Ctrl-C (or SIGTERM) lets the running ones save and ends; returns {folder: why} of what is not finished.
    """
    done = {folder for job in jobs for folder in (job.folder, *job.needs) if finished(folder)}
    waiting = [job for job in jobs if job.folder not in done]
    unfinished: dict[Path, str] = {}
    running: dict[int, _Process] = {}
    total, begun = len(waiting), 0
    with _stopped_by_signals():
        try:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.needs)]
                for slot, job in zip(sorted(set(range(at_once)) - set(running)), ready, strict=False):
                    begun += 1
                    say(f"[{begun}/{total}] {job.folder.name}")
                    waiting.remove(job)
                    try:
                        running[slot] = _Process(job, launch_file, _environment(at_once, gpus, slot))
                    except owner.Held as held:
                        unfinished[job.folder] = f"left to {held}, which is training it now"
                if not (running or ready):  # what is left needs a run that failed
                    break
                time.sleep(0.1)
                for slot in [slot for slot, process in running.items() if process.over()]:
                    process = running.pop(slot)
                    if process.succeeded():
                        done.add(process.job.folder)
                    else:
                        unfinished[process.job.folder] = process.verdict()
                        say(f"{process.job.folder.name}: {process.verdict()}")
        except KeyboardInterrupt:
            _stop(list(running.values()), say)
            raise
    for job in waiting:
        missing = next(folder for folder in job.needs if folder not in done)
        unfinished[job.folder] = f"not run, since {missing.name} is not finished"
    return unfinished


class _Process:
    """A training under way; in a session of its own, so that a terminal's Ctrl-C does not reach it before us."""

    def __init__(self, job: Job, launch_file: Path | None, environment: dict[str, str]):
        self.job, self._begin, self._over = job, time.monotonic(), False
        output = job.folder / OUTPUT
        self._lock = owner.take(job.folder / LOCK)
        if training := owner.holder(job.folder / RUN_LOCK):  # begun by one of us that was killed, or by hand
            self._lock.close()
            raise owner.Held(training)
        self._offset = output.stat().st_size if output.exists() else 0
        with output.open("ab") as file:
            (job.folder / "STOP").unlink(missing_ok=True)
            self._process = subprocess.Popen(
                command(job.folder, launch_file),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def over(self) -> bool:
        if not self._over and self._process.poll() is not None:
            self._over = True
            self._lock.close()
            with (self.job.folder / SECONDS).open("a") as file:
                file.write(f"{time.monotonic() - self._begin:.1f}\n")
        return self._over

    def succeeded(self) -> bool:
        return self._process.returncode == 0 and finished(self.job.folder)

    def verdict(self) -> str:
        if self._process.returncode == 0:
            return "stopped before its end; the same command goes on with it"
        said = (self.job.folder / OUTPUT).stat().st_size > self._offset
        words = last_words(self.job.folder) if said else "it printed nothing"
        return f"failed ({self._process.returncode}): {words}"

    def ask_to_stop(self) -> None:
        """By the file, which all ranks see at the same step; launchers die of signals and take their workers along."""
        (self.job.folder / "STOP").touch()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()


def _environment(at_once: int, gpus: Sequence[str], slot: int) -> dict[str, str]:
    """The cores divided, a GPU each; MLC_KEEP_STOP since we have taken old STOP files away."""
    own = {"OMP_NUM_THREADS": str(max(1, default_workers() // at_once))} | os.environ | {"MLC_KEEP_STOP": "1"}
    return own | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 and at_once > 1 else {})


def on_gpus(command: Sequence[str], count: int) -> list[str]:
    """`mlc VERB ...` by `accelerate launch`, one process for each GPU of this machine."""
    flags = ["--multi_gpu", "--num_processes", str(count), "--mixed_precision", "bf16"]
    return [*_launcher(*flags), *command]


def run_in_sight(command: Sequence[str], *, log: Path, run: Path | None = None) -> None:
    """A module of Python with its arguments, or flags of Python, printed as it prints and into `log`. run: the folder
    of a training, which saves and ends where this program is stopped.

    Raises:
        UserError: it failed, or the training did not come to its end.
    """
    module = list(command) if command[0].startswith("-") else ["-m", *command]
    environment = os.environ | ({"MLC_KEEP_STOP": "1"} if run else {})
    ended = run is None
    if run:
        (run / "STOP").unlink(missing_ok=True)
    with _stopped_by_signals(), disk_errors(log), log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *module],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        line = ""
        try:
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                file.write(line)
                ended = ended or any(words in line for words in FINISHED)
            code = process.wait()
        except KeyboardInterrupt:
            if run and run.is_dir():
                (run / "STOP").touch()
            else:
                process.terminate()
            say("it is stopped; the same command goes on from here")
            process.communicate()
            raise
    if code:
        raise UserError(f"`mlc {' '.join(command[1:2])}` failed ({code}): {line.strip() or 'it printed nothing'}")
    if not ended:
        raise UserError(f"{run} was stopped before its end; the same command goes on with it")


@contextmanager
def _stopped_by_signals():
    """What ends this program also ends what it started: SIGTERM, and a closed terminal unless under nohup."""

    def stop(number, frame):
        raise KeyboardInterrupt

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(processes: Sequence[_Process], say: Callable[[str], None]) -> None:
    try:
        for process in processes:
            process.ask_to_stop()
        say(f"{len(processes)} runs are saving a checkpoint; once more Ctrl-C ends them at once")
        while sum(process.over() for process in processes) < len(processes):
            time.sleep(0.1)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
