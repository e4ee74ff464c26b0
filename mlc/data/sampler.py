"""Which sample each position of the endless stream is: plain shuffling, weights, repeats and several data sets, all as
pure functions of the position, so that a run resumes exactly whatever its sampler is.

Three bijections and a table, one after the other:

    position -> (data set, place in its own stream)      `Mixture`: exact shares in every window of 4096 positions
    place    -> (epoch, stratum)                         `Shuffle`: over the whole epoch, or inside a window of blocks
    stratum  -> row                                      none, a list of rows, or cumulative weights

There are as many strata in an epoch as samples are drawn in it. Without weights a stratum is a row (or one of a row's
repeats). With weights the strata are equal slices of the cumulative weights and a draw is uniform in its slice. So
within an epoch the number of times a row comes up differs from the expected one by less than 2, and by less than 1
where the row's weight lies within one slice: a border between two slices leaves a chance on either side of it.
Independent draws have no such bound, and would miss 37 % of the rows even at equal weights. No library's random stream
or floating-point sum is in any of it.
"""

import functools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from mlc.data.hard import HardRows
from mlc.data.order import hash64, locate, permute, uniform
from shards.console import UserError, did_you_mean
from shards.dataset import Dataset, Index
from shards.urls import redact

SAMPLERS = ("uniform", "log-freq", "sqrt-freq", "class-balanced", "weights:COLUMN")
WINDOW_BLOCKS = 8  # blocks that `--shuffle block:N` mixes with each other
LISTED_BLOCKS = 1 << 16  # up to so many, the order of an epoch's blocks is kept
MIXTURE_WINDOW = 4096  # positions within which the order of the data sets is shuffled
SHARE_BITS = 20  # shares are multiples of 2^-20
TOTAL_WEIGHT = 1 << 52  # what the integer weights of a data set add up to, about: a float64 holds it exactly
CHUNK = 1 << 20  # rows looked at together: bounds the memory of a pass over an index

# Streams of random numbers beside those of order.py.
BLOCKS, INSIDE, START, SLICE, WINDOW, SOURCE = range(101, 107)


# ---- place -> epoch, stratum -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shuffle:
    """The order of the n strata of each epoch; `block` 0 shuffles globally, else in windows of 8 blocks of that many.

    Blocks are consecutive strata on a ring that is cut at another place each epoch. Their order is shuffled, and then
    everything inside each window of blocks: reads stay inside a few shards for 8 x `block` samples, and neighbours
    differ from epoch to epoch. O(1) per lookup, no memory.
    """

    n: int
    seed: int
    block: int = 0

    def __call__(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, stratum), int64 [B], of places in the endless stream, int64 [B]."""
        if not 0 < self.block < self.n:
            return locate(place, self.n, self.seed)
        epoch, place = np.divmod(place, self.n)
        place = self._within_windows(epoch, place)
        full = self.n // self.block  # the ring's last, shorter block always comes last: the cut makes it another one
        number, inside = np.divmod(place, self.block)
        whole = number < full
        number[whole] = self._block(epoch[whole], number[whole], full)
        start = (hash64(self.seed, START, epoch) % np.uint64(self.n)).astype(np.int64)
        return epoch, (start + number * self.block + inside) % self.n

    def _block(self, epoch: np.ndarray, number: np.ndarray, full: int) -> np.ndarray:
        """Which block comes at a place; few blocks are looked up, since cycle walking in a small domain takes long."""
        if len(epoch) and full <= LISTED_BLOCKS and epoch.min() == epoch.max():
            return _block_order(full, self.seed, int(epoch[0]))[number]
        return permute(number, full, hash64(self.seed, BLOCKS, epoch))

    def _within_windows(self, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        size = min(self.block * WINDOW_BLOCKS, self.n)
        window, inside = np.divmod(place, size)
        key = hash64(self.seed, INSIDE, epoch, window)
        last = window == self.n // size  # the shorter window at the end of an epoch
        for chosen, length in ((~last, size), (last, self.n % size)):
            if chosen.any():
                inside[chosen] = permute(inside[chosen], length, key[chosen])
        return window * size + inside


@functools.lru_cache(maxsize=4)
def _block_order(full: int, seed: int, epoch: int) -> np.ndarray:
    return permute(np.arange(full), full, np.broadcast_to(hash64(seed, BLOCKS, epoch), full))


def parse_shuffle(text: str) -> int:
    """`global` -> 0, `block:N` -> N. Raises UserError."""
    kind, _, size = text.partition(":")
    if kind == "block" and size.isdecimal() and int(size) > 0:
        return int(size)
    if text != "global":
        raise UserError(f"--shuffle {text}: use global, or block:N with N rows in a block, such as block:10000")
    return 0


# ---- stratum -> row --------------------------------------------------------------------------------------------------


class Rows:
    """One data set's part of a stream: `rows` of an index, weighted, repeated, shuffled.

    Memory: nothing for all rows once, else 8 bytes a row (the list, or the cumulative weights), built once; worker
    processes that are forked share it. A lookup is O(1), with weights O(log n).
    """

    def __init__(
        self,
        index: Index,
        seed: int,
        *,
        rows: np.ndarray | None = None,
        sampler: str = "uniform",
        block: int = 0,
        repeats: Mapping[int, int] | None = None,
        hard: float = 0.0,
        hardness: np.ndarray | None = None,
    ):
        """`rows` int64, ascending (default: all); `repeats` {class column: times}, see `--oversample`; `hard`: share of
        the samples to show once more, see `HardRows`, as also for `hardness`."""
        self.index, self.seed = index, seed
        self._rows, self._ends = rows, None
        times = row_repeats(index, repeats, rows) if repeats else None
        if sampler != "uniform":
            weights = row_weights(index, sampler, rows)
            whole = _integers(weights if times is None else weights * times)
            self._ends = np.cumsum(whole, out=whole)
        elif times is not None:
            self._rows = np.repeat(np.arange(len(index)) if rows is None else rows, times)
        self._count = len(index) if self._rows is None else len(self._rows)
        self.hard: HardRows | None = None
        if extra := round(hard * self._count):
            self.hard = HardRows(self._choosable(), extra, seed, hardness=hardness)
        self._fixed = b"" if hardness is None or self.hard is None else self.hard.lists[0]
        self.shuffle = Shuffle(self._count + (len(self.hard) if self.hard else 0), seed, block)

    def _choosable(self) -> np.ndarray:
        """int64, ascending: the rows that can be drawn at all, each once."""
        rows = np.arange(len(self.index)) if self._rows is None else self._rows
        return np.unique(rows if self._ends is None else rows[np.diff(self._ends, prepend=0) > 0])

    @property
    def rows(self) -> np.ndarray | None:
        """int64, ascending, with their repeats: the rows that take part; None for all."""
        return self._rows

    def __len__(self) -> int:
        """Samples in an epoch: the rows with their repeats."""
        return self.shuffle.n

    def locate(self, place: np.ndarray, epoch: np.ndarray | None = None) -> np.ndarray:
        """Rows, int64 [B], of places in this data set's own stream; `epoch` int64 [B]: of the run, if not its own."""
        own, number = self.shuffle(place)
        if self.hard is None:
            return self._row(place, number)
        row, more = np.empty_like(number), number >= self._count
        row[~more] = self._row(place[~more], number[~more])
        row[more] = self.hard((own if epoch is None else epoch)[more], number[more] - self._count)
        return row

    def _row(self, place: np.ndarray, number: np.ndarray) -> np.ndarray:
        if self._ends is not None:
            number = self._draw(place, number)
        return number if self._rows is None else self._rows[number]

    def _draw(self, place: np.ndarray, stratum: np.ndarray) -> np.ndarray:
        total = int(self._ends[-1])
        at = (stratum + uniform(self.seed, SLICE, place)) / self._count
        target = np.minimum((at * total).astype(np.int64), total - 1)
        return np.searchsorted(self._ends, target, side="right")

    def expected_frequencies(self) -> np.ndarray:
        """float64 [C]: the share of drawn samples that have each class, exactly; without what `hard` adds."""
        if self._rows is None and self._ends is None:
            return self.index.class_counts() / len(self.index)
        expected = np.zeros(self.index.num_classes)
        count = self._count if self._ends is None else len(self._ends)
        for chunk in _chunks(count):
            rows = np.arange(chunk.start, chunk.stop) if self._rows is None else self._rows[chunk]
            classes, owner = self.index.labels_of(rows)
            share = (
                np.ones(len(rows)) if self._ends is None else np.diff(self._ends[chunk], prepend=self._end(chunk.start))
            )
            expected += np.bincount(classes, weights=share[owner], minlength=len(expected))
        return expected / (self._count if self._ends is None else self._ends[-1])

    def cooccurrence(self) -> np.ndarray:
        """int64 [C, C]: rows that have class i and class j, each as often as it is repeated, whatever its weight."""
        counts = np.zeros((self.index.num_classes,) * 2, np.int64)
        for chunk in _chunks(len(self.index) if self._rows is None else len(self._rows)):
            rows = np.arange(chunk.start, chunk.stop) if self._rows is None else self._rows[chunk]
            classes, owner = self.index.labels_of(rows)
            has = csr_array((np.ones(len(owner), np.int64), (owner, classes)), (len(rows), len(counts)))
            counts += (has.T @ has).toarray()
        return counts

    def _end(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    @property
    def fingerprint(self) -> str:
        """Equal for the same rows, weights and kind of shuffling."""
        kept = zlib.crc32(b"" if self._rows is None else self._rows)
        return f"{len(self)} samples {zlib.crc32(b'' if self._ends is None else self._ends, kept):08x} " + (
            (f"in blocks of {self.shuffle.block}" if self.shuffle.block else "shuffled globally")
            + (f", {len(self.hard)} of them the hardest {zlib.crc32(self._fixed):08x}" if self.hard else "")
        )


def row_weights(index: Index, sampler: str, rows: np.ndarray | None) -> np.ndarray:
    """float64 [n]: how often each row is drawn, relative to the others.

    `class-balanced`, `sqrt-freq` and `log-freq` first draw a class with probability proportional to 1, sqrt(n_c) and
    log(1 + n_c) of its n_c samples, and then one of its samples; samples without labels count as one more class. The
    chance of a row is the sum over its classes. `weights:COLUMN` takes the numbers of a column of the index.
    """
    rows = np.arange(len(index)) if rows is None else rows
    kind, _, column = sampler.partition(":")
    if kind == "weights":
        return _column_weights(index, column, rows)
    importance = {"class-balanced": np.ones_like, "sqrt-freq": np.sqrt, "log-freq": np.log1p}
    if sampler not in importance:
        raise UserError(
            f"--sampler {sampler}: use one of {', '.join(SAMPLERS)}{did_you_mean(sampler, list(importance))}"
        )
    counts = np.zeros(index.num_classes + 1)
    for _, classes, _ in _labels_with_bare(index, rows):
        counts += np.bincount(classes, minlength=len(counts))
    # Rounded, since the last bit of a logarithm is not the same on all machines.
    weight = np.rint(importance[sampler](counts) * 2**20)
    each = np.divide(weight, counts, out=np.zeros_like(weight), where=counts > 0)
    weights = np.empty(len(rows))
    for chunk, classes, owner in _labels_with_bare(index, rows):
        weights[chunk] = np.bincount(owner, weights=each[classes], minlength=chunk.stop - chunk.start)
    return weights


def _labels_with_bare(index: Index, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(place in `rows`, class columns, owner) of each chunk; a row without labels has the class behind the last."""
    for chunk in _chunks(len(rows)):
        classes, owner = index.labels_of(rows[chunk])
        bare = np.flatnonzero(np.bincount(owner, minlength=chunk.stop - chunk.start) == 0)
        yield chunk, np.append(classes, np.full(len(bare), index.num_classes)), np.append(owner, bare)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def _column_weights(index: Index, column: str, rows: np.ndarray) -> np.ndarray:
    if column not in ("weight", "size"):
        raise UserError(f"--sampler weights:{column}: the index has no such numbers; use weights:weight")
    weights = getattr(index, column)[rows].astype(np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError(f"--sampler weights:{column}: weights must be finite, not negative, and not all 0")
    return weights


def _integers(weights: np.ndarray) -> np.ndarray:
    """int64: proportional to `weights`, at least 1 where they are above 0, so that their sums are exact."""
    whole = (weights / weights.max() * (TOTAL_WEIGHT // len(weights))).astype(np.int64)
    return np.maximum(whole, weights > 0, out=whole)


def row_repeats(index: Index, repeats: Mapping[int, int], rows: np.ndarray | None) -> np.ndarray:
    """int64 [n]: how many times each row comes in an epoch: the largest number among its classes, 1 for the others."""
    rows = np.arange(len(index)) if rows is None else rows
    of_class = np.ones(index.num_classes, np.int64)
    of_class[list(repeats)] = list(repeats.values())
    times = np.ones(len(rows), np.int64)
    for chunk in _chunks(len(rows)):
        classes, owner = index.labels_of(rows[chunk])
        np.maximum.at(times[chunk], owner, of_class[classes])
    return times


def parse_oversample(texts: Sequence[str], dataset: Dataset) -> dict[int, int]:
    """`CLASS=K` each -> {class column: K}. Raises UserError for an unknown class or a K that is not 1, 2, 3, ..."""
    columns = {name: column for column, name in enumerate(dataset.classes)}
    repeats = {}
    for text in texts:
        name, _, times = text.rpartition("=")
        if name not in columns:
            raise UserError(f"--oversample {text}: no class {name!r}{did_you_mean(name, dataset.classes)}; use CLASS=K")
        if not times.isdecimal() or int(times) < 1:
            raise UserError(f"--oversample {text}: K is how many times a sample comes in an epoch, 1, 2, 3, ...")
        repeats[columns[name]] = int(times)
    return repeats


# ---- position -> data set, place -------------------------------------------------------------------------------------


class Sampler:
    """Positions of the endless stream -> rows of one or more data sets.

    Data sets take turns as evenly as their shares allow; within each window of 4096 positions their order is shuffled,
    so that the pairs that mixing makes do not follow a pattern. Each data set is a stream of its own, in which every
    epoch has every sample.
    """

    def __init__(self, sources: Sequence[Rows], shares: Sequence[float | None], seed: int):
        """`shares` of the samples; a None takes what the numbers leave, in proportion to its length."""
        self.sources, self.seed = tuple(sources), seed
        self.shares = _full_shares(shares, [len(rows) for rows in sources])
        left = np.cumsum(self.shares[::-1])[::-1]
        # The share of each data set among itself and those after it: the stream is divided off one by one.
        self._parts = [round(own / rest * (1 << SHARE_BITS)) for own, rest in zip(self.shares, left, strict=True)]

    @property
    def epoch_samples(self) -> int:
        """Samples until the first data set has been seen once: what `1ep` means."""
        return len(self.sources[0]) if len(self.sources) == 1 else round(len(self.sources[0]) / self.shares[0])

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data set, row), both int64 [B], of positions int64 [B]."""
        position = np.asarray(position, np.int64)
        source, place = self._turns(position)
        row, epoch = np.empty_like(place), position // self.epoch_samples
        for number, rows in enumerate(self.sources):
            own = source == number
            row[own] = rows.locate(place[own], epoch[own])
        return source, row

    def _turns(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self.sources) == 1:
            return np.zeros_like(position), position
        window, inside = np.divmod(position, MIXTURE_WINDOW)
        place = window * MIXTURE_WINDOW + permute(inside, MIXTURE_WINDOW, hash64(self.seed, WINDOW, window))
        source = np.full_like(position, -1)
        for number, part in enumerate(self._parts):
            # Of the first p places this data set has floor(p * part / 2^20), and the others the rest.
            open_ = source < 0
            before, after = ((place + more) * part >> SHARE_BITS for more in (0, 1))
            own = open_ & (after > before)
            source[own] = number
            place = np.where(own, before, np.where(open_, place - before, place))
        return source, place

    @property
    def fingerprint(self) -> str:
        """Equal for two samplers with the same stream, whatever flags and files it came from."""
        return "+".join(
            f"{share:.6g} of {rows.fingerprint}" for share, rows in zip(self.shares, self.sources, strict=True)
        )

    def expected_frequencies(self) -> np.ndarray:
        """float64 [C]: the share of the stream's samples that have each class."""
        each = [share * rows.expected_frequencies() for share, rows in zip(self.shares, self.sources, strict=True)]
        return np.sum(each, axis=0)


def plain(index: Index, seed: int) -> Sampler:
    """Every row of one split once an epoch, shuffled globally."""
    return Sampler([Rows(index, seed)], [None], seed)


def parse_data(text: str) -> tuple[str, float | None]:
    """`DIR`, `URL`, `DIR:SHARE` or `URL:SHARE` -> (folder or URL, share). Raises UserError."""
    path, colon, share = text.rpartition(":")
    port = re.fullmatch("[a-z0-9]+://[^/]*", path) is not None
    if not colon or port or not re.fullmatch(r"-?[0-9]*\.?[0-9]+", share) or Path(text).exists():
        return text, None
    if not float(share) > 0:
        raise UserError(f"--data {redact(text)}: the share of a data set must be above 0")
    return path, float(share)


def source_seed(seed: int, number: int) -> int:
    """The seed of a data set's own order; the first has the run's, as if it were alone."""
    return seed if number == 0 else int(hash64(seed, SOURCE, number)[0])


def _full_shares(shares: Sequence[float | None], lengths: Sequence[int]) -> list[float]:
    given = sum(share for share in shares if share is not None)
    if None not in shares:
        return [share / given for share in shares]
    if given >= 1:
        raise UserError(
            f"--data: the shares add up to {given:g} and leave nothing for the data sets without one; give every data "
            "set a share, or shares below 1"
        )
    rest = sum(length for share, length in zip(shares, lengths, strict=True) if share is None)
    return [
        (1 - given) * length / rest if share is None else share for share, length in zip(shares, lengths, strict=True)
    ]
