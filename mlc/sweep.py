"""`mlc sweep FILE`: variants x seeds, each a training of its own, and what the variants differ in beyond the seeds.

A number from one seed says nothing about a difference of a point; so every variant runs with the same few seeds and is
compared with the baseline seed by seed. What is finished is not run again, what was interrupted goes on.
"""

import os
import shlex
import sys
from argparse import ArgumentTypeError, Namespace

import torch

from mlc import auto, jobs, slurm, stages
from mlc.clock import Clock
from mlc.config import Config
from mlc.data.sources import Sources, open_sources, open_validation
from mlc.flags import read_flags, read_yaml, write_yaml
from mlc.report import sweep as report
from mlc.resume import SILENT
from mlc.sweeps import Run, Sweep, packaged, read
from mlc.validation import refuse_unknown_metric
from shards.console import Parser, UserError, did_you_mean, say
from shards.files import disk_errors

# What may be another for the runs of a sweep that are there already.
MAY_DIFFER = {*SILENT} - {"data", "pretrained", "pretrained_path", "embeddings", "global_batch_size"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    named_by_flag = argv[:1] in (["-c"], ["--config"])  # as a training's recipe is
    options, rest = _parser().parse_known_args(argv[1:] if named_by_flag else argv)
    sweep = read(
        options.file,
        given=read_flags(rest, "mlc sweep"),
        seeds=options.seeds,
        out=options.out,
        quick=options.quick,
    )
    chosen = _chosen(sweep, options.only)
    if options.task is not None:
        if not 0 <= options.task < len(chosen):
            raise UserError(f"--task {options.task}: the sweep has the runs 0 to {len(chosen) - 1}")
        chosen = chosen[options.task : options.task + 1]
    if options.report_only:
        return _report(sweep)
    _check(chosen, sweep.metrics)
    write_settings(chosen)
    if options.slurm is not None:
        return _submit(sweep, chosen, options)
    left = jobs.work(
        [jobs.Job(run.folder, tuple(sweep.out / name for name in run.needs)) for run in chosen],
        at_once=options.jobs or 1,
        launch_file=slurm.launch_file(options.launch) if options.launch else None,
        gpus=[] if options.launch else visible_gpus(),
        say=say,
    )
    if options.task is None:
        _report(sweep)
    for folder, reason in left.items():
        say(f"{folder}: {reason}")
    return 1 if left else 0


def _chosen(sweep: Sweep, only: list[str]) -> list[Run]:
    """The runs of the variants in --only, and those they need."""
    names = {variant.name: variant.needs for variant in sweep.variants}
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no variant of {sweep.name}{did_you_mean(name, list(names))}")
    wanted, more = set(), set(only or names)
    while more:
        wanted |= more
        more = {need for name in more for need in names[name]} - wanted
    return [run for run in sweep.runs if run.variant in wanted]


# ---- before anything runs --------------------------------------------------------------------------------------------


def _check(runs: list[Run], metrics: list[str]) -> None:
    """Raises UserError, naming the variant, for what would stop a run in its first seconds, and for a
    column of the table that no run would fill."""
    for run in {run.variant: run for run in reversed(runs)}.values():
        try:
            dataset = check(run.config).dataset
            for metric in metrics:
                refuse_unknown_metric(metric, dataset, "metric:")
        except UserError as error:
            raise UserError(f"variant {run.variant}: {error}") from error
    for run in runs:
        refuse_other_settings(run)


def check(config: Config) -> Sources:
    """What a run reads. Raises UserError for what would stop it in its first seconds."""
    sources = open_sources(config)
    if not open_validation(config, sources.dataset):
        raise UserError("a sweep compares evaluations: give --val-split or --fold")
    refuse_unknown_metric(config.eval_metric, sources.dataset)
    size = int(config.global_batch_size or config.batch_size)
    lengths = {"epoch_samples": sources.sampler.epoch_samples, "global_batch": size}
    for stage in stages.lay_out(config, **lengths):
        Clock(auto.with_numbers(stage, size)[0], **lengths)
    return sources


def refuse_other_settings(run: Run) -> None:
    """A table must not mix runs of two versions of its file."""
    path = run.folder / "args.yaml"
    then, now = read_yaml(path) if path.exists() else {}, vars(run.config)
    for name, value in then.items():
        same = value == now[name] or (name == "batch_size" and now[name] == "auto")
        if not same and name not in MAY_DIFFER:
            raise UserError(
                f"{run.folder} was trained with {name} {value}, and now it is {now[name]}; delete that folder, or give "
                "the runs another"
            )


def write_settings(runs: list[Run]) -> None:
    for run in runs:
        with disk_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            write_yaml(run.config, run.folder / jobs.SETTINGS)


def visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


# ---- Slurm and the report --------------------------------------------------------------------------------------------


def _submit(sweep: Sweep, runs: list[Run], options: Namespace) -> int:
    """An array of jobs for the runs that need no other, then one for those that need these, and so on."""
    left = [run for run in runs if not jobs.finished(run.folder)]
    flags = options.slurm + (f" --launch {shlex.quote(options.launch)}" if options.launch else "")
    after = None
    while left:
        names = {run.name for run in left}
        now = [run for run in left if names.isdisjoint(run.needs)]
        left = [run for run in left if run not in now]
        folders = [str(run.folder.resolve()) for run in now]
        after = slurm.submit_array(
            "sweep", flags, folder=sweep.out, arguments=folders, after=after, at_once=options.jobs
        )
    say(f"`mlc sweep {options.file} ... --report-only` makes the table of what is finished")
    return 0


def _report(sweep: Sweep) -> int:
    table = report.rows(sweep)
    found = report.lines(sweep, table)
    if not found:
        say(f"{sweep.out}: no run of this sweep is finished, so there is nothing to compare")
        return 1
    report.write_csv(sweep.out / "results.csv", table)
    report.write_markdown(sweep.out / "summary.md", sweep, found, table)
    report.plot(sweep.out / "plot.png", sweep, found)
    report.print_table(sweep, found)
    say(f"{sweep.out}: results.csv, summary.md, plot.png")
    return 0


def _parser() -> Parser:
    listed = "\n".join(f"  {name:<27} {text}" for name, text in packaged())
    parser = Parser(
        prog="mlc sweep",
        usage="mlc sweep [-c] FILE [flags] [any flags of mlc train]",
        description="Trains every variant of a sweep file with every seed, and compares them. Flags of `mlc train` win "
        "over\nthe file's base. The same command goes on with what is not finished.",
        epilog=f"packaged sweeps:\n{listed}\n\nexamples:\n"
        "  mlc sweep mixup-ablation --data data/demo-shards\n"
        "  mlc sweep mixup-ablation -c comp5329-swinv2-l --data DIR     in place of the file's recipe\n"
        "  mlc sweep my.yaml --data DIR --epochs 2 --jobs 2 --only plain --only mixup\n"
        "  mlc sweep kd --data DIR --slurm='--gpus 1 --time 2:00:00 --partition gpu'\n\n"
        "a file:\n  base: {config: demo, epochs: 3}\n  seeds: [1, 2, 3]\n  metric: f1_samples@tuned\n"
        "  variants:            # or `grid: {lr: [1e-4, 3e-4], batch_size: [16, 32]}`, all combinations,\n"
        "    plain: {}          # or `each: {...}`, one setting at a time around the base\n    mixup: {mixup: 0.4}",
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="sweep file, or the name of a packaged sweep")
    add("--out", default="", metavar="DIR", help="folder of the runs and the result (default: runs/NAME of the file)")
    add("--seeds", type=int, nargs="+", metavar="N", help="in place of the file's")
    add("--only", action="append", default=[], metavar="NAME", help="this variant and what it needs; may be repeated")
    add("--jobs", type=_positive, metavar="N", help="runs at a time, each on its share of cores and a GPU (default: 1)")
    add("--launch", metavar="NAME|FILE", help="start each run by `accelerate launch` with this configuration")
    add("--quick", action="store_true", help="four steps of each variant with one seed, in quick/: does all of it run?")
    add("--report-only", action="store_true", help="only the table and the plot, of the runs that are finished")
    add("--task", type=int, metavar="K", help="only the K-th run, from 0, for a scheduler of your own; no report")
    add(
        "--slurm",
        nargs="?",
        const="",
        metavar="FLAGS",
        help="submit arrays of jobs, a task per run, with these flags of `mlc slurm` (--slurm='--gpus 1 --dry-run')",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number above 0, not {text!r}")
    return int(text)
