"""Hard mining over two processes: the list is made of the losses of both, so one process repeats the same samples."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import TINY, run

from shards.dataset import load_dataset, open_index

pytestmark = pytest.mark.distributed


def arguments(shards: Path, folder: Path, *more: str) -> list[str]:
    """120 samples an epoch (100 and a fifth), 16 a step: lists for the second and the third epoch."""
    lengths = ["--global-batch-size", "16", "--max-steps", "20", "--checkpoint-every", "5st", "--log-interval", "1"]
    where = ["--output", str(folder), "--experiment", "run", "--log-samples", str(folder / "samples.jsonl")]
    mined = [
        "--hard-mining",
        "0.2",
        "--drop-path",
        "0",
        "--mixup",
        "0.4",
        "--lr",
        "1e-3",
        "--sched",
        "constant",
        "--val-split",
        "",
    ]
    return ["train.py", *TINY, *lengths, *where, *mined, "--data", str(shards), *more]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_one_process_and_two_and_a_resume_repeat_the_same_samples(shards, tmp_path):
    run(*arguments(shards, tmp_path / "two", "-b", "8", "-j", "1"), processes=2)
    run(*arguments(shards, tmp_path / "one", "-b", "16", "-j", "0"))
    lines = samples(tmp_path / "two")
    assert samples(tmp_path / "one") == lines
    index = open_index(load_dataset(shards), "train")
    keys, size = [key for line in lines for key in line["keys"]], round(1.2 * len(index))
    every = Counter(index.key(row) for row in range(len(index)))
    repeated = [Counter(keys[first : first + size]) - every for first in (0, size)]
    assert [sum(found.values()) for found in repeated] == [size - len(index)] * 2 and repeated[0] != repeated[1]

    # stopped by two processes in the second epoch, gone on with by one
    run(*arguments(shards, tmp_path / "cut", "-b", "8", "-j", "1", "--max-steps", "10"), processes=2)
    again = run(*arguments(shards, tmp_path / "cut", "-b", "8", "-j", "0", "--resume", "auto"))
    assert "resumed from" in again.stderr and samples(tmp_path / "cut") == lines
