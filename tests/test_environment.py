import json

import numpy as np
import torch

from mlc.environment import environment, write_environment


def test_versions_device_and_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    write_environment(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found == environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["numpy"] == np.__version__
    assert found["processes"] == 3 and found["device"]
