"""Entry for the published `python bert_train.py`, which trains the report's model of captions; see mlc/published.py."""

import sys

from mlc.published import bert_train
from shards.console import run

if __name__ == "__main__":
    sys.exit(run(bert_train))
