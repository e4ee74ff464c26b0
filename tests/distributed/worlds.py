"""Runs `train.py` in one world after another, without paying for the imports each time.

    python worlds.py < [[2, [ARGUMENTS OF TRAIN.PY]], [3, [...]], ...]

Each world is so many processes, connected as torchrun connects them. They are forked from here, where everything is
imported and nothing has run yet.
"""

import json
import os
import socket
import sys

from mlc import train
from shards.console import run


def world(size: int, argv: list[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [os.fork() or member(rank, common, argv) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{size} processes returned {codes}: {' '.join(argv)}")


def member(rank: int, common: dict, argv: list[str]) -> None:
    os.environ |= {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **common}.items()}
    code = 1
    try:
        code = run(train.main, argv)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for size, argv in json.load(sys.stdin):
        world(size, argv)
