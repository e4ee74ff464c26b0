"""Views of the log elsewhere: they show each line once, and nothing that happens to them happens to the training."""

import json
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from mlc import mirrors
from mlc.config import Config
from mlc.mirrors import Mirror
from mlc.runlog import RunLog


def write_steps(log: RunLog, steps) -> None:
    for step in steps:
        log.write(step=step, samples_seen=step * 8, epoch=step / 10, **{"train/loss": 1 / step})
        if step % 4 == 0:
            log.write(step=step, samples_seen=step * 8, epoch=step / 10, **{"val/map": step / 100})


def records(file: Path):
    """The records of an offline W&B file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def history(folder: Path, lines: int) -> list[dict]:
    """The logged lines; W&B's own process may still be writing them."""
    until = time.monotonic() + 300
    while len(found := _history(folder)) < lines and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _history(folder: Path) -> list[dict]:
    lines = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                lines.append({name: value for name, value in line.items() if not name.startswith("_")})
    return lines


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads its settings once for a process


def test_wandb_is_one_run_and_one_curve_through_a_crash(tmp_path):
    """Steps 5 to 7 are made twice, since the last checkpoint was at step 4; they come once."""
    config = Config(log_wandb=True, wandb_mode="offline", wandb_group="g", wandb_tags=["a", "b"])
    first = RunLog(tmp_path, config, enabled=True, resumed_step=None)
    write_steps(first, range(1, 8))
    first.close()
    second = RunLog(tmp_path, config, enabled=True, resumed_step=4)
    write_steps(second, range(5, 10))
    second.close(**{"best/map": 0.08})
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    seen = history(tmp_path, 11)
    assert [line["step"] for line in seen if "train/loss" in line] == list(range(1, 10))
    assert [line["step"] for line in seen if "val/map" in line] == [4, 8]
    found = [r for f in tmp_path.glob("wandb/offline-run-*/*.wandb") for r in records(f)]
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id").read_text()}
    assert runs[0].run_group == "g" and list(runs[0].tags) == ["a", "b"]
    summaries = [i for r in found if r.WhichOneof("record_type") == "summary" for i in r.summary.update]
    assert ("best/map", 0.08) in [(i.key or "/".join(i.nested_key), json.loads(i.value_json)) for i in summaries]


def test_wandb_gets_the_samples_as_a_table(tmp_path):
    log = RunLog(tmp_path, Config(log_wandb=True, wandb_mode="offline"), enabled=True, resumed_step=None)
    samples = [{"image": Image.new("RGB", (8, 8), color), "key": color, "labels": "a b"} for color in ("red", "blue")]
    log.write(step=4, samples_seen=8, epoch=1.0, samples=samples, **{"val/map": 0.5})
    log.close()
    table = {name.removeprefix("val/samples/"): value for name, value in history(tmp_path, 1)[0].items()}
    assert (table["_type"], table["nrows"], table["ncols"]) == ("table-file", 2, 3)
    found = json.loads(next(tmp_path.glob("wandb/offline-run-*/files/" + table["path"])).read_text())
    artifact = next(r.artifact for f in tmp_path.glob("wandb/*/*.wandb") for r in records(f) if r.HasField("artifact"))
    assert sum(entry.path.endswith(".png") for entry in artifact.manifest.contents) == 2
    assert found["columns"] == ["image", "key", "labels"] and [row[1:] for row in found["data"]] == [
        ["red", "a b"],
        ["blue", "a b"],
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "step": 4,
        "samples_seen": 8,
        "epoch": 1.0,
        "val/map": 0.5,
    }


@pytest.fixture
def black_hole():
    """A server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        open_ends = []

        def swallow():
            while True:
                try:
                    open_ends.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=swallow, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for end in open_ends:
            end.close()


def test_a_dead_wandb_neither_slows_nor_stops_a_run(tmp_path, monkeypatch, black_hole, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", black_hole)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(mirrors, "INIT_SECONDS", 3.0)
    begin = time.perf_counter()
    log = RunLog(tmp_path, Config(log_wandb=True, wandb_mode="online"), enabled=True, resumed_step=None)
    write_steps(log, range(1, 9))
    assert time.perf_counter() - begin < 1.5  # it has not waited for an answer
    log.close()
    assert time.perf_counter() - begin < 45
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 10
    assert "writing to disk instead: wandb sync" in capsys.readouterr().err
    assert [line["step"] for line in history(tmp_path, 10) if "train/loss" in line] == list(range(1, 9))


class Broken:
    def __init__(self, fails_at: int):
        self.fails_at, self.taken = fails_at, []

    def write(self, values):
        if values["step"] == self.fails_at:
            raise OSError("no space")
        self.taken.append(values["step"])

    def close(self, final):
        self.taken.append(final)


def test_a_view_that_breaks_says_so_once_and_is_left_alone():
    said, view = [], Broken(3)
    mirror = Mirror("view", lambda: view, said.append)
    for step in range(1, 6):
        mirror.write({"step": step})
    mirror.close({})
    assert view.taken == [1, 2] and said == [
        "view is off from here on (OSError: no space); the run goes on, see log.jsonl"
    ]


def test_a_view_gets_all_lines_in_order_and_then_the_end():
    view = Broken(-1)
    mirror = Mirror("view", lambda: view, print)
    for step in range(1000):
        mirror.write({"step": step})
    mirror.close({"best": 1})
    assert view.taken == [*range(1000), {"best": 1}]


def test_a_view_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(mirrors, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(mirrors, "WAITING_LINES", 10)
    said, free = [], threading.Event()
    mirror = Mirror("view", free.wait, said.append)
    for step in range(15):
        mirror.write({"step": step})
    begin = time.perf_counter()
    mirror.close({})
    assert time.perf_counter() - begin < 2
    assert said[0].startswith("view does not answer") and said[1].startswith("view: 5 lines were dropped")
    free.set()


def test_tensorboard_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(log_tensorboard=True)
    for resumed, steps in ((None, range(1, 8)), (4, range(5, 10))):
        log = RunLog(tmp_path, config, enabled=True, resumed_step=resumed)
        write_steps(log, steps)
        log.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == list(range(1, 10))
    assert [(event.step, round(event.value, 3)) for event in seen.Scalars("val/map")] == [(4, 0.04), (8, 0.08)]
