import json

import numpy as np
import torch

from mlc.config import Config
from mlc.environment import environment
from mlc.runlog import RunLog


def test_a_run_keeps_versions_device_and_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    RunLog(tmp_path / "other-rank", Config(), enabled=False, resumed_step=None).close()
    RunLog(tmp_path / "run", Config(), enabled=True, resumed_step=None).close()
    assert not (tmp_path / "other-rank").exists()
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found == environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["numpy"] == np.__version__
    assert found["processes"] == 3 and found["device"]
