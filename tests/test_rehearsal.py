"""`--dry-run` is the real run, two steps long, and leaves nothing behind."""

import pytest
from conftest import TINY, run

from mlc import train
from shards.console import run as run_verb


def argv(shards, folder, *more: str) -> list[str]:
    return [*TINY, "--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0", *more]


def test_says_shapes_memory_time_and_size_and_keeps_nothing(shards, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 9}\n')  # of the real run, which is left alone
    more = ["--dry-run", "--global-batch-size", "16", "--resume", "auto"]
    more += ["--checkpoint-dir", str(tmp_path / "elsewhere")]
    assert run_verb(train.main, argv(shards, tmp_path, *more)) == 0
    said = capsys.readouterr().err
    assert "pixels uint8 [8, 3, 32, 32], image float32 [8, 3, 32, 32], target float32 [8, 18]" in said
    for words in (
        "step 2/2",
        "step 2  val:",
        "rank 0: peak memory",
        "s, ",
        "waiting for data",
        "elsewhere/run-dry-run",
    ):
        assert words in said
    assert "nothing was kept" in said and "done; weights" not in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "log.jsonl", "run"]


def test_a_failure_is_the_real_one_and_leaves_nothing_either(shards, tmp_path, capsys):
    readonly = tmp_path / "file"
    readonly.touch()
    code = run_verb(train.main, argv(shards, tmp_path, "--dry-run", "--checkpoint-dir", str(readonly)))
    assert code == 2 and "could not be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.distributed
def test_every_rank_says_its_memory(shards, tmp_path):
    done = run("train.py", *argv(shards, tmp_path, "--dry-run", "--strategy", "fsdp2"), processes=2)
    assert "rank 0: peak memory" in done.stderr and "rank 1: peak memory" in done.stderr
    assert not list(tmp_path.iterdir())
