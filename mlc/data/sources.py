"""What a run reads: its data sets, the rows of each that take part, how often they come, and where the bytes are.

`--data A --data B:0.3 --fold 2 --where ... --sampler ...` becomes a `Sampler` (position -> data set, row), one reader
per data set, and the rows to validate on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlc.config import Config
from mlc.data.features import Features
from mlc.data.filters import named, read_names, select_rows
from mlc.data.overlay import Overlay, is_overlay, open_overlay
from mlc.data.prediction_files import aligned, is_prediction_file
from mlc.data.reader import TarReader, check_shards
from mlc.data.remote import open_reader
from mlc.data.sampler import Rows, Sampler, parse_data, parse_oversample, parse_shuffle, source_seed
from mlc.data.soft_labels import SoftLabels
from mlc.data.truth import filled_index, labelled_index
from shards.console import UserError, few
from shards.dataset import Dataset, Index, load_dataset

LISTED = 12  # classes named in a line of the log


@dataclass(frozen=True)
class Sources:
    """`dataset` is the first of `--data`, whose classes are those of all; `readers` has one per data set."""

    dataset: Dataset
    split: str  # to train on
    sampler: Sampler
    readers: Sequence[TarReader]
    fingerprint: str
    natural: np.ndarray  # float64 [C]: share of the rows that have each class
    soft: SoftLabels | None = None  # of the prediction files among --kd-teacher
    features: Features | None = None  # of --features

    def identity(self) -> dict[str, str]:
        """What must be the same for the stream of samples to go on: the data, and which of it comes how often."""
        features = {"features": self.features.fingerprint} if self.features else {}
        return {
            "data set": self.fingerprint,
            "training split": self.split,
            "samples": self.sampler.fingerprint,
            **features,
        }

    def cooccurrence(self) -> np.ndarray:
        """int64 [C, C]: rows that take part and have class i and class j; on the diagonal those that have class i."""
        return sum(rows.cooccurrence() for rows in self.sampler.sources)

    def describe(self) -> Iterator[str]:
        """Lines for the log: the data sets where there are several, and what a sample of the stream is like."""
        sources, shares = self.sampler.sources, self.sampler.shares
        if len(sources) > 1:
            for rows, share in zip(sources, shares, strict=True):
                yield f"data {rows.index.name}: {len(rows)} samples, {share:.1%} of the stream"
        expected = self.sampler.expected_frequencies()
        yield "expected class frequencies: " + _frequencies(self.dataset.classes, expected, self.natural)
        never = [name for name, share in zip(self.dataset.classes, self.natural, strict=True) if not share]
        if never:
            yield f"no sample has {few(never, LISTED)}: nothing is learnt of it"


def open_sources(config: Config) -> Sources:
    """The training side of the data flags. Raises UserError naming the flag or the file."""
    if not config.data or not all(config.data):
        raise UserError("--data DIR is missing: the folder that `mlc pack` made")
    parsed = [parse_data(text) for text in config.data]
    if is_overlay(parsed[0][0]):
        raise UserError(f"--data {parsed[0][0]}: pseudo-labels come after the data set with the true ones")
    plain = [load_dataset(path, cache_dir=config.cache_dir) for path, _ in parsed if not is_overlay(path)]
    first, left = plain[0], iter(plain)
    opened = [
        open_overlay(path, plain, cache_dir=config.cache_dir) if is_overlay(path) else next(left) for path, _ in parsed
    ]
    datasets = [found.dataset if isinstance(found, Overlay) else found for found in opened]
    for (path, _), dataset in zip(parsed, datasets, strict=True):
        if dataset.classes != first.classes:
            odd = sorted(set(dataset.classes) ^ set(first.classes))
            raise UserError(
                f"--data {path} has other classes than {parsed[0][0]}"
                + (f", such as {odd[0]!r}" if odd else " (the same names in another order)")
                + "; pack both with the same --classes FILE"
            )
    splits = [
        found if isinstance(found, Overlay) else open_split(found, config.train_split, labelled=True)
        for found in opened
    ]
    rows = _kept(config, first, splits)
    common = {
        "sampler": config.sampler,
        "block": parse_shuffle(config.shuffle),
        "repeats": parse_oversample(config.oversample, first),
    }
    mined = {"hard": config.hard_mining, "hardness": _hardness(config, splits[0], first.classes)}
    parts = [
        Rows(index, source_seed(config.seed, number), rows=own, **common, **(mined if number == 0 else {}))
        for number, (index, own) in enumerate(zip(splits, rows, strict=True))
    ]
    sampler = Sampler(parts, [share for _, share in parsed], config.seed)
    counts = sum(_class_counts(index, own) for index, own in zip(splits, rows, strict=True))
    files = [name for name in config.kd_teacher if is_prediction_file(name)]
    total = sum(len(index) if own is None else len(own) for index, own in zip(splits, rows, strict=True))
    return Sources(
        dataset=first,
        split=config.train_split,
        sampler=sampler,
        readers=[_reader(config, index) for index in splits],
        fingerprint="+".join(found.fingerprint for found in opened),
        natural=counts / total,
        soft=SoftLabels(files, parts, first.classes) if files else None,
        features=Features(config.features, first, config.train_split, splits[0], rows[0]) if config.features else None,
    )


def open_validation(config: Config, dataset: Dataset) -> tuple[TarReader, np.ndarray] | None:
    """(reader, row numbers int64 [n]) of `--val-split`, or of the training split's `--fold`; None without either."""
    if config.fold is not None:
        index = open_split(dataset, config.train_split, labelled=True)
        return _reader(config, index), select_rows(index, dataset.classes, fold=config.fold)
    if not config.val_split:
        return None
    index = open_split(dataset, config.val_split, labelled=True)
    return _reader(config, index), np.arange(len(index))


def validation_features(
    config: Config, dataset: Dataset, validation: tuple[TarReader, np.ndarray] | None
) -> Features | None:
    """`--features` of what `open_validation` has found; None without either. Raises UserError."""
    if not config.features or validation is None:
        return None
    split = config.val_split if config.fold is None else config.train_split
    return Features(config.features, dataset, split, validation[0].index, validation[1])


def open_split(dataset: Dataset, split: str, *, labelled: bool = False) -> Index:
    """The index of a split that is not empty, whose tars are there and, where asked for, which has labels."""
    index = labelled_index(dataset, split) if labelled else filled_index(dataset, split)
    check_shards(dataset, split)
    return index


def _reader(config: Config, index: Index) -> TarReader:
    return open_reader(index, cache_dir=config.cache_dir, cache_gb=config.cache_gb, check_crc=config.check_crc)


def _kept(config: Config, dataset: Dataset, splits: Sequence[Index]) -> list[np.ndarray | None]:
    """The rows of each data set that pass `--where`, `--fold` and `--drop-rows`; None for all.

    A data set beside the first that has no folds takes part whole: pseudo-labels, another collection.
    """
    drop = None
    if config.drop_rows:
        names = read_names(Path(config.drop_rows), dataset.columns.image_id)
        drop = [named(index, names) for index in splits]
        if names and not any(hits.any() for hits in drop):
            raise UserError(
                f"--drop-rows {config.drop_rows}: none of its {len(names)} names, such as {names[0]!r}, is an image id "
                f"or a key of the split {config.train_split!r}"
            )
    kept = []
    for number, index in enumerate(splits):
        folded = number == 0 or bool((index.fold >= 0).any())
        rows = select_rows(
            index,
            dataset.classes,
            where=config.where,
            without_fold=config.fold if folded else None,
            drop=None if drop is None else drop[number],
        )
        kept.append(rows)
    return kept


def _hardness(config: Config, index: Index, classes: Sequence[str]) -> np.ndarray | None:
    """float64 [n]: the mean binary cross-entropy of each row's predictions in --hard-list."""
    if not config.hard_list:
        return None
    likely = np.clip(aligned(config.hard_list, index, classes).astype(np.float64), 1e-7, 1 - 1e-7)
    given = index.targets(np.arange(len(index))) > 0.5
    return -np.log(np.where(given, likely, 1 - likely)).mean(1)


def _class_counts(index: Index, rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return index.class_counts()
    return np.bincount(index.labels_of(rows)[0], minlength=index.num_classes)


def _frequencies(classes: Sequence[str], expected: np.ndarray, natural: np.ndarray) -> str:
    """`cat 30.1 %, dog 2.2 % (data 0.4 %)`; of many classes the commonest and the rarest."""
    order = np.argsort(-expected, kind="stable").tolist()
    parts = [
        f"{classes[c]} {_percent(expected[c])}"
        + ("" if np.isclose(expected[c], natural[c], rtol=0.02) else f" (data {_percent(natural[c])})")
        for c in order
    ]
    if len(parts) > 2 * LISTED:
        parts = [*parts[:LISTED], f"... {len(parts) - 2 * LISTED} more ...", *parts[-LISTED:]]
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
