"""Entry for the published `python bert_test.py`, which predicts with it; see mlc/published.py."""

import sys

from mlc.published import bert_test
from shards.console import run

if __name__ == "__main__":
    sys.exit(run(bert_test))
