"""JSON as the standard has it: a number that is not finite has none, and Python's own `NaN` and
`Infinity` make a file that no other reader opens. Such a number is written as null: undefined.
"""

import json
import math
from typing import Any


def to_json(value: Any, **layout) -> str:
    """`json.dumps` with the same `layout`, and null for every number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:  # rare, so that the copy is not made for nothing
        return json.dumps(finite(value), allow_nan=False, **layout)


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
