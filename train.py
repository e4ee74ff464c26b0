"""Entry for `accelerate launch train.py`; the story is in mlc/train.py, the published flags in mlc/published.py."""

import sys

from mlc.published import main
from shards.console import run

if __name__ == "__main__":
    sys.exit(run(main))
