"""Pictures for the report: what a run gets right, what it gets wrong, and where it is sure and wrong. People learn more
about a data set from twelve such pictures than from all of the numbers, wrong labels first of all.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlc.metrics.scorecard import cross_entropy
from mlc.report.runs import Scored, Subject
from shards.pictures import thumbnails

EACH = 12  # pictures of a kind
SIZE = (208, 160)  # pixels, at most
SHOWN = 8  # labels of a kind under a picture


def chosen(one: Scored, subject: Subject) -> dict[str, list[int]]:
    """{kind: images, as rows of the scores}: best, worst, sure_absent (a label it is sure of and nobody gave) and
    sure_missed (a label it is sure is not there)."""
    target = subject.truth.target
    each = cross_entropy(one.scores, target)
    true, said = target.sum(1), one.predicted.sum(1)
    f1 = 2 * (one.predicted & target).sum(1) / np.maximum(true + said, 1)
    order = np.lexsort((each, -f1, true == 0))  # the best with labels first
    absent = np.where(target, -1.0, one.scores).max(1, initial=-1.0)
    missed = np.where(target, one.scores, 2.0).min(1, initial=2.0)
    return {
        "best": order[:EACH].tolist(),
        "worst": np.lexsort((-each, f1))[:EACH].tolist(),
        "sure_absent": [i for i in np.argsort(-absent, kind="stable")[:EACH].tolist() if absent[i] > 0.5],
        "sure_missed": [i for i in np.argsort(missed, kind="stable")[:EACH].tolist() if missed[i] < 0.5],
    }


def gallery(one: Scored, subject: Subject, images: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
    """`chosen` as cards; `images` {row of the scores: its data URL}, pictures that cannot be opened are left out."""
    return {
        kind: [card(one, subject, place, images[place], kind) for place in places if place in images]
        for kind, places in chosen(one, subject).items()
    }


def card(one: Scored, subject: Subject, place: int, url: str, kind: str = "") -> dict[str, Any]:
    """What is under a picture: labels found, missed and wrong with their probabilities, its name and caption."""
    target, predicted, scores = subject.truth.target[place], one.predicted[place], one.scores[place]
    row = int(subject.rows[place])
    labels = {}
    for name, mask, falling in (
        ("found", target & predicted, True),
        ("missed", target & ~predicted, False),
        ("wrong", predicted & ~target, True),
    ):
        columns = np.flatnonzero(mask)
        columns = columns[np.argsort(-scores[columns] if falling else scores[columns], kind="stable")]
        labels[name] = [(subject.truth.classes[c], float(scores[c])) for c in columns[:SHOWN]]
        labels[f"{name}_more"] = max(0, len(columns) - SHOWN)
    why = ""
    if kind == "sure_absent":
        column = int(np.where(target, -1.0, scores).argmax())
        why = f"{subject.truth.classes[column]}: {scores[column]:.3f}, not labelled"
    if kind == "sure_missed":
        column = int(np.where(target, scores, 2.0).argmin())
        why = f"{subject.truth.classes[column]}: {scores[column]:.3f}, labelled"
    return {
        "url": url,
        "image_id": subject.truth.ids[int(place)].as_py(),
        "caption": subject.index.caption(row),
        "true": [subject.truth.classes[c] for c in np.flatnonzero(target)],
        "said": [subject.truth.classes[c] for c in np.flatnonzero(predicted)],
        "why": why,
        **labels,
    }


def pictures(found: list[Scored], subject: Subject) -> dict[int, str]:
    """{row of the scores: thumbnail as a data URL} of all that the galleries show."""
    places = {place for one in found for group in chosen(one, subject).values() for place in group}
    wanted = [(subject.split, int(subject.rows[place])) for place in places]
    made = thumbnails({subject.split: subject.index}, wanted, workers=1, size=SIZE)
    return {
        place: data_url(made[key]) for place in places if (key := (subject.split, int(subject.rows[place]))) in made
    }


def data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
