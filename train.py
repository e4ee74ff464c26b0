"""Entry for `accelerate launch train.py`; the story is in mlc/train.py."""

import sys

from mlc.train import main
from shards.console import run

if __name__ == "__main__":
    sys.exit(run(main))
