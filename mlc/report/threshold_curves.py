"""How a metric moves with the threshold, and what each rule is worth: a flat top says that tuning hardly matters, a gap
between the two values of a rule that it has learnt its images by heart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.metrics.scorecard import ratio
from mlc.metrics.threshold_search import Metric
from shards.files import whole

GRID = np.arange(1, 200) / 200
CHUNK = 1 << 22  # scores at a time: bounds the memory
COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2")
INK, GREY = "#1b1b1b", "#9aa0a6"
DRAWN_GROUPS = len(COLORS)


def curves(scores: NDArray, target: NDArray, metric: Metric, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """{metric, threshold [199], all: CURVE, groups: {name: CURVE}}, lists for JSON; CURVE has value, precision, recall
    (both pooled) and labels, predicted per image, at each threshold.

    scores floating [N, C], target bool [N, C], groups {name: columns}.
    """
    whole = {"metric": metric.name, "threshold": GRID.tolist(), "all": _curve(scores, target, metric)}
    return whole | {"groups": {name: _curve(scores[:, c], target[:, c], metric) for name, c in groups.items()}}


def _curve(scores: NDArray, target: NDArray, metric: Metric) -> dict[str, list[float]]:
    units = {"samples": len(scores), "macro": scores.shape[1], "micro": 1}[metric.average]
    chosen, hits = np.zeros((2, units, len(GRID)))  # [U, T], above each threshold
    true = np.zeros(units)
    step = max(1, CHUNK // scores.shape[1])
    for first in range(0, len(scores), step):
        part, positive = scores[first : first + step], target[first : first + step]
        bins = np.searchsorted(GRID.astype(scores.dtype), part)  # how many of the thresholds a score is above
        row, column = np.indices(part.shape, sparse=True)
        unit = {"samples": row + first, "macro": column, "micro": 0}[metric.average] + np.zeros_like(bins)
        for counts, mask in ((chosen, bins > 0), (hits, positive & (bins > 0))):
            low, high = (first, first + len(part)) if metric.average == "samples" else (0, units)
            place = (unit[mask] - low) * len(GRID) + bins[mask] - 1
            found = np.bincount(place, minlength=(high - low) * len(GRID)).reshape(high - low, -1)
            counts[low:high] += np.cumsum(found[:, ::-1], axis=1)[:, ::-1]
        true += np.bincount(unit[positive], minlength=units)
    square = metric.beta**2
    value = ratio((1 + square) * hits, chosen + square * true[:, None], metric.zero_division)
    pooled = hits.sum(0)
    return {
        "value": _rounded(value.mean(0)),
        "precision": _rounded(pooled / np.maximum(chosen.sum(0), 1)),
        "recall": _rounded(pooled / max(true.sum(), 1)),
        "labels": _rounded(chosen.sum(0) / len(scores)),
    }


def _rounded(values: NDArray) -> list[float]:
    return np.round(values, 6).tolist()


def plot(path: Path, found: Mapping[str, Any], rules: Mapping[str, Mapping[str, float]], chosen: str) -> None:
    """The curves, and beside them the two values of each rule: `rules` {name: {in_sample, honest}}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with plt.rc_context(style):
        size = (9.2, max(3.0, 0.9 + 0.27 * len(rules)))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
        _draw_curves(left, found)
        _draw_rules(right, found["metric"], rules, chosen)
        with whole(path) as building:
            figure.savefig(building, dpi=160, format="png")
        plt.close(figure)


def _draw_curves(axis, found: Mapping[str, Any]) -> None:
    several = len(found["groups"]) > 1
    shown = list(found["groups"].items())[:DRAWN_GROUPS] if several else []
    for (name, curve), color in zip([*shown, ("all classes", found["all"])], [*COLORS[: len(shown)], INK], strict=True):
        best = int(np.argmax(curve["value"]))
        axis.plot(found["threshold"], curve["value"], color=color, linewidth=1.4, label=name)
        axis.plot(found["threshold"][best], curve["value"][best], "o", color=color, markersize=5)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_xlabel("one threshold (dot: the best)")
    axis.set_ylabel(found["metric"])
    if several:
        axis.legend(frameon=False, fontsize=8)


def _draw_rules(axis, metric: str, rules: Mapping[str, Mapping[str, float]], chosen: str) -> None:
    for place, own in enumerate(rules.values()):
        axis.plot([own["honest"], own["in_sample"]], [place] * 2, color=GREY, linewidth=1)
        axis.plot(own["in_sample"], place, "o", markerfacecolor="white", color=GREY, markersize=6)
        axis.plot(own["honest"], place, "o", color=COLORS[0], markersize=6)
    axis.set_yticks(range(len(rules)), list(rules))
    for label, name in zip(axis.get_yticklabels(), rules, strict=True):
        label.set_fontweight("bold" if name == chosen else "normal")
    axis.set_ylim(len(rules) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.margins(x=0.08)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(f"{metric} (full: held-out images, hollow: those of the fit)", fontsize=8)
