"""Trains in one world after another, without paying for the imports each time; see tests/worlds.py.

One line of JSON asks for a world, one line answers. Its processes are forked from here, where everything is imported
and nothing has run yet, and connected as torchrun connects them. Where the name of a file in mlc/launch is asked for,
accelerate's own launcher reads it, and only its last act, starting the processes, is done here.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  by ZeRO, which imports it late, and the compiler too
import torch
import torch.distributed.run
from accelerate.commands import launch

from mlc import cli, evaluate, predict, train  # noqa: F401
from mlc.metrics import multilabel
from mlc.parallel import compiler
from shards.console import run

LAUNCH = Path(train.__file__).parent / "launch"
LONGEST = 900.0  # seconds of a world: says only when to give up
GRACE = 30.0  # seconds that the others have once one has failed, as under torchrun; who stands still has none


def started(config: str) -> tuple[int, dict[str, str]]:
    """(number of processes, their environment) that `accelerate launch` makes of a shipped configuration."""
    found = []
    torch.distributed.run.run = lambda args: found.append((int(args.nproc_per_node), dict(os.environ)))
    flags = ["--config_file", str(LAUNCH / f"{config}.yaml"), "--main_process_port", "0"]
    launch.launch_command(launch.launch_command_parser().parse_args([*flags, "train.py"]))
    return found[0]


# ---- what a world may be asked to do besides -------------------------------------------------------------------------


def no_inductor() -> None:
    """torch.compile up to where a C++ compiler would be needed: tracing and autograd as ever, kernels of eager mode."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    compiler.need_compiler = lambda device: None


def stopped() -> None:
    """The last process sleeps for ever in its third step."""
    seed, calls = train.launch.seed_everything, itertools.count()  # the first is for the weights

    def seed_and_sleep(value: int) -> None:
        seed(value)
        if next(calls) == 3 and os.environ["RANK"] != "0":
            os.kill(os.getpid(), signal.SIGSTOP)

    train.launch.seed_everything = seed_and_sleep


def little_memory() -> None:
    """The last process has memory for 2 images at a time."""
    prepare = train.prepare

    def prepare_few(batch, *args, **kwargs):
        if len(batch["image"]) > 2 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has ...")
        return prepare(batch, *args, **kwargs)

    train.prepare = prepare_few


def another_opinion() -> None:
    """On the last process every evaluation is better than the one before, by as little as floats can say."""
    judge, last = multilabel.evaluate, os.environ["RANK"] == "1"
    values = itertools.accumulate(itertools.repeat(1.0), math.nextafter)

    def judge_better(*args, **kwargs):
        found = dict(judge(*args, **kwargs))
        return [*(found | {"f1_samples": next(values)} if last else found).items()]

    multilabel.evaluate = judge_better


def another_setting() -> None:
    """The last process reads another learning rate from its copy of a file."""
    if os.environ["RANK"] == "1":
        read = train.read_config
        train.read_config = lambda argv: dataclasses.replace(read(argv), lr=0.25)


def other_weights() -> None:
    """A training replaces the weights after the first process has read them."""
    if os.environ["RANK"] == "1":
        read = predict.load_exported

        def read_newer(folder):
            model, info = read(folder)
            next(model.parameters()).data.flatten()[0] += 1
            return model, info

        predict.load_exported = read_newer


PROGRAMS = {"train.py": train.main, "mlc": cli.main}
BESIDES = {
    setup.__name__: setup
    for setup in (
        another_opinion,
        another_setting,
        little_memory,
        no_inductor,
        other_weights,
        stopped,
    )
}


# ---- processes -------------------------------------------------------------------------------------------------------


def world(size: int | str, program: str, argv: list[str], besides: list[str]) -> dict:
    count, environment = (size, {}) if isinstance(size, int) else started(size)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    if count > 1:  # one alone is a plain `python train.py`
        environment |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        files = output.fileno(), errors.fileno()
        children = [os.fork() or member(rank, environment, program, argv, besides, files) for rank in range(count)]
        codes = ended(children)
        output.seek(0), errors.seek(0)
        printed, said = (file.read().decode(errors="replace") for file in (output, errors))
        return {"codes": codes, "printed": printed, "said": said}


def member(rank: int, environment: dict, program: str, argv: list[str], besides: list[str], files: tuple) -> None:
    code = 1
    try:
        os.dup2(files[0], 1), os.dup2(files[1], 2)
        ranks = {"RANK": rank, "LOCAL_RANK": rank} if environment else {}
        os.environ |= {name: str(value) for name, value in {**environment, **ranks}.items()}
        for name in besides:
            BESIDES[name]()
        code = run(PROGRAMS[program], argv)
    except SystemExit as end:  # argparse
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(children: list[int]) -> list[int]:
    """Their exit codes. One that fails ends the others, as under torchrun."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline or (any(codes.values()) and standing_still(child)):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def standing_still(child: int) -> bool:
    """By SIGSTOP, so it cannot end by itself."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(world(**json.loads(line))), file=answers, flush=True)
