"""What the files in a folder of predictions are of.

They are named by the split or the folder that was predicted, and two of those may have one name: the
split `test`, and a folder `test` somewhere on the disk. Neither may quietly take the other's place.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.console import UserError
from shards.dataset import Dataset, write_json
from shards.files import disk_errors

NOTE = "sources.json"


def of_split(dataset: Dataset, split: str) -> dict[str, str]:
    """The same data set is known by what is in it or, once its labels are corrected, by where it is."""
    where = dataset.url or str(dataset.root.resolve())
    return {"of": f"the split {split!r} of {where}", "data": f"{dataset.fingerprint}/{split}"}


def of_images(source: str | Path) -> dict[str, str]:
    """source: a folder, a file or a glob."""
    path = Path(source).resolve()
    return {"of": f"the folder {path}" if path.is_dir() else f"the images {path}"}


def refuse_others(folder: Path, names: Sequence[str], source: dict[str, str], *, splits: bool = True) -> None:
    """Raises UserError where one of these files is there and of something else.

    splits: refuse to replace those of another data set's split, too. Files from before there was a
        note are taken to be of the split that is predicted.
    """
    known = _read(folder)
    unknown = source if "data" in source else {"of": "a split"}
    for name in names:
        there = known.get(name, unknown)
        same = any(there.get(key) == value for key, value in source.items())
        allowed = same or ("data" in there and not splits)
        if (folder / name).is_file() and not allowed:
            raise UserError(
                f"{folder / name} has the predictions of {there.get('of')}, these are of {source['of']}; "
                "move that file away, or name another folder by --out of `mlc predict`"
            )


def note(folder: Path, names: Sequence[str], source: dict[str, str]) -> None:
    """Keeps for later calls what these files are of."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NOTE, _read(folder) | dict.fromkeys(names, source))


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = known if isinstance(known, dict) else {}
    return {name: about for name, about in known.items() if isinstance(about, dict)}
