"""Trials of faults in real processes: a run of two ranks suffers one, and is resumed until it is finished.

    python trials.py < [{"fault": "kill -9", "moment": "writing", "rank": 1, "at": 2}, ...]      one JSON line for each

What must come out is the run that nothing happened to: weights, optimizer state and EMA by their checksums, log,
samples, exported weights. No launcher helps: when a rank dies, the other must find out and end by itself.

The ranks are forked from here, where everything is imported and nothing has run yet, and are nobody's but ours to
reap, workers included; so a trial takes seconds, and "all processes gone" is certain.
"""

import atexit
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from injector import Fault, Place, arm, heal

from mlc import predict, train
from mlc.parallel import storage
from mlc.runlog import read_log
from shards.console import run

WORLD = 2
STEPS = 12  # of 8 samples: two epochs of the 48
BOUND = 60.0  # seconds from the start, on an idle machine, in which all processes must have ended
DISK = "64m"
TIMED = ("train/img_per_sec", "data/wait_frac", "sys/mem_gb", "ckpt/blocked_s", "ckpt/write_s")
TINY = ["embed_dim=8", "depths=[1,1]", "num_heads=[1,2]", "window_size=4"]
_NEW_MOUNTS, _SUBREAPER = 0x20000, 36  # <sched.h>, <sys/prctl.h>


@dataclass(kw_only=True)
class Outcome:
    """How the processes of one world ended: exit codes (negative: a signal), seconds, those of computing by one rank,
    what each printed last."""

    codes: list[int | None]
    seconds: float
    computing: float
    printed: list[str]

    @property
    def last(self) -> list[str]:
        return [(text.strip().splitlines() or [""])[-1] for text in self.printed]

    @property
    def tails(self) -> list[str]:
        return ["\n".join(text.splitlines()[-8:]) for text in self.printed]


class Bench:
    """Data, the run that nothing happens to, and the trials that are compared with it."""

    def __init__(self, root: Path, *, pause: float = 20.0):
        """root: an empty folder; pause: seconds that a SIGSTOP lasts."""
        self.root, self.pause, self._number = root, pause, 0
        self.slowness = 1.0  # how much longer the machine takes than one that has nothing else to do
        self.mounts = _alone()
        _make_data(root)
        self._straight = Place(disk=root / "straight", data=root / "shards", mark=root / "none", mounts=False)
        self._straight.disk.mkdir()
        for main, argv in ((train.main, self._training), (predict.main, self._predicting)):
            done = self._world(main, argv(self._straight), self._straight, None)
            assert done.codes == [0] * WORLD, done.printed
            self.slowness = max(self.slowness, done.seconds / done.computing)
        self.trained, self.predicted = _trained(self._straight.disk), _predicted(self._straight.disk)

    def trial(self, fault: Fault) -> dict[str, Any]:
        """What came of it; `problem` is '' when all is as it must be."""
        self._number += 1
        folder = self.root / f"trial-{self._number}"
        place = Place(disk=folder / "disk", data=folder / "shards", mark=folder / "mark", mounts=self.mounts)
        place.disk.mkdir(parents=True)
        if self.mounts:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place.disk], check=True)
        shutil.copytree(self.root / "shards", place.data)
        suffer = self._suffer_prediction if fault.predicting else self._suffer_training
        found: dict[str, Any] = asdict(fault) | {"problem": ""}
        try:
            suffer(fault, place, found)
        except _Problem as problem:
            found["problem"] = str(problem)
        heal(place)
        if self.mounts:
            subprocess.run(["umount", "-l", place.disk], check=True)
        shutil.rmtree(folder)
        return found

    # ---- the two programs --------------------------------------------------------------------------------------------

    def _training(self, place: Place) -> list[str]:
        argv = ["--model", "swinv2_tiny_window8_256", "--img-size", "32", "--drop-path", "0.2", "--model-kwargs", *TINY]
        argv += ["--data", str(place.data), "--output", str(place.disk), "--experiment", "run", "-b", "4", "-j", "1"]
        argv += ["--max-steps", str(STEPS), "--eval-every", "4st", "--checkpoint-every", "3st", "--log-interval", "1"]
        argv += ["--mixup", "0.4", "--clip-grad", "1", "--lr", "3e-3", "--model-ema-decay", "0.9"]
        # No sample may be replaced by a neighbour: that would be another training.
        argv += ["--max-bad-samples", "0", "--log-samples", str(place.disk / "samples.jsonl"), "--resume", "auto"]
        return argv

    def _predicting(self, place: Place) -> list[str]:
        argv = ["--run", str(self._straight.disk / "run"), "--weights", "last", "--data", str(place.data), "-b", "1"]
        return [*argv, "-j", "1", "--max-bad-samples", "0", "--out", str(place.disk / "predictions")]

    def _suffer_training(self, fault: Fault, place: Place, found: dict[str, Any]) -> None:
        done = self._world(train.main, self._training(place), place, fault)
        self._note(found, done, fault, place)
        _check_nothing_half(place.disk / "run")
        heal(place)
        if fault.fault == "corrupted newest":
            _corrupt_newest(place.disk / "run", fault)
        found["resumes"] = 0
        while not _finished(place.disk / "run"):
            found["resumes"] += 1
            again = self._world(train.main, self._training(place), place, None)
            if any(again.codes) and "there is no other checkpoint to go on from" in again.last[0]:
                found["refused"] = again.last[0].replace(f"{place.mark.parent}/", "")
                shutil.rmtree(place.disk / "run" / "checkpoints")  # the user starts anew
            elif any(again.codes) or found["resumes"] > 2:
                raise _Problem(f"resume ended with {again.codes}: {again.tails}")
        _compare(_trained(place.disk), self.trained)
        left = [name for name in storage.names(place.disk / "run" / "checkpoints") if name.startswith(".")]
        if left:
            raise _Problem(f"left behind: {left}")

    def _suffer_prediction(self, fault: Fault, place: Place, found: dict[str, Any]) -> None:
        done = self._world(predict.main, self._predicting(place), place, fault)
        self._note(found, done, fault, place)
        for name, content in _predicted(place.disk).items():
            if content != self.predicted[name]:
                raise _Problem(f"{name} is there, but not whole")
        heal(place)
        found["resumes"] = 0
        if len(_predicted(place.disk)) < len(self.predicted):
            found["resumes"] = 1
            again = self._world(predict.main, self._predicting(place), place, None)
            if any(again.codes):
                raise _Problem(f"the second prediction ended with {again.codes}: {again.tails}")
        _compare(_predicted(place.disk), self.predicted)

    def _note(self, found: dict[str, Any], done: Outcome, fault: Fault, place: Place) -> None:
        last = [text.replace(f"{place.mark.parent}/", "") for text in done.last]
        found |= {"codes": done.codes, "last": last, "seconds": round(done.seconds / self.slowness, 2)}
        if not place.mark.exists():
            raise _Problem(f"the moment never came; {done.codes}: {done.last}")
        if None in done.codes:
            raise _Problem(f"rank {done.codes.index(None)} hung for {BOUND * self.slowness:.0f} s: {done.tails}")
        if all("another process failed" in last for last in done.last):
            raise _Problem(f"each rank blames the other: {done.tails}")
        for rank, (code, text, last) in enumerate(zip(done.codes, done.printed, done.last, strict=True)):
            # Who dies of a defect of its own leaves a traceback, who is made to vanish says nothing.
            own = rank == fault.rank and (fault.fault == "dies while others wait" or "injected" in last)
            if code > 0 and not own and not _clear(text):
                raise _Problem(f"rank {rank} ended with {code} and no clear line: {done.tails[rank]}")

    # ---- processes ---------------------------------------------------------------------------------------------------

    def _world(self, main: Callable, argv: list[str], place: Place, fault: Fault | None) -> Outcome:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        folder = place.mark.parent
        logs = [folder / f"{place.disk.name}-{rank}.err" for rank in range(WORLD)]
        begin, ranks = time.time(), []
        for rank, log in enumerate(logs):
            pid = os.fork()
            if not pid:
                _member(rank, port, log, main, argv, fault, place)
            ranks.append(pid)
        codes, end, computing = self._watch(ranks, begin, place.mark)
        struck = float(place.mark.read_text()) if fault and place.mark.exists() else begin
        printed = [log.read_text() for log in logs]
        return Outcome(codes=codes, seconds=end - struck, computing=computing / WORLD, printed=printed)

    def _watch(self, ranks: list[int], begin: float, mark: Path) -> tuple[list[int | None], float, float]:
        """Exit codes, None for a rank that had to be killed; when the last descendant was gone; seconds computing."""
        codes: dict[int, int | None] = {}
        go_on: dict[int, float] = {}
        computing = 0.0
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return [codes[pid] for pid in ranks], time.time(), computing
            if pid and os.WIFSTOPPED(status):
                go_on[pid] = time.time() + self.pause
            elif pid:
                codes.setdefault(pid, os.waitstatus_to_exitcode(status))
                computing += used.ru_utime + used.ru_stime
            for stopped in [p for p, when in go_on.items() if time.time() > when]:
                os.kill(stopped, signal.SIGCONT)
                del go_on[stopped]
            if time.time() > begin + BOUND * self.slowness + self.pause:
                _kill(ranks, codes)
            if not pid:
                time.sleep(0.01)


class _Problem(Exception):
    pass


def _alone() -> bool:
    """Makes orphans ours, and mounts nobody else's (they vanish with us); False where mounting is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    return libc.unshare(_NEW_MOUNTS) == 0 and not subprocess.run(["mount", "--make-rprivate", "/"]).returncode


def _make_data(root: Path) -> None:
    raw = root / "raw"
    demo = ["demo-data", raw, "--samples", "70", "--workers", "1"]
    pack = ["pack", "--csv", raw / "train.csv", "--images", raw / "images", "--test-csv", raw / "test.csv"]
    pack += ["--out", root / "shards", "--val-fraction", "0.2", "--shard-size", "20", "-j", "1"]
    for argv in (demo, pack):
        subprocess.run([sys.executable, "-m", "mlc", *argv], check=True, capture_output=True)


def _member(rank, port, log, main, argv, fault, place) -> None:
    """A rank, in the fork; never returns. It ends as an interpreter does: exit handlers, then waiting for threads."""
    code = 1
    try:
        os.setsid()
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1), os.dup2(number, 2)
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
        os.environ |= {name: str(value) for name, value in world.items()}
        if fault and fault.rank == rank:
            arm(fault, place, rank)
        code = run(main, argv)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(ranks: list[int], codes: dict[int, int | None]) -> None:
    for pid in ranks:
        codes.setdefault(pid, None)
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# ---- what must be so -------------------------------------------------------------------------------------------------


def _clear(text: str) -> bool:
    """No traceback, and one line that says what is wrong; more may follow it where it lists samples."""
    return "Traceback" not in text and bool(re.search(r"^(\[rank \d+\] )?(error: |stopped: )", text, re.MULTILINE))


def _finished(run_folder: Path) -> bool:
    found = storage.complete(run_folder / "checkpoints")
    return bool(found) and storage.step_of(found[-1]) == STEPS


def _check_nothing_half(run_folder: Path) -> None:
    """What has its final name is whole."""
    for folder in storage.complete(run_folder / "checkpoints"):
        if damage := storage.damage(folder):
            raise _Problem(f"{folder.name} counts as complete: {damage}")
    for path in run_folder.glob("*/*.json"):
        json.loads(path.read_text())
    for path in run_folder.glob("*/model.safetensors"):
        length = int.from_bytes(path.open("rb").read(8), "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + length + max(ends):
            raise _Problem(f"{path} is cut")


def _corrupt_newest(run_folder: Path, fault: Fault) -> None:
    """A flipped bit, a cut file, a lost one: by turns."""
    found = storage.complete(run_folder / "checkpoints")
    if not found:
        return
    files = sorted(found[-1].glob("*.distcp"))
    if fault.at % 3 == 0:
        content = bytearray(files[0].read_bytes())
        content[len(content) // 2] ^= 1
        files[0].write_bytes(content)
    elif fault.at % 3 == 1:
        os.truncate(found[-1] / ".metadata", 100)
    else:
        files[-1].unlink()


def _trained(disk: Path) -> dict[str, Any]:
    """All that a run leaves, without what depends on the clock."""
    folder = disk / "run"
    newest = storage.complete(folder / "checkpoints")[-1]
    files = storage.read_meta(newest)["files"]
    log = read_log(folder / "log.jsonl")
    exported = [f"{which}/{name}" for which in ("best", "last") for name in os.listdir(folder / which)]
    return {
        "checkpoint": {name: file["sha256"] for name, file in files.items() if name.endswith(".distcp")},
        "log": json.dumps([{name: value for name, value in line.items() if name not in TIMED} for line in log]),
        "samples": (disk / "samples.jsonl").read_text(),
        **{name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in exported},
    }


def _predicted(disk: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((disk / "predictions").glob("*.csv"))}


def _compare(now: dict[str, Any], straight: dict[str, Any]) -> None:
    differ = sorted(name for name in now.keys() | straight.keys() if now.get(name) != straight.get(name))
    if differ:
        shown = [(now.get(name), straight.get(name)) for name in differ if name in ("log", "checkpoint")]
        raise _Problem(f"not what an uninterrupted run leaves: {differ} {shown}")


def main() -> None:
    faults = [Fault(**fault) for fault in json.load(sys.stdin)]
    root = Path(tempfile.mkdtemp(prefix="mlc-trials-"))
    try:
        bench = Bench(root, pause=float(sys.argv[1]))
        for fault in faults:
            print(json.dumps(bench.trial(fault)), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
