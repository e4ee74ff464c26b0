"""Real processes that work together, a second after they are asked for: see tests/world_server.py."""

import atexit
import functools
import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment


@functools.cache
def _server() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "world_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "warning"},
        text=True,
    )
    atexit.register(process.kill)
    return process


def ask(size: int | str, argv: list[str], *besides: str) -> tuple[list[int], str]:
    """(exit codes, stdout and stderr) of `train.py ARGV` in so many processes, or in those of mlc/launch/SIZE.yaml.

    besides: functions of world_server.py that are called first in each process.
    """
    answer = _answer(size, "train.py", argv, besides)
    return answer["codes"], answer["printed"] + answer["said"]


def call(processes: int, program: str, argv: list[str], *besides: str) -> subprocess.CompletedProcess:
    """`train.py ARGV` or `mlc ARGV` in so many processes, as if a launcher had been waited for; besides: as `ask`."""
    answer = _answer(processes, program, argv, besides)
    code = max(answer["codes"], key=abs)
    return subprocess.CompletedProcess([program, *argv], code, answer["printed"], answer["said"])


def _answer(size: int | str, program: str, argv: list[str], besides: tuple[str, ...]) -> dict:
    server, asked = _server(), {"size": size, "program": program, "argv": argv, "besides": besides}
    print(json.dumps(asked), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def train(size: int | str, argv: list[str], *besides: str) -> str:
    """What a world said that must end well."""
    codes, said = ask(size, argv, *besides)
    assert not any(codes), f"{size} processes returned {codes}: {' '.join(argv)}\n{said[-6000:]}"
    return said
