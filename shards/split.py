"""Splits that keep every label's share: a random tenth of a long-tailed data set may miss its rare labels altogether.

Iterative stratification after K. Sechidis, G. Tsoumakas, I. Vlahavas, "On the Stratification of Multi-Label Data",
ECML PKDD 2011, algorithm 1: the rarest label left is dealt out first, each of its samples to the subset that still
wants most of that label. Three things are added: a subset that has its number of samples takes no more, so sizes are
exact; pairs are swapped at the end, because the rarest label alone does not balance samples of many labels; and samples
of one group stay together, where sizes may be off by what a group has.
"""

from collections.abc import Sequence

import numpy as np


def subset_sizes(samples: int, fractions: Sequence[float]) -> np.ndarray:
    """int64 [K]: `samples` dealt out by `fractions` (of any sum), each within one of its exact share, sum kept."""
    exact = samples * np.asarray(fractions, dtype=np.float64) / np.sum(fractions)
    sizes = np.floor(exact + 1e-9).astype(np.int64)
    leftover = np.argsort(sizes - exact, kind="stable")[: samples - int(sizes.sum())]
    sizes[leftover] += 1
    return sizes


def stratified_folds(
    labels: Sequence[Sequence[int]], fractions: Sequence[float], seed: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """int16 [samples]: the subset of every sample.

    `labels` holds the label columns of every sample (each at most once, may be empty), `fractions` the share of every
    subset; samples with the same number in `groups` share one. Sizes are within one of the exact share, or within a
    group. The same arguments give the same answer with any numpy: the legacy generator's stream is frozen.
    """
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(labels))
    by_label = _samples_by_label(labels, order)
    fractions = np.asarray(fractions, dtype=np.float64) / np.sum(fractions)
    wanted = np.array([len(samples) for samples in by_label])[:, None] * fractions  # [labels, K]
    room = subset_sizes(len(labels), fractions)
    left = np.array([len(samples) for samples in by_label])
    subset = np.full(len(labels), -1, dtype=np.int16)
    together = _together(np.arange(len(labels)) if groups is None else np.asarray(groups))

    def assign(sample: int, label: int | None) -> None:
        members = together[sample]
        chosen = _choose(wanted[label] if label is not None else room, room, len(members), rng)
        subset[members] = chosen
        room[chosen] -= len(members)
        for column in (column for member in members for column in labels[member]):
            wanted[column, chosen] -= 1
            left[column] -= 1

    while left.any():
        rarest = int(np.argmin(np.where(left > 0, left, len(labels) + 1)))
        for sample in by_label[rarest]:
            if subset[sample] < 0:
                assign(sample, rarest)
    for sample in order:
        if subset[sample] < 0:
            assign(sample, None)
    _swap(labels, subset, -wanted, np.array([len(members) == 1 for members in together], bool))
    return subset


def _together(groups: np.ndarray) -> list[np.ndarray]:
    """For every sample those of its group, itself among them."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    found: list[np.ndarray] = [order] * len(groups)
    for group in members:
        for sample in group:
            found[sample] = group
    return found


def _swap(labels: Sequence[Sequence[int]], subset: np.ndarray, excess: np.ndarray, alone: np.ndarray) -> None:
    """Swaps pairs between the two subsets that differ most in a label while the sum of squares of `excess` falls.

    `excess` [labels, K] is how many samples of a label a subset has above its exact share; both are changed in place.
    `alone` bool [samples]: those that may be swapped.
    """
    if not len(excess):
        return
    counts = np.array([len(row) for row in labels])
    sample_of = np.repeat(np.arange(len(labels)), counts)
    column_of = np.concatenate([np.asarray(row, dtype=np.int64) for row in labels])
    for _ in range(len(labels)):
        worst = int(np.argmax(np.ptp(excess, axis=1)))
        if np.abs(excess[worst]).max() <= 1:
            return
        rich, poor = int(np.argmax(excess[worst])), int(np.argmin(excess[worst]))
        pull = np.bincount(sample_of, (excess[:, rich] - excess[:, poor])[column_of], minlength=len(labels))
        givers, takers = ((subset == which) & alone for which in (rich, poor))
        if not givers.any() or not takers.any():
            return
        give = int(np.argmax(np.where(givers, pull - counts, -np.inf)))
        take = int(np.argmin(np.where(takers, pull + counts, np.inf)))
        changed = np.setxor1d(labels[give], labels[take]).astype(np.int64)
        if pull[take] - pull[give] + len(changed) >= 0:
            return
        subset[give], subset[take] = poor, rich
        moved = np.where(np.isin(changed, labels[give]), 1, -1)
        excess[changed, rich] -= moved
        excess[changed, poor] += moved


def _samples_by_label(labels: Sequence[Sequence[int]], order: np.ndarray) -> list[list[int]]:
    columns = 1 + max((max(row) for row in labels if len(row)), default=-1)
    samples: list[list[int]] = [[] for _ in range(columns)]
    for sample in order:
        for column in labels[sample]:
            samples[column].append(int(sample))
    return samples


def _choose(wanted: np.ndarray, room: np.ndarray, size: int, rng: np.random.RandomState) -> int:
    """The subset with room that wants most of the label, then the one with most room, then any of the best."""
    candidates = np.flatnonzero(room >= min(size, room.max()))
    for criterion in (wanted, room):
        values = criterion[candidates]
        candidates = candidates[values >= values.max() - 1e-9]
        if len(candidates) == 1:
            return int(candidates[0])
    return int(candidates[rng.randint(len(candidates))])
