"""Reading a run's log, for what only looks at finished runs and has no need of torch."""

import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line cut by a crash is left out.

    None is a number that is not finite, also where an older run wrote NaN or Infinity.
    """
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text, parse_constant=lambda _: None))
        except json.JSONDecodeError:
            continue
    return lines
