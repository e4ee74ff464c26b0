"""Killed packs, full disks and second runs: OUT is the old pack, the new one or absent, and no work is done twice."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing import opened, pack_raw, tree, write_raw

from shards import owner, pack
from shards.plan import Checked

# Runs `mlc pack` and dies at a chosen moment as by `kill -9`: nothing is cleaned up.
DYING = """
import os, signal, sys
from pathlib import Path
from shards import pack

def die():
    os.kill(os.getpid(), signal.SIGKILL)

moment, calls, packed, noted, rename = sys.argv[1], [], pack.pack_file, pack.write_json, Path.rename

def in_a_tar(*args, **kwargs):
    calls.append(1)
    return die() if len(calls) == 8 else packed(*args, **kwargs)

def before_the_note(path, content):
    return die() if path.name == "train-000001.json" else noted(path, content)

def between_renames(path, target):
    return die() if path.name == "pack" else rename(path, target)

if moment == "in a tar":
    pack.pack_file = in_a_tar
elif moment == "before the note":
    pack.write_json = before_the_note
elif moment == "before dataset.json":
    pack.write_dataset = lambda dataset: die()
elif moment == "before the rename":
    pack._publish = lambda *args: die()
elif moment == "between renames":
    Path.rename = between_renames
pack.main(sys.argv[2:])
"""
FLAGS = ("--val-fraction", "0.2", "--folds", "2", "--shard-size", "4")


@pytest.fixture
def raw(tmp_path) -> Path:
    return write_raw(tmp_path / "raw", samples=20)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Without torch, which packing does not need and which takes seconds to load."""
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch" / "torch.py").write_text("raise ModuleNotFoundError('not installed')")
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path / "no-torch"), str(Path.cwd())))}


def arguments(raw: Path, out: Path, *flags: str) -> list[str]:
    return ["--csv", str(raw / "train.csv"), "--images", str(raw / "images"), "--out", str(out), *FLAGS, *flags]


def reference(raw: Path) -> dict[str, str]:
    """An uninterrupted pack of the same input."""
    assert pack_raw(raw, raw.parent / "reference", *FLAGS) == 0
    return tree(raw.parent / "reference")


@pytest.mark.parametrize(
    ("moment", "shards_kept"),
    [("in a tar", 1), ("before the note", 1), ("before dataset.json", 5), ("before the rename", 5)],
)
def test_killed_and_run_again_gives_the_same_bytes(raw, tmp_path, environment, capsys, moment, shards_kept):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", DYING, moment, *arguments(raw, out, "-j", "1")], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    capsys.readouterr()
    assert pack_raw(raw, out, *FLAGS) == 0
    assert f"{shards_kept} of 5 shards are there" in capsys.readouterr().err
    assert tree(out) == reference(raw)
    assert not (tmp_path / "out.partial").exists()


def test_killed_while_the_old_pack_is_replaced(raw, tmp_path, environment):
    out = tmp_path / "out"
    assert pack_raw(raw, out, "--seed", "5", *FLAGS) == 0
    before = tree(out)
    flags = arguments(raw, out, "--overwrite", "-j", "1")
    done = subprocess.run([sys.executable, "-c", DYING, "between renames", *flags], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert pack_raw(raw, out, *FLAGS) == 2  # without --overwrite the old pack comes back as it was
    assert tree(out) == before
    assert pack_raw(raw, out, "--overwrite", *FLAGS) == 0
    assert tree(out) == reference(raw)
    assert not (tmp_path / "out.partial").exists()


def test_the_workers_of_a_killed_pack_end_and_the_next_takes_over(tmp_path, environment):
    raw, out = write_raw(tmp_path / "many", samples=80), tmp_path / "out"
    code = "import sys; from shards import pack; pack.WORKER_BYTES = 1; pack.main(sys.argv[1:])"
    flags = ["--csv", str(raw / "train.csv"), "--images", str(raw / "images"), "--out", str(out), "--shard-size", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *flags, "-j", "2"], env=environment)
    notes = tmp_path / "out.partial" / "parts"
    wait_until(lambda: notes.is_dir() and len(list(notes.iterdir())) > 5)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert not out.exists()
    wait_until(lambda: not any(running(worker) for worker in workers))
    assert pack_raw(raw, out, "--shard-size", "1") == 0
    assert pack_raw(raw, tmp_path / "reference", "--shard-size", "1") == 0
    assert tree(out) == tree(tmp_path / "reference")


def wait_until(happened, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_pack_is_not_touched(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack_raw(raw, out, *FLAGS) == 0
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert pack_raw(raw, out, *FLAGS) == 0
    assert "already packed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def change_row(raw: Path) -> None:
    (raw / "train.csv").write_text((raw / "train.csv").read_text() + "extra.jpg,1,\n")
    (raw / "images" / "extra.jpg").write_bytes((raw / "images" / "0.jpg").read_bytes())


def change_image(raw: Path) -> None:
    (raw / "images" / "3.jpg").write_bytes((raw / "images" / "0.jpg").read_bytes())


def change_classes(raw: Path) -> None:
    (raw / "classes.yaml").write_text("classes: [4, 3, 2, 1, 0]")


@pytest.mark.parametrize("change", [change_row, change_image, change_classes, None])
def test_another_pack_needs_overwrite(raw, tmp_path, capsys, change):
    out = tmp_path / "out"
    assert pack_raw(raw, out, *FLAGS) == 0
    before = tree(out)
    change_flag = () if change else ("--resize", "8")
    if change:
        change(raw)
    assert pack_raw(raw, out, *FLAGS, *change_flag) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tree(out) == before
    assert pack_raw(raw, out, *FLAGS, *change_flag, "--overwrite") == 0
    assert tree(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_bad_input_with_overwrite_leaves_the_old_pack(raw, tmp_path):
    out = tmp_path / "out"
    assert pack_raw(raw, out, *FLAGS) == 0
    before = tree(out)
    (raw / "images" / "3.jpg").unlink()
    assert pack_raw(raw, out, *FLAGS, "--overwrite") == 2
    assert tree(out) == before


def test_folders_of_other_things_are_never_replaced(raw, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("only copy")
    assert pack_raw(raw, out, "--overwrite") == 2
    assert "is not a packed data set" in capsys.readouterr().err
    (out / "thesis.txt").unlink()
    assert pack_raw(raw, out) == 0
    (out / "thesis.txt").write_text("only copy")
    assert pack_raw(raw, out, "--seed", "1", "--val-fraction", "0.5", "--overwrite") == 2
    assert "thesis.txt" in capsys.readouterr().err
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("only copy")
    assert pack_raw(raw, tmp_path / "other") == 2
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "other.partial" / "thesis.txt").read_text() == "only copy"


def test_a_pack_that_lost_a_shard_says_so(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack_raw(raw, out) == 0
    (out / "train-000000.tar").unlink()
    assert pack_raw(raw, out) == 2
    assert "train-000000.tar is missing" in capsys.readouterr().err
    assert pack_raw(raw, out, "--overwrite") == 0
    assert len(opened(out)) == 20


def test_what_a_run_of_other_input_left_is_not_used(raw, tmp_path, environment, capsys):
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", DYING, "before the rename", *arguments(raw, out, "-j", "1")], env=environment)
    change_image(raw)
    capsys.readouterr()
    assert pack_raw(raw, out, *FLAGS) == 0
    assert "from an earlier run" not in capsys.readouterr().err
    assert tree(out) == reference(raw)


def test_a_mount_point_cannot_be_renamed_over(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    assert pack_raw(raw, tmp_path / "out") == 2
    assert "name a folder in it" in capsys.readouterr().err


def test_what_a_kill_after_the_last_rename_leaves_is_dropped(raw, tmp_path, environment):
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", DYING, "before the rename", *arguments(raw, out, "-j", "1")], env=environment)
    (tmp_path / "out.partial" / "pack").rename(out)
    assert pack_raw(raw, out, *FLAGS) == 0
    assert not (tmp_path / "out.partial").exists()
    assert tree(out) == reference(raw)


def test_two_at_a_time(raw, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").touch()
    with owner.owned(tmp_path / "out.partial" / "lock"):
        assert pack_raw(raw, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "another mlc pack is writing" in said and f"process {os.getpid()} on this machine" in said


def test_a_file_system_without_flock(raw, tmp_path, monkeypatch):
    """Lustre and many NFS mounts."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert pack_raw(raw, tmp_path / "out", *FLAGS) == 0
    assert tree(tmp_path / "out") == reference(raw)


@pytest.mark.parametrize("writer", ["write_tar", "write_index"])
def test_a_full_disk_is_one_line_and_keeps_what_is_finished(raw, tmp_path, capsys, monkeypatch, writer):
    real, calls = getattr(pack, writer), []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(pack, writer, full)
    assert pack_raw(raw, tmp_path / "out", *FLAGS) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the disk of")
    assert said.count("\n") == 1
    monkeypatch.undo()
    assert pack_raw(raw, tmp_path / "out", *FLAGS) == 0
    assert "shards are there from an earlier run" in capsys.readouterr().err
    assert tree(tmp_path / "out") == reference(raw)


def test_an_image_that_changes_while_it_is_packed(raw, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pack, "check_images", lambda plan, args: change_to_text(raw))
    assert pack_raw(raw, tmp_path / "out") == 2
    assert "3.jpg changed while it was packed" in capsys.readouterr().err


def change_to_text(raw: Path) -> Checked:
    (raw / "images" / "3.jpg").write_text("hello")
    return Checked()
