"""`mlc selftrain`: rounds of training, predicting images without labels, and training on the surest of these as well.

Every round trains a model of its own from the same settings, so that a mistake of one round's labels is not built upon
for longer than the next. What is there already is not done again: the same command goes on where it was stopped.
"""

import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from mlc import jobs, slurm
from mlc.config import Config, flag
from mlc.data.overlay import PREFIX, write_overlay
from mlc.data.sampler import parse_data
from mlc.data.sources import open_sources, open_split, open_validation
from mlc.flags import read_config, read_yaml, write_yaml
from mlc.metrics import thresholds
from mlc.post.pseudo import add_choice_flags, at_least_one, choose
from mlc.resume import SILENT
from mlc.runlog import read_log
from mlc.validation import refuse_unknown_metric
from shards.console import Parser, UserError, few, say
from shards.dataset import load_dataset
from shards.files import disk_errors

MAY_DIFFER = {*SILENT} - {"data", "pretrained", "pretrained_path", "global_batch_size"}


def main(argv: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(argv)
    base = read_config(rest, "mlc selftrain")
    out = Path(options.out)
    _check(base, options)
    launch = slurm.launch_file(options.launch) if options.launch else None
    overlay = ""
    for number in range(options.rounds + 1):
        run = out / f"round-{number}"
        _train(_settings(base, run, overlay), run, launch)
        if number < options.rounds:
            overlay = f"{PREFIX}{_pseudo(run, base, options, launch)}"
    _show(out, options.rounds, base.eval_metric)
    return 0


def _check(base: Config, options: Namespace) -> None:
    """What would stop a later round is said before the first."""
    if base.resume:
        raise UserError("--resume is set by `mlc selftrain` itself, which resumes each round; leave it out")
    sources = open_sources(base)
    open_validation(base, sources.dataset)
    refuse_unknown_metric(base.eval_metric, sources.dataset)
    open_split(sources.dataset, options.split)
    if options.split in (base.train_split, base.val_split):
        raise UserError(f"--split {options.split}: that is trained or evaluated on; name a split of other images")


def _settings(base: Config, run: Path, overlay: str) -> Config:
    data = [*base.data, overlay] if overlay else base.data
    return replace(base, data=data, output=str(run.parent), experiment=run.name, resume="auto")


def _train(config: Config, run: Path, launch: Path | None) -> None:
    then = read_yaml(run / "args.yaml") if (run / "args.yaml").exists() else {}
    for name, value in then.items():
        if value != vars(config)[name] and name not in MAY_DIFFER:
            raise UserError(
                f"{run} was trained with {flag(name)} {value}, and now it is {vars(config)[name]}; delete that folder "
                "and those of later rounds, or give another --out"
            )
    if jobs.finished(run):
        say(f"{run.name}: trained already")
        return
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        write_yaml(config, run / jobs.SETTINGS)
    left = jobs.work([jobs.Job(run)], at_once=1, launch_file=launch, gpus=[], say=say)
    if left:
        raise UserError(f"{run}: {left[run]} (see {jobs.OUTPUT} there); the same command goes on")


def _pseudo(run: Path, base: Config, options: Namespace, launch: Path | None) -> Path:
    """The overlay of a round, made from its predictions with its own thresholds."""
    out, predictions = run / "pseudo.arrow", run / "predictions" / f"{options.split}.csv"
    if out.exists():
        say(f"{run.name}: pseudo-labels there already")
        return out
    if not predictions.exists():
        _predict(run, base, options, launch)
    dataset = load_dataset(first_data(base), cache_dir=base.cache_dir)
    rows, labels, probabilities, never = choose(
        predictions,
        dataset,
        split=options.split,
        train_split=base.train_split,
        rule=thresholds.load(run / "best" / "thresholds.json"),
        share=options.share,
        per_class=options.per_class,
    )
    write_overlay(out, dataset, options.split, rows, labels, probabilities if options.soft else None)
    missing = f"; never seen in training, so never given: {few(never)}" if never else ""
    say(f"{run.name}: pseudo-labels for {len(rows)} images of {options.split}{missing}")
    return out


def _predict(run: Path, base: Config, options: Namespace, launch: Path | None) -> None:
    start = jobs.command(run, launch)
    start = start[: start.index("mlc")]  # of this interpreter, by the launcher where there is one
    what = ["--run", str(run), "--data", first_data(base), "--split", options.split, "--tta", options.tta]
    size = [] if base.batch_size == "auto" else ["-b", str(base.validation_batch_size or base.batch_size)]
    more = ["-j", str(base.workers), "--cache-dir", base.cache_dir, "--amp-dtype", base.amp_dtype]
    say(f"{run.name}: predicting {options.split}")
    done = subprocess.run(
        [*start, "mlc", "predict", *what, *size, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        words = (done.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"{run}: the prediction failed ({done.returncode}): {words.removeprefix('error: ')}")


def first_data(config: Config) -> str:
    """The first of `--data`, without its share of the stream."""
    return parse_data(config.data[0])[0]


def _show(out: Path, rounds: int, metric: str) -> None:
    table = Table(title=f"best {metric} of each round", title_justify="left")
    for name in ("round", "pseudo-labelled images", metric):
        table.add_column(name, justify="right")
    for number in range(rounds + 1):
        before = out / f"round-{number - 1}" / "pseudo.arrow"
        values = [value for line in read_log(out / f"round-{number}" / "log.jsonl") for value in _values(line, metric)]
        best = f"{(min if metric == 'loss' else max)(values):.4f}" if values else "-"
        table.add_row(str(number), str(_samples(before)) if number else "0", best)
    Console(highlight=False).print(table)


def _values(line: dict, metric: str) -> list[float]:
    names = (f"val/{metric}", f"val_ema/{metric}")
    return [line[name] for name in names if line.get(name) is not None]


def _samples(overlay: Path) -> int:
    with pa.memory_map(str(overlay)) as mapped:
        return pa.ipc.open_file(mapped).get_batch(0).num_rows


def _parser() -> Parser:
    parser = Parser(
        prog="mlc selftrain",
        usage="mlc selftrain --out DIR [flags] [any flags of mlc train]",
        description="Trains, predicts a split without labels, and trains again with the most confident predictions as\n"
        "labels, for some rounds. The same command goes on with what is not finished.",
        epilog="example: mlc selftrain --out runs/self --rounds 2 --share 0.5 -c demo --data data/demo-shards",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the rounds' runs")
    parser.add_argument("--rounds", type=at_least_one, default=1, help="trainings with pseudo-labels (default: 1)")
    add_choice_flags(parser)
    parser.add_argument("--tta", default="", help="views to average in the predictions: hflip, scale")
    parser.add_argument("--launch", metavar="NAME|FILE", help="start by `accelerate launch` with this configuration")
    return parser
