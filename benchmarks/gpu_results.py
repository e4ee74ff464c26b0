"""Merges what the parts of benchmarks/gpu.sh left into one file, because a number without its device, driver and
versions is worth nothing a year later.

A part NAME has left NAME.ended (exit code and seconds), NAME.log and, if it went well, NAME.json.
"""

import argparse
import datetime
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from shards.json_text import to_json

NEEDED = "torch torchvision timm accelerate safetensors webdataset PIL simplejpeg cv2 pyarrow sklearn scipy rich yaml"
SAID = 3000  # last characters that are kept of a part which failed


def missing() -> str:
    """Why nothing can be measured here, in one line; '' when it can."""
    absent = [name for name in NEEDED.split() if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {', '.join(absent)}; install this project there"
    import torch

    if not torch.cuda.is_available():
        return f"there is no GPU that PyTorch {torch.__version__} can use; benchmarks/step.py also runs on a CPU"
    return ""


def device() -> dict[str, object]:
    """Name, driver, memory and number of the GPUs, and what computes on them."""
    import common
    import torch

    first = torch.cuda.get_device_properties(0)
    return {
        "device": first.name,
        "devices": torch.cuda.device_count(),
        "memory_gib": round(first.total_memory / 2**30, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "machine": common.machine(),
        "versions": common.versions("torch", "timm", "accelerate"),
    }


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def merged(work: Path) -> dict[str, dict]:
    """{part: {ended, seconds, results | said}}, in the order they ran."""
    parts = {}
    for path in sorted(work.glob("*.ended"), key=lambda path: path.stat().st_mtime_ns):
        code, seconds = path.read_text().split()
        part = {"ended": ended(code), "seconds": int(seconds)}
        results, log = path.with_suffix(".json"), path.with_suffix(".log")
        if results.exists():
            part["results"] = json.loads(results.read_text())
        if log.exists() and not results.exists():
            part["said"] = log.read_text(errors="replace")[-SAID:]
        parts[path.stem] = part
    return parts


def ended(code: str) -> str:
    return {"0": "well", "124": "out of time", "137": "out of time", "skipped": "skipped: out of time"}.get(
        code, f"failed with exit code {code}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Merges the parts of benchmarks/gpu.sh into one JSON file.")
    parser.add_argument("--check", action="store_true", help="only say in one line what is missing; exit code 2")
    parser.add_argument("work", type=Path, nargs="?", help="folder with what the parts left")
    parser.add_argument("results", type=Path, nargs="?", help="folder of the file to write")
    args = parser.parse_args()
    if args.check:
        reason = missing()
        if reason:
            print(f"benchmarks/gpu.sh: {reason}", file=sys.stderr)
        return 2 if reason else 0
    found, today = device(), datetime.date.today().isoformat()
    parts = merged(args.work)
    name = re.sub(r"\W+", "-", str(found["device"])).strip("-").lower()
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{name}-{today}.json"
    path.write_text(to_json({**found, "date": today, "parts": parts}, indent=2) + "\n")
    for part, content in parts.items():
        print(f"{part:<16}{content['ended']}, {content['seconds']} s")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
