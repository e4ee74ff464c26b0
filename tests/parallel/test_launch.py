"""Processes that never meet: each would train alone and overwrite the other's files."""

import socket
from pathlib import Path

import pytest
from accelerate.commands import launch as of_accelerate
from accelerate.state import PartialState
from conftest import ROOT

from mlc import train
from mlc.parallel import launch
from shards import owner
from shards.console import UserError


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield monkeypatch
    PartialState._reset_state()


def test_one_process_needs_no_launcher(alone):
    assert launch.start().num_processes == 1


def test_a_world_without_a_meeting_place_is_refused(alone):
    alone.setenv("WORLD_SIZE", "2")
    alone.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        launch.start()


def test_unconnected_processes_are_refused(alone):
    """What Accelerate makes of a launch it does not understand: one process that knows nothing of the other."""
    alone.setattr(launch, "Accelerator", lambda **_: type("Alone", (), {"num_processes": 1})())
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("LOCAL_WORLD_SIZE", "2")):
        alone.setenv(name, value)
    with pytest.raises(UserError, match="2 processes, but 1 are connected"):
        launch.start()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--num_processes 1"):
        launch.start()


@pytest.mark.parametrize(
    "error, line",
    [
        ("gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:23216", "another process failed"),
        ("gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1500ms for recv operation", "waited 1.5 s for"),
    ],
)
def test_the_failure_of_another_process_is_one_line(error, line, monkeypatch, capsys):
    monkeypatch.setattr(launch.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit), launch.peers():
        raise RuntimeError(error)
    said = capsys.readouterr().err
    assert f"stopped: {line}" in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="other"), launch.peers():
        raise RuntimeError("other")


def test_a_run_has_one_owner(tmp_path):
    """Until the program ends, stages included; a run that never began leaves no folder."""
    folder = tmp_path / "runs" / "run"
    with launch.peers():
        for _ in range(2):
            launch.own(folder)
        with pytest.raises(owner.Held):
            owner.take(folder / owner.RUN_LOCK)
        (folder / "log.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    with launch.peers():
        launch.own(tmp_path / "more" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_second_training_in_a_folder_is_refused(alone, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}")
    argv = ["--data", "none", "--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    with owner.owned(folder / owner.RUN_LOCK):
        with pytest.raises(UserError, match=r"run is in training already, by process \d+ on .*STOP` saves and stops"):
            train.main(argv)
        assert owner.holder(folder / owner.RUN_LOCK)
    with pytest.raises(UserError, match="no data set at none"):
        train.main(argv)
    assert (folder / "log.jsonl").read_text() == "{}"


LAUNCH_FILES = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "mlc" / "launch").glob("*2.yaml"))]
LAUNCH_FILES += sorted((ROOT / "mlc" / "launch").glob("zero[13]*.yaml"))


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_two_launches_do_not_meet(file: Path, monkeypatch):
    """Each takes a port that is free; with a fixed one the second dies of `EADDRINUSE`."""
    ports = []
    monkeypatch.setattr("torch.distributed.run.run", lambda args: ports.append(int(args.master_port)))

    def start() -> None:
        of_accelerate.launch_command(
            of_accelerate.launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
        )

    start()
    with socket.create_server(("", ports[0])):  # the first is running
        start()
    assert ports[0] != ports[1] and 29500 not in ports
