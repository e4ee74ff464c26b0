"""train.py with a frozen patch embedding, for the tests of strategies; there is no flag that freezes.

Several runs one after the other, their arguments parted by `--`: a process costs more than a run here.
"""

import sys

from mlc import train
from shards.console import run

build = train.build_model


def build_frozen(**settings):
    model = build(**settings)
    model.patch_embed.requires_grad_(False)
    return model


def runs(argv: list[str]) -> list[list[str]]:
    parted: list[list[str]] = [[]]
    for argument in argv:
        if argument == "--":
            parted.append([])
        else:
            parted[-1].append(argument)
    return parted


if __name__ == "__main__":
    train.build_model = build_frozen
    train.Accelerator.end_training = lambda self: None  # the next run needs the process group
    codes = [run(train.main, argv) for argv in runs(sys.argv[1:])]
    sys.stdout.write(f"exit codes {codes}\n")  # in one piece, beside another process's
