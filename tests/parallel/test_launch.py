"""Processes that never meet: each would train alone and overwrite the other's files."""

import pytest
from accelerate.state import PartialState

from mlc.parallel import launch
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
