import os
import signal

import pytest

from mlc.parallel import preempt
from mlc.parallel.preempt import StopFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_raises_the_flag(tmp_path, number):
    stop = StopFlag(tmp_path, watches_file=False)
    assert not stop.check()
    os.kill(os.getpid(), number)
    assert stop.check()


def test_a_second_interrupt_stops_now(tmp_path):
    stop = StopFlag(tmp_path, watches_file=False)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.check()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_file_raises_the_flag_and_an_old_one_does_not(tmp_path, monkeypatch):
    (tmp_path / "STOP").touch()
    stop = StopFlag(tmp_path, watches_file=True)
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr(preempt.time, "monotonic", lambda: next(clock))
    assert not stop.check()
    (tmp_path / "STOP").touch()
    assert stop.check()
