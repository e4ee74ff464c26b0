import json
import re
from pathlib import Path

import numpy as np
import pytest

from shards.json_text import to_json

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("layout", [{}, {"indent": 1, "ensure_ascii": False}, {"sort_keys": True}])
def test_finite_values_are_written_as_ever(layout):
    value = {"ä": [1, 2.5, -0.1, None, True, "NaN"], "b": {"c": (1e308, 1e-300)}}
    assert to_json(value, **layout) == json.dumps(value, **layout)


def test_what_is_not_finite_is_null():
    value = {"map": float("nan"), "of": [float("inf"), (np.float64("-inf"), 0.5)], "n": 3}
    assert to_json(value) == '{"map": null, "of": [null, [null, 0.5]], "n": 3}'


def test_nothing_else_writes_json():
    """Or a NaN comes through that only Python can read."""
    files = [file for room in ("mlc", "shards", "benchmarks") for file in (ROOT / room).rglob("*.py")]
    writers = [file.name for file in files if re.search(r"json\.dumps?\(", file.read_text(encoding="utf-8"))]
    assert writers == ["json_text.py"]
