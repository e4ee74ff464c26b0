"""What a sweep found: one row per run, the variants side by side, and a picture of them.

Variants share their seeds, and a seed's data order and first weights move all variants alike; so a variant is compared
with the baseline seed by seed, where that common part cancels, and not mean with mean.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlc import jobs
from mlc.runlog import read_log
from mlc.sweeps import Run, Sweep
from mlc.validation import goodness
from shards.console import shown
from shards.files import whole

SEED_COLOR, MEAN_COLOR, LINE_COLOR = "#4c78a8", "#1b1b1b", "#9aa0a6"
LOG_SCALE = 8  # largest over smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """A variant over its finished seeds; `values` {metric: {seed: value}}, `gain` {seed: value - baseline's} of the
    first metric over the seeds both have, positive where the variant is better."""

    variant: str
    values: dict[str, dict[int, float]]
    gain: dict[int, float]
    minutes: float
    megabytes: float


# ---- runs ------------------------------------------------------------------------------------------------------------


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One per run: variant, seed, state, and where it is finished minutes, MB, step and metrics of the best weights."""
    return [
        _row(run) for run in sorted(sweep.runs, key=lambda run: [v.name for v in sweep.variants].index(run.variant))
    ]


def _row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "state": "unfinished"}
    if not jobs.finished(run.folder):
        return row
    row |= {"state": "finished", "minutes": round(jobs.seconds(run.folder) / 60, 2)}
    weights = run.folder / "best" / "model.safetensors"
    if weights.exists():
        row["mb"] = round(weights.stat().st_size / 1e6, 2)
    return row | best_evaluation(run.folder / "log.jsonl", run.config.eval_metric)


def best_evaluation(log: Path, metric: str) -> dict[str, Any]:
    """{step, weights, metric...} of the evaluation whose weights are in `best/`: the earliest of the best ones, of the
    weights or of their average (`val_ema`), as train.py chooses them. {} where nothing was evaluated."""
    best: dict[str, Any] = {}
    for line in read_log(log):
        for weights in ("val", "val_ema"):
            found = {name.partition("/")[2]: value for name, value in line.items() if name.startswith(f"{weights}/")}
            if found and (not best or goodness(found, metric) > goodness(best, metric)):
                best = {"step": line["step"], "weights": weights, **found}
    return best


def write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in table for name in row))
    with whole(path) as building, building.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


# ---- variants --------------------------------------------------------------------------------------------------------


def lines(sweep: Sweep, table: Sequence[dict[str, Any]]) -> list[Line]:
    """Of what is finished: named variants by their mean, the best first; those of `grid` and `each` in order."""
    done = [row for row in table if row["state"] == "finished"]
    found = []
    for variant in sweep.variants:
        own = [row for row in done if row["variant"] == variant.name]
        values = {name: {row["seed"]: row[name] for row in own if row.get(name) is not None} for name in sweep.metrics}
        if own:
            minutes, size = (_mean([row[name] for row in own if name in row]) for name in ("minutes", "mb"))
            found.append(Line(variant.name, values, {}, minutes, size))
    first, sign = sweep.metrics[0], -1 if sweep.metrics[0] == "loss" else 1
    base = next((line.values[first] for line in found if line.variant == sweep.baseline), {})
    for line in found:
        if line.variant != sweep.baseline:
            own = line.values[first]
            line.gain.update({seed: sign * (own[seed] - base[seed]) for seed in own if seed in base})
    named = sweep.kind == "variants"
    return sorted(found, key=lambda line: _place(line, first, sign)) if named else found


def _place(line: Line, metric: str, sign: int) -> tuple[bool, float]:
    """Sorts the best mean first, and last what has none."""
    mean = _mean(line.values[metric].values())
    return math.isnan(mean), -sign * mean


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def deviation(values) -> float:
    """Standard deviation of what few values were drawn from (n - 1); nan for one."""
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _cells(line: Line, metrics: Sequence[str]) -> Iterator[str]:
    values = list(line.values[metrics[0]].values())
    yield line.variant
    yield str(len(values))
    yield shown(_mean(values))
    yield "" if len(values) < 2 else f"{deviation(values):.4f}"
    yield "" if len(values) < 2 else f"{min(values):.4f}..{max(values):.4f}"
    gain = list(line.gain.values())
    error = deviation(gain) / math.sqrt(max(1, len(gain)))
    yield "" if not gain else f"{_mean(gain):+.4f}" + (f" ± {error:.4f}" if len(gain) > 1 else "")
    yield "" if not gain else f"{sum(value > 0 for value in gain)}/{len(gain)}"
    for metric in metrics[1:]:
        yield shown(_mean(line.values[metric].values()))
    yield shown(line.megabytes, ".1f")
    yield shown(line.minutes, ".1f")


def _names(sweep: Sweep) -> list[str]:
    better = "better than" if sweep.metrics[0] == "loss" else "minus"
    spread = ("variant", "seeds", sweep.metrics[0], "s.d.", "min..max")
    return [*spread, f"{better} {sweep.baseline}", "wins", *sweep.metrics[1:], "MB", "min"]


def print_table(sweep: Sweep, found: Sequence[Line]) -> None:
    table = Table(title=f"{sweep.name}: {sweep.metrics[0]}", box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(_names(sweep)):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in found:
        table.add_row(*_cells(line, sweep.metrics))
    console = Console()
    console.width = max(console.width, 150)  # rather a broken line than a number cut short
    console.print(table)


def write_markdown(path: Path, sweep: Sweep, found: Sequence[Line], table: Sequence[dict[str, Any]]) -> None:
    missing = [f"{row['variant']}-s{row['seed']}" for row in table if row["state"] != "finished"]
    text = [f"# {sweep.name}", "", f"![{sweep.name}](plot.png)", "", *_markdown(_names(sweep), found, sweep), ""]
    text += [
        f"Values are those of the best evaluation of each run, s.d. and ± are over seeds. `{_names(sweep)[5]}` is the "
        "mean difference between runs of the same seed and its standard error; `wins` counts the seeds on which the "
        "variant is ahead. MB: the weights; min: minutes of a run.",
    ]
    if missing:
        text += ["", f"Not finished, and in no mean: {', '.join(missing)}."]
    with whole(path) as building:
        building.write_text("\n".join(text) + "\n", encoding="utf-8")


def _markdown(names: Sequence[str], found: Sequence[Line], sweep: Sweep) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"|---|{'---:|' * (len(names) - 1)}"
    for line in found:
        yield f"| {' | '.join(_cells(line, sweep.metrics))} |"


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(path: Path, sweep: Sweep, found: Sequence[Line]) -> None:
    """A dot per run and a bar at each variant's mean; curves where `each:` varied numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with plt.rc_context(style):
        curves = _curves(sweep, found)
        figure = _curve_figure(plt, sweep, curves) if curves else _dot_figure(plt, sweep, found)
        with whole(path) as building:
            figure.savefig(building, dpi=160, format="png", bbox_inches="tight")
        plt.close(figure)


def _dot_figure(plt, sweep: Sweep, found: Sequence[Line]):
    metric = sweep.metrics[0]
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.25 * len(found)), layout="constrained")
    for place, line in enumerate(found):
        values = list(line.values[metric].values())
        axis.plot(values, [place] * len(values), "o", color=SEED_COLOR, alpha=0.65, markersize=5, markeredgewidth=0)
        axis.plot([_mean(values)] * 2, [place - 0.3, place + 0.3], color=MEAN_COLOR, linewidth=2)
        if line.variant == sweep.baseline:
            axis.axvline(_mean(values), color=LINE_COLOR, linewidth=1, linestyle="--", zorder=0)
    axis.set_yticks(range(len(found)), [line.variant for line in found])
    for label, line in zip(axis.get_yticklabels(), found, strict=True):
        label.set_fontweight("bold" if line.variant == sweep.baseline else "normal")
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.set_xlabel(f"{metric}   (dot: a seed, bar: mean, dashed: {sweep.baseline})", fontsize=8)
    return figure


def _curves(sweep: Sweep, found: Sequence[Line]) -> dict[str, list[tuple[float, Line]]]:
    """{setting: [(value, line)]} by value, the base among them; {} unless all that varies are numbers."""
    by_name = {line.variant: line for line in found}
    varied = dict.fromkeys(variant.point[0] for variant in sweep.variants if variant.point)
    if not varied or any(variant.point and not _number(*variant.point) for variant in sweep.variants):
        return {}
    base = vars(next(run.config for run in sweep.runs if run.variant == sweep.variants[0].name))
    curves: dict[str, list[tuple[float, Line]]] = {}
    for variant in sweep.variants:
        for point in [variant.point] if variant.point else [(name, base[name]) for name in varied]:
            if variant.name in by_name and (number := _number(*point)):
                curves.setdefault(number[0], []).append((number[1], by_name[variant.name]))
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items() if len(curve) > 1}


def _number(name: str, value: Any) -> tuple[str, float] | None:
    """(what to call it, its value) of a number, or of the one in `head_kwargs: {hidden: 64}`; None for all else."""
    if isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
    return (name, value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _curve_figure(plt, sweep: Sweep, curves: dict[str, list[tuple[float, Line]]]):
    metric = sweep.metrics[0]
    size = (max(3.4, 2.8 * len(curves)), 2.6)
    figure, axes = plt.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=True):
        values = [value for value, _ in curve]
        for value, line in curve:
            own = list(line.values[metric].values())
            axis.plot([value] * len(own), own, "o", color=SEED_COLOR, alpha=0.65, markersize=5, markeredgewidth=0)
        means = [_mean(line.values[metric].values()) for _, line in curve]
        axis.plot(values, means, color=MEAN_COLOR, linewidth=1.5, marker="_", markersize=12, zorder=3)
        if min(values) > 0 and max(values) / min(values) >= LOG_SCALE:
            axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.margins(x=0.12)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_xlabel(name)
    axes[0, 0].set_ylabel(metric)
    return figure
