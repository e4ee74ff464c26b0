"""Near copies: the same picture twice under two names, and above all once in train and once in test.

A picture that was saved again, resized or converted has other bytes, so a checksum does not find it; a score on a test
set whose pictures were trained on means nothing. Candidates are pairs whose 64-bit perceptual hashes differ in at most
7 bits; a pair counts when the two pictures at 8 x 8 pixels agree in colour and in every spot as well, which tells a
red shirt from a blue one, and two objects on the same backdrop. What it misses: crops, mirror images, grey copies of
coloured pictures, and pictures with next to nothing on them, such as a clear sky.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shards.pictures import Survey

BITS = 7  # differing bits; at most 7 of 64 leave one byte of the hash untouched, which the search rests on
ALIKE = 0.95  # correlation at 8 x 8 pixels: re-encoded and resized pictures have 0.98 and more
SPOT = 40.0  # levels of 255 by which the least alike pixel may differ: theirs stay below 34
FLAT = 3.0  # levels of 255 of standard deviation: below it a picture is one colour and its hash is noise
BLOCK = 512  # pictures compared with a bucket at a time


@dataclass(frozen=True)
class Copies:
    """Pictures that look the same: `members` are positions in the survey, ascending, at least two."""

    members: tuple[int, ...]
    splits: tuple[str, ...]
    same_bytes: bool

    @property
    def leak(self) -> bool:
        return len(self.splits) > 1


def find_copies(survey: Survey) -> list[Copies]:
    """Groups of near copies, leaks between splits first, then the largest."""
    label = group_numbers(survey.hash, survey.tiny, survey.content, survey.size[:, 0] > 0)
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order])) + 1
    groups = [_copies(survey, members) for members in np.split(order, starts) if len(members) > 1]
    return sorted(groups, key=lambda group: (not group.leak, -len(group.members), group.members))


def group_numbers(hashes: np.ndarray, tiny: np.ndarray, content: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """int32 [N]: a number for every picture, the same for near copies, copies of copies among them.

    Args:
        hashes, tiny: see `near_pairs`.
        content: int64 [N], the same for equal bytes.
        usable: bool [N], pictures that could be looked at.
    """
    _, first, content = np.unique(content, return_index=True, return_inverse=True)
    looked_at = first[usable[first]]
    pairs = looked_at[near_pairs(hashes[looked_at], tiny[looked_at])]
    same = np.stack([np.arange(len(content)), first[content]], axis=1)  # equal bytes need no looking at
    links = np.concatenate([pairs, same])
    graph = coo_array((np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), shape=(len(content),) * 2)
    return connected_components(graph, directed=False)[1]


def _copies(survey: Survey, members: np.ndarray) -> Copies:
    splits = tuple(survey.names[split] for split in np.unique(survey.split[members]))
    return Copies(tuple(members.tolist()), splits, len(np.unique(survey.content[members])) == 1)


def near_pairs(hashes: np.ndarray, tiny: np.ndarray) -> np.ndarray:
    """int64 [P, 2], i < j: pictures whose hashes differ in at most 7 bits and whose small copies agree.

    Args:
        hashes: uint64 [N].
        tiny: uint8 [N, 192], the pictures at 8 x 8 pixels in RGB; those of one colour are not compared.

    Every pair within 7 bits has one byte of the hash in common, so only pictures that share a byte are compared: for
    evenly spread hashes a 32nd of all pairs.
    """
    parts = np.array_split(tiny.reshape(len(tiny), tiny.shape[1] // 3, 3), len(tiny) // 4096 + 1)
    deviation = np.concatenate([np.zeros(0), *(part.std(axis=1).max(axis=1) for part in parts)])  # of a channel
    known = np.flatnonzero(deviation >= FLAT)
    found = [np.zeros((0, 2), np.int64)]
    for one, other in _candidates(hashes[known]):
        one, other = known[one], known[other]
        same = alike(tiny[one], tiny[other])
        found.append(np.stack([one[same], other[same]], axis=1))
    return np.sort(np.concatenate(found), axis=1)


def _candidates(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs within `BITS`, each pair once, in blocks."""
    byte = hashes.view(np.uint8).reshape(-1, 8)
    for band in range(8):
        order = np.argsort(byte[:, band], kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(byte[order, band])) + 1):
            for start in range(0, len(bucket), BLOCK):
                rows, others = bucket[start : start + BLOCK], bucket[start:]
                near = np.bitwise_count(hashes[rows, None] ^ hashes[others]) <= BITS
                one, other = np.nonzero(np.triu(near, 1))
                one, other = rows[one], others[other]
                fresh = (byte[one, :band] != byte[other, :band]).all(axis=1)  # else an earlier band had the pair
                yield one[fresh], other[fresh]


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [P]: rows of two arrays uint8 [P, D] that agree as a whole and everywhere, brightness and contrast apart."""
    one, other = one.astype(np.float32), other.astype(np.float32)
    contrast = np.minimum(one.std(axis=1), other.std(axis=1))
    one, other = _normal(one), _normal(other)
    spot = np.abs(one - other).max(axis=1, initial=0) * contrast
    return ((one * other).mean(axis=1) >= ALIKE) & (spot <= SPOT)


def _normal(rows: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 in every row."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(rows.std(axis=1, keepdims=True), 1e-6)
