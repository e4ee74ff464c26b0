"""`mlc slurm train|predict|kfold [flags] -- ARGS`: one file for `sbatch`, made from the shipped ones and submitted.

The files in slurm/ are the only truth about how a job runs: rendering replaces `#SBATCH` lines and writes the arguments
into the file, so that `sbatch THAT_FILE` alone submits the same job again.
"""

import re
import shlex
import shutil
import subprocess
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from mlc.flags import read_config
from shards.console import Parser, UserError, did_you_mean, say
from shards.files import disk_errors, whole

FOLDER = Path(__file__).parent / "sbatch"  # slurm/ of the repository, as package data
LAUNCH = Path(__file__).parent / "launch"
JOBS = ("train", "predict", "kfold")
NO_SBATCH = "no sbatch on this machine; call this on a login node, or --dry-run prints the job's file"
INCLUDE = "source slurm/train.sbatch"
# Our flag -> sbatch's option; the others of ours are no options of sbatch.
OPTIONS = {
    "nodes": "nodes",
    "gpus": "gpus-per-node",
    "cpus": "cpus-per-task",
    "mem": "mem",
    "time": "time",
    "partition": "partition",
    "account": "account",
}


def main(argv: list[str] | None = None) -> int:
    own, dashes, arguments = _split(argv or [])
    if own == ["folder"]:  # what the batch files ask for
        print(run_folder(arguments))
        return 0
    if own == ["resume"]:  # a requeued job must go on, and a path that the user names must count
        print(read_config(arguments).resume or "auto")
        return 0
    options = _parser().parse_args(own)
    if not dashes:
        raise UserError(f"mlc slurm {options.job}: the job's own arguments are missing; they come after ` -- `")
    folder, name = _place(options.job, arguments)
    script = render(options.job, _header(options, folder, name), _environment(options), arguments)
    if options.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise UserError(NO_SBATCH)
    submit(_written(folder / f"{options.job}.sbatch", script))
    return 0


def render(job: str, header: dict[str, str | None], environment: dict[str, str], arguments: Sequence[str]) -> str:
    """The shipped `job`.sbatch with these options of sbatch, exports and arguments in it."""
    top, body = _read(job)
    if INCLUDE in body:
        body[body.index(INCLUDE) : body.index(INCLUDE) + 1] = _read("train")[1]
    for key, value in header.items():
        top = _with_option(top, key, value)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    fixed = ["", *exports, f'set -- {shlex.join(arguments)} "$@"']
    return "\n".join([*top, *fixed, *body]) + "\n"


def _with_option(top: list[str], key: str, value: str | None) -> list[str]:
    """`#SBATCH --key=value` in its old place or at the end; None takes the line away, "" is an option without value."""
    same = re.compile(rf"#SBATCH --{re.escape(key)}(=|$)").match
    at = next((number for number, line in enumerate(top) if same(line)), len(top))
    if value is not None and re.search(r"[\r\n\"]", value):
        raise UserError(f"sbatch's --{key} cannot hold a quote or a line break: {value!r}")
    quoted = f'"{value}"' if value and " " in value else value
    new = [] if value is None else [f"#SBATCH --{key}={quoted}" if value else f"#SBATCH --{key}"]
    return [*top[:at], *new, *top[at + 1 :]]


def _read(job: str) -> tuple[list[str], list[str]]:
    """A shipped file in two: up to the last `#SBATCH` line, and the rest."""
    lines = (FOLDER / f"{job}.sbatch").read_text().splitlines()
    end = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    return lines[:end], lines[end:]


def submit_array(
    job: str, flags: str, *, folder: Path, arguments: Sequence[str], after: str | None, at_once: int | None
) -> str:
    """Submits a task for each argument, by `mlc slurm`'s flags (`--gpus 1 --dry-run`); returns the job's number.

    after: number of a job whose tasks must have ended before; at_once: how many tasks may run together.
    """
    options = _parser().parse_args(["train", *shlex.split(flags)])
    if not (options.dry_run or shutil.which("sbatch")):
        raise UserError(NO_SBATCH)
    options.job = job
    header = _header(options, folder, folder.name) | {
        "array": f"0-{len(arguments) - 1}" + (f"%{at_once}" if at_once else "")
    }
    header |= {"dependency": f"afterany:{after}"} if after else {}
    script = render(job, header, _environment(options), arguments)
    if options.dry_run:
        print(script, end="")
        return "JOB"
    return submit(_written(folder / (f"{job}-after-{after}.sbatch" if after else f"{job}.sbatch"), script))


def _written(file: Path, script: str) -> Path:
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as building:
        building.write_text(script)
    return file


def submit(file: Path) -> str:
    """The job's number. Raises UserError with sbatch's own words when it refuses."""
    done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"sbatch refused {file}: {reason.removeprefix('sbatch: error: ')}")
    print(done.stdout.strip())
    say(f"{file} is the job; `sbatch {file}` submits it again, and it goes on where it was")
    return done.stdout.split()[-1] if done.stdout.split() else ""


def run_folder(arguments: list[str]) -> Path:
    """The folder of the run that these arguments of train.py make; exits like train.py for a mistake in them."""
    config = read_config(arguments)
    return Path(config.output) / (config.experiment or f"{config.model}-{config.img_size}")


def _split(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What is before the first `--`, itself, and what is after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at : at + 1], argv[at + 1 :]


def _place(job: str, arguments: list[str]) -> tuple[Path, str]:
    """(folder of the job's file and log, name of the run); checks the arguments as far as it goes without the data."""
    if job == "predict":
        from mlc.predict import _parser as predict_parser

        run = Path(predict_parser().parse_args(arguments).run[0])
        return run, run.name
    run = run_folder(arguments)
    return (run.with_name(f"{run.name}-kfold"), f"{run.name}-kfold") if job == "kfold" else (run, run.name)


def _header(options, folder: Path, name: str) -> dict[str, str | None]:
    """Options of sbatch, without their dashes, {name: value}."""
    number = "%A_%a" if options.job in ("kfold", "sweep") else "%j"
    header: dict[str, str | None] = {"job-name": name, "chdir": str(Path.cwd())}
    header["output"] = f"{str(folder).replace('%', '%%')}/slurm-{number}.out"
    header |= {theirs: value for ours, theirs in OPTIONS.items() if (value := getattr(options, ours))}
    if options.gpus == "0":
        header["gpus-per-node"] = None
    if options.time and options.job != "predict":
        header |= _warning(options.time)
    if options.folds:
        if options.job != "kfold":
            raise UserError(f"--folds is not {options.job}'s; mlc slurm kfold --folds {options.folds} -- ...")
        header["array"] = f"0-{options.folds - 1}"
    for text in options.sbatch:
        key, _, value = text.removeprefix("--").partition("=")
        header[key] = value
    return header


def _warning(limit: str) -> dict[str, str]:
    """Slurm's signal before the end: 5 minutes as shipped, or a quarter of a job that is shorter than 20."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not form:
        return {}  # sbatch knows better what is wrong with it
    days, *rest = form.groups()
    if days is None and rest[2] is None:  # minutes, or minutes:seconds
        rest = ["0", *rest[:2]]
    hours, minutes, seconds = (int(part or 0) for part in rest)
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return {"signal": f"B:USR1@{total // 4}"} if 0 < total < 1200 else {}


def _environment(options) -> dict[str, str]:
    environment = {"MLC_ACCELERATE_CONFIG": str(launch_file(options.launch))}
    return environment | ({"MLC_LOCAL": options.local} if options.local else {})


def launch_file(name: str) -> Path:
    """An accelerate configuration by its path or its name in mlc/launch/."""
    names = sorted(path.stem for path in LAUNCH.glob("*.yaml"))
    for path in (Path(name), LAUNCH / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    raise UserError(
        f"--launch {name}: neither a file nor one of {', '.join(names) or 'mlc/launch/'}{did_you_mean(name, names)}"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="mlc slurm",
        usage="mlc slurm train|predict|kfold [flags] -- ARGS",
        description="Writes a job's file from the shipped slurm/*.sbatch and submits it. ARGS are those of `mlc train` "
        "or `mlc predict`.",
        epilog="example: mlc slurm train --nodes 2 --gpus 4 --time 4:00:00 --partition gpu -- -c demo --data DIR "
        "--experiment demo",
    )
    parser.add_argument("job", choices=JOBS, metavar="|".join(JOBS))
    add = parser.add_argument
    add("--nodes", type=_whole, help="machines (default: 1)")
    add("--gpus", type=_whole, help="GPUs, and so processes, of each machine; 0: one process on its CPU (default: 1)")
    add("--cpus", type=_whole, help="CPU cores of each machine (default: 8)")
    add("--mem", help="memory of each machine, as 64G (default: the cluster's)")
    add("--time", help="limit as Slurm writes it, 4:00:00 or 2-00 (default: 24 h; predict 4 h)")
    add("--partition", help="partition (default: the cluster's)")
    add("--account", help="account (default: the cluster's)")
    add("--folds", type=lambda text: int(_whole(text)), help="kfold: number of folds, as in `mlc pack --folds`")
    add("--local", metavar="DIR", help="copy shards to this folder on each node when they are first read")
    add("--launch", default="accelerate_config.yaml", metavar="NAME|FILE", help="accelerate configuration")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any option of sbatch: --sbatch=--qos=high")
    add("--dry-run", action="store_true", help="print the file instead of submitting it")
    return parser


def _whole(text: str) -> str:
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a whole number, not {text!r}")
    return text
