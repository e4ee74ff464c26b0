import csv
import os
import pty
import select
import sys
from types import SimpleNamespace

import pytest

from mlc.config import Config
from mlc.runlog import RunLog, SampleLog, duration, evaluation_line, read_log
from shards.console import UserError


def write_steps(log: RunLog, steps) -> None:
    for step in steps:
        log.write(step=step, samples_seen=step * 8, epoch=step / 10, **{"train/loss": 1 / step})
        if step % 4 == 0:
            log.write(step=step, samples_seen=step * 8, epoch=step / 10, **{"val/map": step / 100})


def test_a_resumed_log_has_every_step_once(tmp_path):
    log = RunLog(tmp_path, Config(), enabled=True, resumed_step=None)
    write_steps(log, range(1, 8))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # the crash cut this line
    log = RunLog(tmp_path, Config(), enabled=True, resumed_step=5)
    write_steps(log, range(6, 10))
    log.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9]


def test_summary_has_a_row_per_evaluation_with_the_training_values_before_it(tmp_path):
    log = RunLog(tmp_path, Config(), enabled=True, resumed_step=None)
    write_steps(log, range(1, 9))
    log.close()
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["step"], row["val/map"], row["train/loss"]) for row in rows] == [
        ("4", "0.04", "0.25"),
        ("8", "0.08", "0.125"),
    ]


def test_a_resumed_log_of_samples_survives_a_line_cut_by_a_crash(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "keys": ["a"]}\n{"step": 2, "keys": ["b"]}\n{"step": 3, "ke')
    SampleLog(path, [], SimpleNamespace(is_main_process=True), resumed_step=1)
    assert path.read_text() == '{"step": 1, "keys": ["a"]}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_ends_the_run_in_one_line(tmp_path):
    log = RunLog(tmp_path, Config(), enabled=True, resumed_step=None)
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"log.jsonl could not be written \(No space left on device\).*--resume auto"):
        log.write(step=1)


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", Config(), enabled=False, resumed_step=None)
    log.write(step=1)
    log.say("hello")
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds, text", [(3, "3s"), (200, "3m20s"), (3840, "1h04m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def bars(folder, monkeypatch, **environment) -> bytes:
    """What a terminal shows of a run of four steps."""
    ours, theirs = pty.openpty()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        log = RunLog(folder, Config(), enabled=True, resumed_step=None, steps=4)
        for step in range(1, 5):
            log.advance(step)
        log.say("a line")
        log.close()
        terminal.flush()
        shown = b""
        while select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 100_000)
    os.close(ours)
    return shown


def test_a_bar_on_a_terminal_and_none_under_slurm(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = bars(tmp_path / "run", monkeypatch)
    assert b"4/4" in shown and b"a line" in shown and b"\x1b[?25h" in shown  # the cursor is back
    shown = bars(tmp_path / "slurm", monkeypatch, SLURM_JOB_ID="7")
    assert b"4/4" not in shown and b"a line" in shown


def test_a_value_that_is_not_finite_is_null_in_the_log_and_a_dash_for_people(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "val/map": NaN, "train/grad_norm": Infinity}\n')  # of an older run
    log = RunLog(tmp_path, Config(), enabled=True, resumed_step=1)
    log.write(step=2, **{"val/map": float("nan"), "val/loss": 0.5})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert text.splitlines()[1] == '{"step": 2, "val/map": null, "val/loss": 0.5}'
    assert "NaN" not in text and "Infinity" not in text
    assert [line["val/map"] for line in read_log(tmp_path / "log.jsonl")] == [None, None]
    assert [row["val/map"] for row in csv.DictReader((tmp_path / "summary.csv").open())] == ["", ""]
    names = ("loss", "map", "f1_samples", "f1_samples@tuned", "f1_micro", "f1_macro", "threshold")
    assert evaluation_line(2, "val", dict.fromkeys(names, 0.5) | {"map": float("nan")}).count("mAP -  F1") == 1
