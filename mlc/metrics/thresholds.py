"""A sigmoid at 0.5 is rarely where F1 is best: labels are sparse and the loss knows nothing of F1. What decides instead
stands in `thresholds.json` beside a checkpoint, and every story that predicts labels asks `apply`.

`{"metric": "f1_samples", "global": 0.23, "value": 0.71}` is what training writes: one threshold. `mlc tune` writes a
`rule` too, with what that needs, and the value that held-out images confirmed:

    global, label-count   global
    group                 classes {name: threshold}, groups {name: threshold}
    class, balance        classes {name: threshold}
    max-fraction          fraction, of the likeliest class of the image
    top-k                 classes [name], groups {name: {threshold, min, max, classes}}
    expected              beta

`global` is always there, for readers that know no other. `zero_division` is there where it is 1: what an image without
true and predicted labels counts in the metric.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.metrics import expected_fbeta, top_k
from mlc.metrics.threshold_search import Metric, best_thresholds
from shards.console import UserError, did_you_mean
from shards.files import whole
from shards.json_text import to_json

RULES = ("global", "group", "class", "max-fraction", "top-k", "balance", "label-count", "expected")


def best_global_threshold(
    scores: NDArray, target: NDArray, metric: str = "f1_samples", zero_division: float = 0.0
) -> tuple[float, float]:
    """(threshold, value): the optimum of `metric` over every threshold there is, with the rule `score > threshold`.

    scores floating [N, C], target bool or 0/1 [N, C]; metric is f1_samples, f1_micro, f1_macro or another beta's, an
    F-beta without labels and predictions counting as `zero_division`. The threshold lies midway between its two
    neighbouring scores (for the lowest score: between it and 0). Where no label is positive every threshold is worth 0,
    unless zero_division is 1, and 0.5 is returned.
    """
    target = np.asarray(target) > 0.5
    if not target.any() and not zero_division:
        return 0.5, 0.0
    (threshold,), value = best_thresholds(scores, target, Metric.of(metric, zero_division))
    return threshold, value


# ---- deciding --------------------------------------------------------------------------------------------------------


def apply(scores: NDArray, rule: Mapping[str, Any], classes: Sequence[str] | None = None) -> NDArray[np.bool_]:
    """bool [N, C]: which labels are predicted, by the content of a `thresholds.json`.

    scores floating [N, C]; classes the names of the columns, where they may come in another order than the rule's.
    Raises UserError where the rule knows other classes.
    """
    kind = rule.get("rule", "global")
    if kind in ("global", "label-count"):
        return scores > rule["global"]
    if kind == "max-fraction":
        return of_maximum(scores) > rule["fraction"]
    if kind == "expected":
        return expected_fbeta.decide(scores, rule["beta"], rule.get("zero_division", 0))
    names = list(rule["classes"]) if classes is None else list(classes)
    _check_classes(rule, names, scores.shape[1])
    if kind != "top-k":
        return scores > np.array([rule["classes"][name] for name in names]).astype(scores.dtype)
    predicted = np.zeros(scores.shape, bool)
    for group in rule["groups"].values():
        columns = [names.index(name) for name in group["classes"]]
        bounds = top_k.Bounds(group["threshold"], group["min"], group["max"])
        predicted[:, columns] = top_k.decide(scores[:, columns], bounds)
    return predicted


def of_maximum(scores: NDArray) -> NDArray:
    """Each score as a fraction of the highest in its row; 0 where that is not above 0."""
    highest = scores.max(axis=1, keepdims=True)
    return np.divide(scores, highest, out=np.zeros_like(scores), where=highest > 0)


def _check_classes(rule: Mapping[str, Any], names: Sequence[str], columns: int) -> None:
    odd = sorted(set(names) ^ set(rule["classes"]))
    if odd or len(names) != columns:
        what = f"such as {odd[0]!r}" if odd else f"{len(names)} and not {columns}"
        raise UserError(f"the thresholds were tuned for other classes, {what}; run `mlc tune` on these predictions")


def describe(rule: Mapping[str, Any]) -> str:
    """A few words for a table or a line of the log."""
    kind = rule.get("rule", "global")
    if kind == "max-fraction":
        return f"above {rule['fraction']:.4f} x the image's highest"
    if kind == "expected":
        return f"highest expected F{rule['beta']:g}"
    if kind == "group":
        return ", ".join(f"{name} {value:.4f}" for name, value in rule["groups"].items())
    if kind == "top-k":
        return ", ".join(
            f"{name} {own['threshold']:.4f} ({own['min']} to {own['max']})" for name, own in rule["groups"].items()
        )
    if kind in ("class", "balance"):
        values = rule["classes"].values()
        return f"{len(values)} thresholds, {min(values):.4f} to {max(values):.4f}"
    return f"threshold {rule['global']:.4f}"


def compared(rule: Mapping[str, Any]) -> str:
    """A line about the rule that a training chose, and what it was chosen from."""
    known = rule.get("compared", {})
    others = [f"{name} {value:.4f}" for name, value in known.items() if name != rule.get("rule", "global")]
    worth = f", F1 samples {rule['honest']:.4f} on images left out ({', '.join(others)})" if known else ""
    return f"labels by: {describe(rule)}{worth}; `mlc tune` tries more rules"


# ---- files -----------------------------------------------------------------------------------------------------------


def save(path: str | Path, *, metric: str, threshold: float, value: float, zero_division: float = 0.0) -> None:
    """Writes the `thresholds.json` of one threshold; it survives the round trip to the last bit."""
    about = Metric.of(metric, zero_division).described
    write(path, about | {"global": float(threshold), "value": float(value)})


def write(path: str | Path, rule: Mapping[str, Any]) -> None:
    with whole(Path(path)) as building:
        building.write_text(to_json(rule, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: str | Path) -> dict:
    """The content of a `thresholds.json`; UserError where it is missing, no JSON or without a usable threshold."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read thresholds from {path}: {error}; give --threshold 0.5 instead") from error
    threshold = content.get("global") if isinstance(content, dict) else None
    if not _number(threshold):
        raise UserError(f'{path}: "global" must be a number, not {threshold!r}; give --threshold 0.5 instead')
    if content.get("zero_division", 0) not in (0, 1):
        raise UserError(f'{path}: "zero_division" must be 0 or 1, not {content["zero_division"]!r}')
    kind = content.get("rule", "global")
    if kind not in RULES:
        raise UserError(f"{path}: unknown rule {kind!r}{did_you_mean(str(kind), RULES)}; give --threshold 0.5 instead")
    if wrong := _wrong(kind, content):
        raise UserError(f"{path}: rule {kind!r} needs {wrong}; run `mlc tune` again or give --threshold 0.5 instead")
    return content


def rule_of(text: str) -> dict[str, Any]:
    """What `--threshold` says: a number, or the path of a `thresholds.json`. Raises UserError for anything else."""
    try:
        number = float(text)
    except ValueError:
        if text.endswith(".json") or Path(text).is_file():
            return load(text)
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--threshold {text}: expected a number or a thresholds.json")
    return {"metric": None, "global": number, "value": None}


def _wrong(kind: str, content: Mapping[str, Any]) -> str:
    """What a rule's content lacks, "" for nothing."""
    if kind == "max-fraction":
        return "" if _number(content.get("fraction")) else "a number `fraction`"
    if kind == "expected":
        beta = content.get("beta")
        return "" if _number(beta) and beta > 0 else "a number `beta` above 0"
    if kind in ("group", "class", "balance"):
        return "" if _numbers(content.get("classes")) else "a threshold for each class in `classes`"
    if kind == "top-k" and not _is_grouped(content.get("groups"), content.get("classes")):
        return "`groups` of threshold, min, max and classes, together all of `classes`"
    return ""


def _is_grouped(groups: Any, classes: Any) -> bool:
    if not isinstance(groups, dict) or not groups or not all(map(_is_group, groups.values())):
        return False
    members = [name for group in groups.values() for name in group["classes"]]
    return _names(classes) and sorted(members) == sorted(classes)


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or not _number(group.get("threshold")):
        return False
    least, most, names = group.get("min"), group.get("max"), group.get("classes")
    whole_numbers = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (least, most))
    return whole_numbers and 0 <= least <= most and _names(names)


def _names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(name, str) for name in values)


def _numbers(values: Any) -> bool:
    return isinstance(values, dict) and bool(values) and all(map(_number, values.values()))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
