import errno
import os
import time

import pytest

from shards.console import UserError
from shards.files import ABANDONED, disk_errors, whole


class Broken(Exception):
    pass


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path) as building:
        building.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(errno.ENOSPC, "No space"), Broken()])
def test_whatever_goes_wrong_the_old_file_stays_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(BaseException) as raised, whole(path, Broken) as building:
        building.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    assert raised.type is (UserError if isinstance(error, OSError | Broken) else type(error))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    with pytest.raises(UserError) as error, disk_errors(tmp_path / "log.jsonl"), open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert str(error.value).startswith(
        f"{tmp_path}/log.jsonl could not be written (No space left on device); make room"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    """Though the library that writes it makes it private."""
    before = os.umask(umask)
    try:
        with whole(tmp_path / "weights") as building:
            building.unlink()
            os.close(os.open(building, os.O_WRONLY | os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode


def test_what_a_killed_program_left_is_deleted_when_nobody_can_be_writing_to_it(tmp_path):
    old, new = tmp_path / ".a.json.1.tmp", tmp_path / ".a.json.2.tmp"
    old.touch(), new.touch()
    os.utime(old, (0, time.time() - ABANDONED - 60))
    with whole(tmp_path / "a.json") as building:
        building.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".a.json.2.tmp", "a.json"]
