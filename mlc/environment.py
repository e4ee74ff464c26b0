"""What a run was trained with: a number that nobody can repeat is often a matter of another version or another device.

`environment.json` in the run's folder is for people and for `mlc report`; nothing is decided by it.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from shards.files import whole
from shards.json_text import to_json

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "transformers", "deepspeed", "numpy")


def environment() -> dict[str, str | int]:
    """Name -> value: Python and packages, the device of this process, the number of processes."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    elif torch.backends.mps.is_available():
        found["device"] = f"Apple GPU, {os.cpu_count()} cores"
    else:
        found["device"] = f"CPU, {os.cpu_count()} cores"
    found["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    return found


def write_environment(folder: Path) -> None:
    with whole(folder / "environment.json") as building:
        building.write_text(to_json(environment(), indent=1) + "\n")
