"""Entry for the published commands, `python main.py --exp_name ...`; see mlc/published.py."""

import sys

from mlc.published import run as published
from shards.console import run

if __name__ == "__main__":
    sys.exit(run(published))
