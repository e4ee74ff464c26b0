"""The sections of the page of `mlc stats --html`, each a function from the data to what its part of the template shows.

A section that the data has nothing for is None, and the template says so in a line. What could make the page too large
is capped here: pictures by bytes, lists by lines.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from markupsafe import Markup

from shards import charts, stats_facts
from shards.console import plural
from shards.dataset import Dataset, Index
from shards.duplicates import Copies
from shards.pictures import Survey

HEAT = 30  # classes of the heat map
PAIRS = 40
SAMPLES, ALL_SAMPLES = 8, 1500  # pictures of a class, of all classes
CARDS, MEMBERS = 60, 4  # groups of copies shown with pictures; of each, pictures of one split
LISTED = 1000  # lines of a fold-out list
WORDS = 40
THUMB_BYTES = 5_000_000  # all thumbnails together, as text in the page
SCATTERED = 3000  # pictures in the scatter of sizes


@dataclass
class Data:
    """What the sections are made from; `found` is `stats.split_stats` per split."""

    dataset: Dataset
    found: Mapping[str, dict]
    indexes: Mapping[str, Index]
    pictures: Survey
    thumbnails: Mapping[tuple[str, int], bytes]
    room: int = field(default_factory=lambda: THUMB_BYTES)

    @cached_property
    def labelled(self) -> dict[str, dict]:
        """The splits that have samples with labels, empty where the data set has no classes."""
        has = {name: split for name, split in self.found.items() if "classes" in split and split["samples"]}
        return has if self.dataset.classes else {}

    @cached_property
    def groups(self) -> dict[str, list[stats_facts.ClassRow]]:
        return stats_facts.class_groups(self.dataset, self.labelled)

    def url(self, split: str, row: int) -> str:
        """The thumbnail as a data URL; "" where the picture is unusable or the page is full."""
        found = self.thumbnails.get((split, row), b"")
        text = "data:image/jpeg;base64," + base64.b64encode(found).decode()
        if not found or len(text) > self.room:
            return ""
        self.room -= len(text)
        return text

    def named(self, split: str, row: int) -> dict:
        """What a picture is called and carries, for people and for the text that stands in for it."""
        index = self.indexes[split]
        labels = [self.dataset.classes[column] for column in index.labels(row)] if index.has_labels else None
        return {
            "split": split,
            "image_id": index.image_id(row),
            "where": f"{index.shard_path(int(index.shard[row])).name}:{index.key(row)}",
            "labels": labels,
            "caption": index.caption(row),
        }

    def place(self, picture: int) -> tuple[str, int]:
        """(split, row) of a position in the survey."""
        return self.pictures.names[self.pictures.split[picture]], int(self.pictures.row[picture])


# ---- warnings ----


def warnings(data: Data, found: Sequence[Copies]) -> list[tuple[str, str]]:
    """(anchor, sentence), the gravest first."""
    return [*_copy_warnings(data, found), *_label_warnings(data), *_caption_warnings(data)]


def _copy_warnings(data: Data, found: Sequence[Copies]) -> list[tuple[str, str]]:
    leaks = Counter(group.splits for group in found if group.leak)
    where = ", ".join(f"{' and '.join(splits)}: {count}" for splits, count in leaks.most_common())
    repeats = sum(not group.leak for group in found)
    differing = sum(stats_facts.labels_differ(data.pictures, group, data.indexes) for group in found)
    counted = [
        ("leaks", leaks.total(), "picture", f"in more than one split ({where})"),
        ("problems", len(data.pictures.problems), "picture", "not usable"),
        ("repeats", repeats, "picture", "more than once in the same split"),
        ("repeats" if repeats else "leaks", differing, "group", "of copies with labels that differ"),
    ]
    return [(anchor, f"{plural(count, noun)} {what}.") for anchor, count, noun, what in counted if count]


def _label_warnings(data: Data) -> list[tuple[str, str]]:
    bare = [f"{name}: {split['without_labels']:,}" for name, split in data.labelled.items() if split["without_labels"]]
    texts = [f"Images without any label ({', '.join(bare)})."] if bare else []
    if data.labelled:
        texts += stats_facts.class_warnings(data.groups, list(data.labelled))
    return [("classes", text) for text in texts]


def _caption_warnings(data: Data) -> list[tuple[str, str]]:
    bare = {name: split["samples"] - split["captions"]["with_caption"] for name, split in data.found.items()}
    some = [f"{name}: {count:,}" for name, count in bare.items() if 0 < count < data.found[name]["samples"]]
    return [("captions", f"Images without a caption, though others have one ({', '.join(some)}).")] if some else []


# ---- labels ----


def classes(data: Data) -> dict | None:
    """Per group the classes, most frequent first, with their counts in every labelled split."""
    if not data.labelled:
        return None
    curves = {group: [row.counts[0] for row in rows] for group, rows in data.groups.items()}
    lengths = {
        name: np.repeat(np.arange(len(split["label_counts"])), split["label_counts"])
        for name, split in data.labelled.items()
    }
    label = _described("Labels per image", lengths)
    return {
        "splits": list(data.labelled),
        "groups": data.groups,
        "totals": {group: np.sum([row.counts for row in rows], axis=0).tolist() for group, rows in data.groups.items()},
        "ranked": Markup(charts.ranked(curves, "Images per class, from the most to the least frequent class")),
        "lengths": Markup(charts.bars(lengths, label, "labels per image", "% of images", name="labels")),
    }


def together(data: Data) -> dict | None:
    """Which labels go together in the first labelled split: a matrix of the frequent classes, the clearest pairs."""
    if not data.labelled or len(data.dataset.classes) < 2:
        return None
    split = next(iter(data.labelled))
    matrix = stats_facts.label_matrix(data.indexes[split])
    both = stats_facts.together(matrix)
    count = both.diagonal()
    columns = [int(column) for column in np.argsort(-count, kind="stable")[:HEAT] if count[column]]
    return {
        "split": split,
        "names": [data.dataset.classes[column] for column in columns],
        "counts": count[columns].tolist(),
        "shares": stats_facts.shares(both, columns).tolist(),
        "alone": (stats_facts.alone(matrix)[columns] / count[columns]).tolist(),
        "pairs": stats_facts.strongest_pairs(both, len(data.indexes[split]), data.dataset.classes, PAIRS),
        "more": int((count > 0).sum()) - len(columns),
    }


def class_samples(dataset: Dataset, indexes: Mapping[str, Index]) -> list[tuple[int, str, int]]:
    """(class column, split, row): evenly spread over each class's images, the first picture of every class first."""
    split = next((name for name, index in indexes.items() if index.has_labels and len(index)), None)
    if split is None or not dataset.classes:
        return []
    by_class = stats_facts.label_matrix(indexes[split]).tocsc()
    each = min(SAMPLES, max(1, ALL_SAMPLES // len(dataset.classes)))
    chosen = []
    for column in range(len(dataset.classes)):
        rows = np.sort(by_class.indices[by_class.indptr[column] : by_class.indptr[column + 1]])
        picked = rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)]
        chosen += [(turn, column, int(row)) for turn, row in enumerate(picked)]
    return [(column, split, row) for _, column, row in sorted(chosen)]


def samples(data: Data, chosen: Iterable[tuple[int, str, int]]) -> dict | None:
    """Per class a strip of pictures."""
    if not data.labelled:
        return None
    strips: dict[int, list[dict]] = {column: [] for column in range(len(data.dataset.classes))}
    for column, split, row in chosen:
        if url := data.url(split, row):
            strips[column].append({"url": url} | data.named(split, row))
    return {"split": next(iter(data.labelled)), "groups": data.groups, "strips": strips}


# ---- captions and pictures ----


def captions(data: Data) -> dict | None:
    """Words per caption before and after cleaning, and the words that are left."""
    frequent: Counter = Counter()
    words = [stats_facts.caption_words(name, index, frequent) for name, index in data.indexes.items()]
    found = [part for part in words if part is not None]
    if not found:
        return None
    series = {
        "before cleaning": np.concatenate([part.before for part in found]),
        "after cleaning": np.concatenate([part.after for part in found]),
    }
    label = _described("Words per caption", series)
    return {
        "splits": found,
        "chart": Markup(charts.bars(series, label, "words per caption", "% of captions", name="words")),
        "words": frequent.most_common(WORDS),
        "different": len(frequent),
    }


def sizes(data: Data) -> dict | None:
    """Width, height and aspect of the usable pictures; the charts show a few thousand of them."""
    pictures = data.pictures
    known = pictures.size[:, 0] > 0
    found = {name: pictures.size[known & (pictures.split == i)] for i, name in enumerate(pictures.names)}
    found = {name: size for name, size in found.items() if len(size)}
    if not found:
        return None
    step = int(known.sum()) // SCATTERED + 1
    sampled = {name: size[::step] for name, size in found.items()}
    ratios = {name: size[:, 0] / size[:, 1] for name, size in sampled.items()}
    return {
        "table": [_size_row(name, size) for name, size in found.items()],
        "sampled": sum(map(len, sampled.values())),
        "scatter": Markup(charts.sizes(sampled, "Width against height of the images in pixels, see the table")),
        "aspects": Markup(charts.aspects(ratios, "Share of the images by width divided by height, see the table")),
    }


def _size_row(name: str, size: np.ndarray) -> dict:
    """Of int [N, 2]: how many, median sides, the smallest and the largest by area, share longer than 2:1."""
    area = size.prod(axis=1, dtype=np.int64)
    return {
        "split": name,
        "images": len(size),
        "median": np.median(size, axis=0).astype(int).tolist(),
        "least": size[area.argmin()].tolist(),
        "most": size[area.argmax()].tolist(),
        "long": float((size.max(axis=1) > 2 * size.min(axis=1)).mean()),
    }


def problems(data: Data) -> dict:
    """The pictures that cannot be used, and why."""
    found = data.pictures.problems
    lines = [data.named(split, row) | {"problem": text} for split, row, text in found[:LISTED]]
    return {"count": len(found), "lines": lines}


# ---- copies ----


def copies_shown(pictures: Survey, found: Sequence[Copies]) -> list[tuple[str, int]]:
    """(split, row) of every picture that the cards of leaks and of repeats show."""
    cards = [group for leak in (True, False) for group in [one for one in found if one.leak is leak][:CARDS]]
    shown = [i for group in cards for i in _shown(pictures, group)]
    return [(pictures.names[pictures.split[i]], int(pictures.row[i])) for i in shown]


def _shown(pictures: Survey, group: Copies) -> list[int]:
    """The first few of a group's members from each split."""
    seen: Counter = Counter()
    shown = []
    for i in group.members:
        seen[pictures.split[i]] += 1
        if seen[pictures.split[i]] <= MEMBERS:
            shown.append(i)
    return shown


def copies(data: Data, found: Sequence[Copies]) -> dict:
    """Cards with pictures for the first groups; the members of all groups as lines, up to a cap."""
    lines = []
    for number, group in enumerate(found, 1):
        if len(lines) >= LISTED:
            break
        lines += [data.named(*data.place(i)) | {"group": number} for i in group.members[:LISTED]]
    return {
        "count": len(found),
        "members": sum(len(group.members) for group in found),
        "cards": [_card(data, number, group) for number, group in enumerate(found[:CARDS], 1)],
        "lines": lines[:LISTED],
    }


def _card(data: Data, number: int, group: Copies) -> dict:
    shown = _shown(data.pictures, group)
    members = []
    for i in shown:
        width, height = data.pictures.size[i].tolist()
        members.append(
            data.named(*data.place(i)) | {"url": data.url(*data.place(i)), "size": (width, height) if width else None}
        )
    return {
        "number": number,
        "counts": Counter(data.place(i)[0] for i in group.members),
        "members": members,
        "more": len(group.members) - len(shown),
        "same_bytes": group.same_bytes,
        "differ": stats_facts.labels_differ(data.pictures, group, data.indexes),
    }


def _described(what: str, series: Mapping[str, np.ndarray]) -> str:
    """What a histogram says, in our own words and numbers only: names may not go into a chart."""
    values = np.concatenate(list(series.values()))
    return f"{what}: {values.min()} to {values.max()}, median {np.median(values):g}" if len(values) else what
