"""The sections of `mlc report`, each a function from runs to what its part of the template shows.

All decisions on the page are those of each run's own thresholds, since these are what `mlc predict` hands in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mlc.metrics import bootstrap, calibration
from mlc.metrics.scorecard import LOWER_IS_BETTER, ratio
from mlc.report.runs import Run, Scored, Subject
from shards import charts, stats_facts
from shards.console import plural
from shards.stats import overview, split_stats
from shards.urls import redact

HEADLINE = {
    "f1_samples": "F1 over samples",
    "f1_micro": "F1 micro",
    "f1_macro": "F1 macro",
    "f2_samples": "F2 over samples",
    "map": "mAP",
    "precision_samples": "precision over samples",
    "recall_samples": "recall over samples",
    "CF1": "CF1",
    "OF1": "OF1",
    "lrap": "label ranking average precision",
    "loss": "loss (cross entropy)",
    "ece": "calibration error (ECE)",
}
HEAT = 24  # classes of a heat map
PAIRS = 30
LEAST_MISSED = 5  # images on which a label is missed, below which a share of them says nothing
COUNTS = "images with 0, 1, 2, ... labels"  # a row of `overview` that the page draws
NOT_SETTINGS = ("experiment", "output", "resume", "seed")  # differ between any two runs, and say nothing


# ---- numbers ---------------------------------------------------------------------------------------------------------


def summary(found: Sequence[Scored], weights: np.ndarray) -> dict[str, Any]:
    """Rows {name, title, a cell per run with its interval}, those of HEADLINE first; further runs minus the first."""
    values = [one.card.at() for one in found]
    replicates = [one.card.at(weights) for one in found]
    names = [*HEADLINE, *(name for name in values[0] if name not in HEADLINE and "/" not in name)]
    rows = []
    for name in names:
        numbers = [float(value[name][0]) for value in values]
        known = [number for number in numbers if not np.isnan(number)]
        best = (min if name in LOWER_IS_BETTER else max)(known, default=None)
        cells = [
            {
                "value": number,
                "interval": bootstrap.interval(drawn[name], number),
                "best": len(found) > 1 and number == best,
            }
            for number, drawn in zip(numbers, replicates, strict=True)
        ]
        title = HEADLINE.get(name, name.replace("_", " "))
        rows.append({"name": name, "title": title, "lower": name in LOWER_IS_BETTER, "cells": cells})
    against = []
    for number, one in enumerate(found[1:], 1):
        differences = [
            bootstrap.difference(
                name, values[number][name][0] - values[0][name][0], replicates[number][name] - replicates[0][name]
            )
            for name in HEADLINE
        ]
        against.append({"name": one.run.name, "rows": list(zip(HEADLINE.values(), differences, strict=True))})
    return {"headline": rows[: len(HEADLINE)], "rest": rows[len(HEADLINE) :], "against": against}


def groups(subject: Subject, found: Sequence[Scored], weights: np.ndarray) -> list[dict[str, Any]]:
    """Per group and run: classes, labels, and map, f1_samples, f1_micro, f1_macro and f2_samples with intervals."""
    rows = []
    drawn = [(one.card.at(), one.card.at(weights)) for one in found]
    for group, columns in subject.truth.groups.items():
        for one, (values, replicates) in zip(found, drawn, strict=True):
            cells = {}
            for name in ("map", "f1_samples", "f1_micro", "f1_macro", "f2_samples"):
                value = float(values[f"{name}/{group}"][0])
                cells[name] = value, bootstrap.interval(replicates[f"{name}/{group}"], value)
            labels = int(subject.truth.target[:, list(columns)].sum())
            rows.append(
                {"group": group, "run": one.run.name, "classes": len(columns), "labels": labels, "cells": cells}
            )
    return rows


def classes(subject: Subject, found: Sequence[Scored]) -> list[dict[str, Any]]:
    """A row per class, most frequent first: name, group, support and, of each run, ap, precision, recall, f1, threshold
    and how often it is predicted."""
    group_of = {name: group for group, members in subject.dataset.groups.items() for name in members}
    columns = [one.card.classes() for one in found]
    rows = []
    for place in np.argsort(-columns[0]["support"], kind="stable").tolist():
        name = subject.truth.classes[place]
        of_runs = [
            {key: values[key][place].item() for key in ("ap", "precision", "recall", "f1", "predicted")}
            | {"threshold": one.run.threshold(name)}
            for one, values in zip(found, columns, strict=True)
        ]
        support = int(columns[0]["support"][place])
        rows.append({"name": name, "group": group_of.get(name, ""), "support": support, "runs": of_runs})
    return rows


# ---- charts ----------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """Of what the logs have: `charts` {title, names, svg}, x in epochs, a colour per run, and `once`, what was measured
    only once: (title, a text per run)."""
    metric = str(runs[0].settings.get("eval_metric", "f1_samples@tuned"))
    losses = {str(run.settings.get("loss")) for run in runs}
    kinds = f", of different kinds ({', '.join(sorted(losses))}): not to be compared" if len(losses) > 1 else ""
    wanted = {
        f"Training loss{kinds}": ("train/loss", "loss"),
        f"Validation loss{kinds}": ("/loss", "loss"),
        f"Validation {metric}": (f"/{metric}", metric),
        "Validation mAP": ("/map", "mAP"),
        "Learning rate": ("train/lr", "learning rate"),
        "Norm of the gradient": ("train/grad_norm", "norm"),
        "Images per second": ("train/img_per_sec", "images / s"),
        "Time spent waiting for data": ("data/wait_frac", "share"),
    }
    shown, once = [], []
    last = max((line["epoch"] for run in runs for line in run.log if "epoch" in line), default=0)
    for title, (key, ylabel) in wanted.items():
        lines = _lines(runs, key)
        if any(len(x) > 1 for x, _ in lines.values()):
            shown.append(_run_chart(title, runs, lines, ylabel, f"curve{len(shown)}", last))
        elif lines:
            once.append((title, [_once(lines, place) for place in range(len(runs))]))
    return {"charts": shown, "once": once}


def _lines(runs: Sequence[Run], key: str) -> dict[tuple[int, bool], tuple[list[float], list[float]]]:
    """{(place of the run, whether its averaged weights): (epochs, values)}; a key with / in front: of evaluations."""
    lines = {}
    for place, run in enumerate(runs):
        for name in (f"val{key}", f"val_ema{key}") if key.startswith("/") else (key,):
            if (points := run.curve(name))[0]:
                lines[place, name.startswith("val_ema")] = points
    return lines


def _once(lines: Mapping[tuple[int, bool], tuple], place: int) -> str:
    parts = [(" (averaged weights)" if of[1] else "", y[-1]) for of, (_, y) in lines.items() if of[0] == place]
    return ", ".join(f"{value:.4f}{averaged}" for averaged, value in parts)


def _run_chart(title: str, runs: Sequence[Run], lines: Mapping, ylabel: str, name: str, last: float) -> dict[str, Any]:
    """The last value of each line is in words, for who cannot see it; names of runs stay out of the picture."""
    ends = ", ".join(f"{y[-1]:.4g}" for _, y in lines.values())
    label = f"{ylabel} by epoch, {plural(len(lines), 'line')}, at the end {ends}"
    series = {str(number): points for number, points in enumerate(lines.values())}
    styles = dict(zip(series, lines, strict=True))
    axes = {"xlim": (0, 1.02 * last) if last else None, "styles": styles, "name": name}
    dashed = "; dashed: averaged weights" if any(averaged for _, averaged in lines) else ""
    drawn = {place for place, _ in lines}
    names = [run.name if place in drawn else None for place, run in enumerate(runs)]
    svg = Markup(charts.curves(series, label, "epoch", ylabel, **axes))
    return {"title": f"{title}{dashed}.", "names": names, "svg": svg}


def calibrated(found: Sequence[Scored], target: np.ndarray) -> dict[str, Any]:
    """The reliability diagram of all runs and, in words, how many decisions are in each bin of the first."""
    series, tables = {}, []
    for one in found:
        said, true, count = calibration.reliability(one.scores, target)
        series[one.run.name] = (said, true)
        bins = zip(said.tolist(), true.tolist(), count.tolist(), strict=True)
        rows = [{"said": p, "true": share, "count": number} for p, share, number in bins if number]
        tables.append({"name": one.run.name, "rows": rows})
    label = (
        "Share of true labels by predicted probability; the dotted line is perfect calibration, the table has numbers"
    )
    svg = charts.curves(series, label, "predicted probability", "share that is true", name="reliability", diagonal=True)
    chart = {"title": "How often a probability is right.", "names": list(series), "svg": Markup(svg)}
    return {"chart": chart, "tables": tables}


# ---- labels that go together, and instead of one another -----------------------------------------------------------


def together(subject: Subject) -> dict[str, Any] | None:
    """A heat map of the frequent labels: of the images with the row's, the share that has the column's."""
    count = subject.truth.target.sum(0)
    columns = [int(column) for column in np.argsort(-count, kind="stable")[:HEAT] if count[column]]
    if len(columns) < 2:
        return None
    chosen = subject.truth.target[:, columns].astype(np.float64)
    shares = ratio(chosen.T @ chosen, np.repeat(chosen.sum(0)[:, None], len(columns), axis=1))
    names = [subject.truth.classes[column] for column in columns]
    return {"names": names, "shares": shares.tolist(), "more": int((count > 0).sum()) - len(columns)}


def confusion(one: Scored, subject: Subject) -> dict[str, Any] | None:
    """Which label is predicted, wrongly, on the images on which another is missed: a heat map of the labels missed most
    and the pairs that stand out, by how much more often than on all images."""
    missed = subject.truth.target & ~one.predicted
    wrong = one.predicted & ~subject.truth.target
    both = missed.T.astype(np.float32) @ wrong.astype(np.float32)  # [missed, predicted]
    times, usual = missed.sum(0), wrong.mean(0)
    if not both.any():
        return None
    expected = times[:, None] * usual[None, :]
    surprise = (both - expected) / np.sqrt(np.maximum(expected, 1e-9))
    surprise[both < 2] = -np.inf
    pairs = []
    for place in np.argsort(-surprise, axis=None, kind="stable")[:PAIRS].tolist():
        i, j = divmod(place, both.shape[1])
        if surprise[i, j] > 1:
            pairs.append(
                {
                    "missed": subject.truth.classes[i],
                    "predicted": subject.truth.classes[j],
                    "images": int(both[i, j]),
                    "of": int(times[i]),
                    "times": float(both[i, j] / max(expected[i, j], 1e-9)),
                }
            )
    rows = [int(c) for c in np.argsort(-times, kind="stable")[:HEAT] if times[c] >= LEAST_MISSED]
    columns = [int(c) for c in np.argsort(-wrong.sum(0), kind="stable")[:HEAT] if wrong[:, c].any()]
    shares = ratio(both[np.ix_(rows, columns)], np.repeat(times[rows][:, None], len(columns), axis=1))
    return {
        "run": one.run.name,
        "least": LEAST_MISSED,
        "rows": [(subject.truth.classes[c], int(times[c])) for c in rows],
        "columns": [subject.truth.classes[c] for c in columns],
        "shares": shares.tolist(),
        "pairs": pairs,
    }


# ---- data, speed, settings -------------------------------------------------------------------------------------------


def data(subject: Subject, runs: Sequence[Run]) -> dict[str, Any]:
    """Of the split for training and the one that is reported: the table of `mlc stats`, its warnings, and a chart."""
    names = [str(runs[0].settings.get("train_split", "train")), subject.split]
    stats = {
        name: split_stats(subject.dataset, name) for name in dict.fromkeys(names) if name in subject.dataset.splits
    }
    labelled = {name: found for name, found in stats.items() if "classes" in found}
    grouped = stats_facts.class_groups(subject.dataset, labelled)
    lengths = {name: np.repeat(np.arange(len(n)), n) for name, n in _label_counts(labelled).items()}
    ranked = {group or "all classes": [row.counts[0] for row in rows] for group, rows in grouped.items()}
    label = "Images per class, from the most to the least frequent class"
    return {
        "fingerprint": subject.dataset.fingerprint,
        "splits": list(stats),
        "overview": [(what, cells) for what, cells in overview(stats) if set(cells) != {"-"} and what != COUNTS],
        "warnings": stats_facts.class_warnings(grouped, list(labelled)),
        "trained_on_other": [
            run.name for run in runs if run.info.get("mlc", {}).get("data") not in (None, subject.dataset.fingerprint)
        ],
        "charts": [
            {
                "title": f"Images per class in {next(iter(labelled))}, most frequent class first.",
                "names": list(ranked),
                "svg": Markup(charts.ranked(ranked, label)),
            },
            {
                "title": "Labels per image.",
                "names": list(lengths),
                "svg": Markup(charts.bars(lengths, _many_labels(lengths), "labels", "% of images", name="lengths")),
            },
        ],
    }


def _label_counts(labelled: Mapping[str, Mapping]) -> dict[str, Sequence[int]]:
    return {name: split["label_counts"] for name, split in labelled.items()}


def _many_labels(lengths: Mapping[str, np.ndarray]) -> str:
    """For who cannot see the bars; names of splits stay out of it."""
    return "Share of images by number of labels, on average " + ", ".join(f"{n.mean():.2f}" for n in lengths.values())


def speed(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per run of what it took; None where nobody wrote it down."""
    rows = []
    for run in runs:
        rates = run.curve("train/img_per_sec")[1]
        waits, memory = run.curve("data/wait_frac")[1], run.curve("sys/mem_gb")[1]
        last = run.log[-1] if run.log else {}
        rows.append(
            {
                "name": run.name,
                "img_per_sec": float(np.median(rates)) if rates else None,
                "wait": float(np.median(waits)) if waits else None,
                "mem_gb": max(memory) if memory else None,
                "minutes": run.minutes,
                "step": last.get("step"),
                "samples": last.get("samples_seen"),
                "mb": run.megabytes,
                "ms_per_sample": run.results.get("ms_per_sample"),
                "environment": run.environment,
                "wandb": run.wandb,
            }
        )
    return rows


def settings(runs: Sequence[Run]) -> dict[str, Any]:
    """`differ`: the settings in which the runs are not alike, `same`: all others, (name, text or a text per run)."""
    names = sorted({name for run in runs for name in run.settings} - set(NOT_SETTINGS))
    texts = {name: [_text(run.settings.get(name)) for run in runs] for name in (*names, "seed")}
    differ = [(name, cells) for name, cells in texts.items() if len(set(cells)) > 1]
    return {"differ": differ, "same": [(name, cells[0]) for name, cells in texts.items() if len(set(cells)) == 1]}


def _text(value: Any) -> str:
    """What is not set, and what older runs did not know, is one and the same: -."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, list):
        return redact(" ".join(map(str, value)))
    if isinstance(value, dict):
        return redact(", ".join(f"{name}={part}" for name, part in value.items()))
    return redact(str(value))
