import errno
import os

import pytest

from shards.console import UserError
from shards.files import disk_errors, whole


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
