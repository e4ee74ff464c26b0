"""Who holds a lock, who is dead, and that one of several who come at once gets it."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from conftest import ROOT

from shards import owner

RACER = """
import sys, time
from pathlib import Path
from shards import owner
while not Path(sys.argv[1]).with_name("go").exists():
    pass
try:
    owner.take(Path(sys.argv[1]))
    print("won", flush=True)
    time.sleep(60)
except owner.Held:
    print("refused", flush=True)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".owner"


def left_behind(path, number: int = 1, **changed) -> None:
    """The file of a holder that did not release its lock; of this very process unless changed."""
    path.with_name(f"{path.name}.{number}").write_text(json.dumps(vars(owner._myself()) | changed))


def test_one_at_a_time(path):
    lock = owner.take(path)
    assert owner.holder(path).pid == os.getpid()
    with pytest.raises(owner.Held, match=rf"process {os.getpid()} on this machine, since 20\d\d-") as held:
        owner.take(path)
    assert f"kill {os.getpid()}" in held.value.fix
    lock.close()
    assert owner.holder(path) is None and not list(path.parent.iterdir())
    owner.take(path).close()


@pytest.mark.parametrize(
    "changed", [{"started": "1"}, {"pid": 2**22 + 1}], ids=["another process of that number", "no such process"]
)
def test_a_dead_one_on_this_machine_is_followed_at_once(path, changed):
    left_behind(path, 7, **changed)
    begin = time.monotonic()
    lock = owner.take(path)
    assert [file.name for file in path.parent.iterdir()] == [".owner.8"] and time.monotonic() < begin + owner.PATIENCE
    lock.close()


def test_a_killed_one_is_dead_though_nobody_has_asked_how_it_ended(path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left_behind(path, pid=child.pid, started=owner._started(child.pid))
    assert owner.holder(path).pid == child.pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.holder(path) is None
    child.wait()


def elsewhere(path, **changed) -> None:
    left_behind(path, host="node7", place="node7", pid=5, **changed)


def test_one_on_another_machine_lives_by_its_heartbeat(path, capsys, monkeypatch):
    elsewhere(path)
    beating = threading.Timer(0.3, os.utime, [path.with_name(".owner.1")])
    beating.start()
    with pytest.raises(owner.Held, match="process 5 on node7, since") as held:
        owner.take(path)
    beating.join()
    assert "if node7 is gone, the same command goes on 60 s after its last sign of life" in held.value.fix
    assert "looking for a sign of life of process 5 on node7" in capsys.readouterr().err
    monkeypatch.setattr(owner, "PATIENCE", 0.3)
    owner.take(path).close()


def test_an_old_heartbeat_is_not_waited_for(path, capsys):
    elsewhere(path)
    os.utime(path.with_name(".owner.1"), (0, time.time() - owner.PATIENCE - 1))
    owner.take(path).close()
    assert not capsys.readouterr().err and not list(path.parent.iterdir())


def test_the_holder_moves_the_time_on(path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.01)
    lock = owner.take(path)
    (file,) = path.parent.iterdir()
    os.utime(file, (0, 0))
    while not file.stat().st_mtime:
        time.sleep(0.01)
    lock.close()


def test_who_was_suspended_until_another_took_over_ends(path):
    """And does not take the other's lock away."""
    code = "from pathlib import Path; from shards import owner; import sys, time; owner.BEAT = 0.05\n"
    code += "owner.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "taken\n"
    elsewhere(path.with_name("x"))
    path.with_name("x.1").rename(path.with_name(".owner.2"))
    path.with_name(".owner.1").unlink()
    assert "was taken over by process 5 on node7" in child.communicate()[1]
    assert child.returncode == 1 and path.with_name(".owner.2").exists()


@pytest.mark.parametrize("dead", [True, False], ids=["from a dead one", "from nobody"])
def test_of_several_who_come_at_once_one_wins(path, dead):
    if dead:
        left_behind(path, pid=2**22 + 1)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    time.sleep(0.5)
    path.with_name("go").touch()
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert sorted(said) == ["refused"] * 3 + ["won"]


def test_threads_wait_for_each_other(path):
    inside, most = [], []

    def work():
        for _ in range(3):
            with owner.owned(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 12 and max(most) == 1


def test_a_folder_that_has_gone_is_no_reason_to_end(path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.01)
    monkeypatch.setattr(owner, "_lost", lambda *_: pytest.fail("ended"))
    lock = owner.take(path)
    with suppress(FileNotFoundError):
        path.with_name(".owner.1").unlink()
    time.sleep(0.05)
    lock.close()
