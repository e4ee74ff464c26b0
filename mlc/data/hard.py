"""The hardest samples once more in every epoch: which rows they are is data, where they come is a function of the
position.

An epoch of n samples has `extra` places more. What a place shows is looked up in a list of rows; list v is for the v-th
epoch and those after it until there is another. So given the lists, the stream is as pure a function of the position as
without them, and whoever resumes needs no more than the lists.
"""

import numpy as np

from mlc.data.order import hash64, permute

FIRST = 111  # a stream of random numbers beside those of sampler.py
KEPT = 2  # lists: a global batch may begin in the epoch before the newest


class HardRows:
    """(epoch int64 [B], number of the extra place int64 [B]) -> rows int64 [B]."""

    def __init__(self, rows: np.ndarray, extra: int, seed: int, *, hardness: np.ndarray | None = None):
        """rows int64, ascending, each once: what can be chosen. `hardness` float [rows of the index]: the list for
        all epochs; without it the first one is random, and `add` gives those that follow."""
        self._rows, self._extra = rows, min(extra, len(rows))
        if hardness is not None:
            first = self.hardest(hardness)
        else:
            first = rows[permute(np.arange(self._extra), len(rows), hash64(seed, FIRST)[0])]
        self.lists: dict[int, np.ndarray] = {0: first}

    def __len__(self) -> int:
        return self._extra

    def __call__(self, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        versions = np.array(sorted(self.lists))
        which = versions[np.maximum(np.searchsorted(versions, epoch, side="right") - 1, 0)]
        row = np.empty_like(place)
        for version in np.unique(which).tolist():
            own = which == version
            row[own] = self.lists[version][place[own]]
        return row

    @property
    def newest(self) -> int:
        """The epoch from which the newest list is on."""
        return max(self.lists)

    def hardest(self, hardness: np.ndarray) -> np.ndarray:
        """The rows with the highest values, int64 [extra]; of equal ones the first."""
        return self._rows[np.argsort(-hardness[self._rows].astype(np.float64), kind="stable")[: self._extra]]

    def add(self, epoch: int, rows: np.ndarray) -> None:
        """The list from that epoch on."""
        self.lists[epoch] = rows
        self.lists = dict(sorted(self.lists.items())[-KEPT:])
