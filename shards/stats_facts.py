"""The numbers behind the page of `mlc stats --html`: classes, which labels go together, captions, copies, warnings.

All of it is counted from the index; nothing here opens a picture or knows about HTML.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, triu

from shards.captions import caption_texts, clean
from shards.dataset import Dataset, Index
from shards.duplicates import Copies
from shards.pictures import Survey

NO_GROUP = "no group"
LEAST_TOGETHER = 3  # images; a pair that met less often says nothing


@dataclass(frozen=True)
class ClassRow:
    """One class: `counts` are its images in every labelled split, `share` of the first one's images, 0..1."""

    name: str
    column: int
    counts: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class Pair:
    """Two classes on the same images: how many, of each class's images which share, and how many times chance."""

    one: str
    other: str
    images: int
    share_of_one: float
    share_of_other: float
    times_chance: float


@dataclass(frozen=True)
class Captions:
    """Words of one split's captions, before and after cleaning: int64 [captions] each."""

    split: str
    before: np.ndarray
    after: np.ndarray

    @property
    def medians(self) -> tuple[float, float]:
        return float(np.median(self.before)), float(np.median(self.after))


def class_groups(dataset: Dataset, found: Mapping[str, dict]) -> dict[str, list[ClassRow]]:
    """Group -> its classes, most frequent first; one group "" where the data set has none.

    `found` is `stats.split_stats` per labelled split; classes of no group come last.
    """
    first = next(iter(found.values()))
    rows = {
        name: ClassRow(
            name,
            column,
            tuple(split["classes"][name] for split in found.values()),
            first["classes"][name] / max(1, first["samples"]),
        )
        for column, name in enumerate(dataset.classes)
    }
    grouped = {name for members in dataset.groups.values() for name in members}
    groups = {group: [rows[name] for name in members] for group, members in dataset.groups.items()}
    rest = [row for name, row in rows.items() if name not in grouped]
    if rest:
        groups[NO_GROUP if groups else ""] = rest
    return {group: sorted(members, key=lambda row: (-row.counts[0], row.column)) for group, members in groups.items()}


def label_matrix(index: Index) -> csr_array:
    """int64 [len, C]: 1 where the image has the class."""
    labels = index.batch.column("labels")
    columns, starts = labels.values.to_numpy(), labels.offsets.to_numpy()
    return csr_array((np.ones(len(columns), np.int64), columns, starts), shape=(len(index), index.num_classes))


def together(matrix: csr_array) -> csr_array:
    """int64 [C, C]: images that have both classes; the diagonal counts each class."""
    return (matrix.T @ matrix).tocsr()


def alone(matrix: csr_array) -> np.ndarray:
    """int64 [C]: images on which the class is the only label."""
    single = matrix.sum(axis=1) == 1
    return np.asarray(matrix[single].sum(axis=0)).ravel()


def shares(both: csr_array, columns: Sequence[int]) -> np.ndarray:
    """float [K, K] of the chosen classes: the share of the row class's images that have the column's; nan for none."""
    chosen = both[list(columns)][:, list(columns)].toarray().astype(np.float64)
    count = chosen.diagonal().copy()
    return chosen / np.where(count > 0, count, np.nan)[:, None]


def strongest_pairs(both: csr_array, images: int, names: Sequence[str], most: int) -> list[Pair]:
    """Pairs that go together most clearly, by (seen - expected) / sqrt(expected); expected: were labels independent."""
    count = both.diagonal()
    upper = triu(both, 1).tocoo()
    one, other = upper.coords
    expected = count[one] * count[other] / max(1, images)
    surprise = (upper.data - expected) / np.sqrt(np.maximum(expected, 1e-12))
    clear = np.flatnonzero((upper.data >= LEAST_TOGETHER) & (surprise > 2))
    order = clear[np.argsort(-surprise[clear], kind="stable")][:most]
    return [
        Pair(
            names[one[i]],
            names[other[i]],
            int(upper.data[i]),
            upper.data[i] / count[one[i]],
            upper.data[i] / count[other[i]],
            upper.data[i] / expected[i],
        )
        for i in order
    ]


def clean_words(caption: str) -> list[str]:
    """The caption in lower case without punctuation and without scikit-learn's English stop words."""
    return clean(caption, ("punctuation", "lower", "stopwords")).split()


def caption_words(name: str, index: Index, frequent: Counter) -> Captions | None:
    """Words per caption of one split, None where it has no captions; counts the clean words into `frequent`."""
    before, after = [], []
    for caption in filter(None, caption_texts(index)):
        words = clean_words(caption)
        before.append(len(caption.split()))
        after.append(len(words))
        frequent.update(words)
    return Captions(name, np.array(before), np.array(after)) if before else None


def labels_differ(survey: Survey, group: Copies, indexes: Mapping[str, Index]) -> bool:
    """Whether labelled members of a group of copies have other labels than one another."""
    labels = {
        tuple(indexes[survey.names[survey.split[i]]].labels(survey.row[i]).tolist())
        for i in group.members
        if indexes[survey.names[survey.split[i]]].has_labels
    }
    return len(labels) > 1


def class_warnings(groups: Mapping[str, list[ClassRow]], splits: Sequence[str], few: int = 10) -> list[str]:
    """What the class counts warn of, a sentence each."""
    rows = list({row.column: row for members in groups.values() for row in members}.values())
    never = [row.name for row in rows if not row.counts[0]]
    scarce = [row.name for row in rows if 0 < row.counts[0] < few]
    found = []
    if never:
        found.append(f"{_classes(never)} no image in {splits[0]}: {_some(never)}.")
    if scarce:
        found.append(f"{_classes(scarce)} fewer than {few} images in {splits[0]}: {_some(scarce)}.")
    for place, split in enumerate(splits[1:], 1):
        absent = [row.name for row in rows if row.counts[0] and not row.counts[place]]
        if absent:
            found.append(f"{_classes(absent)} images in {splits[0]} and none in {split}: {_some(absent)}.")
    return found


def _classes(names: Sequence[str]) -> str:
    return "1 class has" if len(names) == 1 else f"{len(names)} classes have"


def _some(names: Sequence[str], most: int = 8) -> str:
    cut = [name if len(name) <= 60 else name[:59] + "…" for name in names[:most]]
    return ", ".join(cut) + (f" and {len(names) - most} more" if len(names) > most else "")
