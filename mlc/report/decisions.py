"""What decides a label in the report: how F1 moves with the threshold, and what the run's rule is worth.

The value of a rule on the images it was tuned on is too good. `mlc tune` has measured what the rule gives on images
that were left out, and that number stands beside the other wherever it is known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mlc.metrics import thresholds
from mlc.metrics.decision_rules import with_rest
from mlc.metrics.multilabel import value_of
from mlc.metrics.threshold_search import Metric
from mlc.report import threshold_curves
from mlc.report.runs import Scored, Subject
from shards import charts

CURVE_IMAGES = 10_000  # whose curves are drawn, evenly spread
SAME = 5e-4  # a value that was computed in another precision is still the value of these images
MOST_GROUPS = 5  # and all classes: the colours of a chart


def rules(found: Sequence[Scored], subject: Subject) -> list[dict[str, Any]]:
    """A row per run: name, rule, metric; its value `here`, where it was tuned (`in_sample`) and on images left out
    (`honest`), the last two None where nobody knows; `tuned_here`: whether here is where it was tuned."""
    rows = []
    for one in found:
        rule = one.run.rule
        metric = Metric.of_rule(rule)
        here = value_of(metric, one.predicted, subject.truth.target)
        row = {"name": one.run.name, "rule": thresholds.describe(rule), "metric": metric.name, "here": here}
        row |= {"kind": rule.get("rule", "global"), "in_sample": rule.get("value"), "honest": rule.get("honest")}
        rows.append(row | {"tuned_here": row["in_sample"] is not None and abs(here - row["in_sample"]) < SAME})
    return rows


def curves(found: Sequence[Scored], subject: Subject) -> list[dict[str, Any]]:
    """Of each run: `charts` of F1 by one threshold, in kinds and in groups, and `tuned`, the rules that were tried."""
    return [_of_run(one, subject, number) for number, one in enumerate(found)]


def _of_run(one: Scored, subject: Subject, number: int) -> dict[str, Any]:
    target = subject.truth.target
    rows = np.unique(np.linspace(0, len(target) - 1, min(len(target), CURVE_IMAGES)).astype(int))
    scores, true, tuned = one.scores[rows], target[rows], one.run.tuned
    zero, averages = subject.zero_division, ("samples", "micro", "macro")
    metrics = {kind: Metric(average=kind, zero_division=zero) for kind in averages}
    kinds = {
        kind: threshold_curves.curves(scores, true, metric, {})["all"]["value"] for kind, metric in metrics.items()
    }
    grouped = tuned or _grouped(one, scores, true, subject)
    shown = [_chart("F1 by one threshold for all classes", "F1", kinds, one, f"thresholds{number}")]
    values = {name: curve["value"] for name, curve in list(grouped["groups"].items())[:MOST_GROUPS]}
    if len(values) > 1:
        title = f"{grouped['metric']} of each group by its threshold"
        values["all classes"] = grouped["all"]["value"]
        shown.append(_chart(title, grouped["metric"], values, one, f"groups{number}"))
    tried = [{"name": name, **values} for name, values in tuned.get("rules", {}).items()]
    return {
        "name": one.run.name,
        "charts": shown,
        "tuned": tried,
        "metric": grouped["metric"],
        "chosen": tuned.get("chosen"),
    }


def _grouped(one: Scored, scores: NDArray, true: NDArray, subject: Subject) -> dict[str, Any]:
    """What `mlc tune` would have written, for a run that it has not tuned."""
    metric = Metric.of_rule(one.run.rule)
    return threshold_curves.curves(scores, true, metric, with_rest(subject.truth.groups, true.shape[1]))


def _chart(title: str, ylabel: str, values: Mapping[str, Sequence[float]], one: Scored, name: str) -> dict[str, Any]:
    """Where each line is highest is in words, for who cannot see it; names of groups stay out of the picture."""
    grid = threshold_curves.GRID
    tops = ", ".join(f"{max(line):.3f} at {grid[int(np.argmax(line))]:.2f}" for line in values.values())
    label = f"{ylabel} by threshold, highest values {tops}"
    own = one.run.rule["global"] if one.run.rule.get("rule", "global") in ("global", "label-count") else None
    series = {str(number): (grid, line) for number, line in enumerate(values.values())}
    svg = Markup(charts.curves(series, label, "threshold", ylabel, name=name, at=own, xlim=(0, 1)))
    return {"title": f"{title}.", "names": list(values), "svg": svg}
