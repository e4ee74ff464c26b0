"""`mlc compare`: runs side by side in the terminal, for the question of every morning: what was different, did it help?

Numbers are those that `mlc eval` left in the runs; of a run it has not scored, those of its best evaluation while it
trained. With `--out` also the page of `mlc report` about all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlc.metrics.scorecard import LOWER_IS_BETTER
from mlc.report import sections
from mlc.report.page import add_size_flags, write_report
from mlc.report.runs import Run, open_runs
from shards.console import Parser, UserError, shown
from shards.json_text import to_json
from shards.stats_html import check_target

METRICS = (
    "f1_samples@run",
    "f1_samples@tuned",
    "f1_samples",
    "f1_micro",
    "f1_macro",
    "f2_samples",
    "map",
    "CF1",
    "OF1",
)
METRICS += ("lrap", "loss", "ece")
SPEED = {
    "img_per_sec": "images / s",
    "wait": "waiting for data",
    "mem_gb": "memory, GB",
    "ms_per_sample": "prediction, ms / image",
    "mb": "weights, MB",
    "step": "steps",
    "minutes": "minutes",
}


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    if options.out:
        check_target(Path(options.out))
    runs = open_runs(options.runs, options.split)
    if len(runs) < 2:
        raise UserError("give at least two runs; `mlc report` is about one")
    metrics = {run.name: numbers(run) for run in runs}
    speed = {row["name"]: {name: row[name] for name in SPEED} for row in sections.speed(runs)}
    differ = dict(sections.settings(runs)["differ"])
    if options.json:
        print(to_json({"metrics": metrics, "settings": differ, "speed": speed}, ensure_ascii=False))
    else:
        _print(runs, metrics, differ, speed)
    if options.out:
        write_report(
            runs, Path(options.out), data=options.data, split=options.split, draws=options.bootstrap, maps=options.maps
        )


def numbers(run: Run) -> dict[str, float]:
    """The run's metrics on the split; before `mlc eval` those of the evaluation that chose its best weights."""
    from mlc.report.sweep import best_evaluation

    found = run.results or best_evaluation(run.folder / "log.jsonl", str(run.settings.get("eval_metric", "loss")))
    return {name: found[name] for name in METRICS if isinstance(found.get(name), int | float)}


def _print(runs: Sequence[Run], metrics: Mapping, differ: Mapping, speed: Mapping) -> None:
    names = [run.name for run in runs]
    table = _table("metrics", "", *names)
    for metric in METRICS:
        values = [metrics[name].get(metric) for name in names]
        known = [value for value in values if value is not None]
        if known:
            best = (min if metric in LOWER_IS_BETTER else max)(known)
            lower = " (lower is better)" if metric in LOWER_IS_BETTER else ""
            cells = [shown(v) + ("*" if v == best and len(known) > 1 else " ") for v in values]
            table.add_row(metric + lower, *cells)
    _show(table)
    for run in runs:
        if not run.results:
            _show(f"{run.name}: not scored by `mlc eval`; the numbers are of its best evaluation in training")
    table = _table("settings that differ", "", *names)
    for setting, cells in differ.items():
        table.add_row(setting, *(cell if len(cell) <= 40 else f"{cell[:39]}…" for cell in cells))
    _show(table if differ else "the settings are the same")
    table = _table("speed", "", *names)
    for key, title in SPEED.items():
        values = [speed[name][key] for name in names]
        if any(value is not None for value in values):
            table.add_row(title, *(shown(value, ".4g") for value in values))
    _show(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
    return table


def _show(what: Table | str) -> None:
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 140)
    console.print(what)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc compare",
        description="Runs side by side: metrics, the settings that differ, speed; * is the best.",
        epilog="example: mlc compare runs/plain runs/mixup --out both.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of two or more runs")
    parser.add_argument("--split", default="val", help="the split they were scored on (default: val)")
    parser.add_argument("--out", help="write the page of `mlc report` about all of them, too")
    parser.add_argument("--data", help="for --out: packed data set they were scored on (default: the first run's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_size_flags(parser)
    return parser
