"""How long until a resumed run has its first batch, at the start, in the middle and at the end of an epoch?

Every loader is made anew with two workers, put where the run was, and asked for one batch of 64 pictures of 256 x 256.
`accelerate.skip_first_batches` and torchdata's StatefulDataLoader stand over two kinds of data: the webdataset pipeline
that reads tars in order, and our own reader as a data set that is asked for samples by number, which the tars alone do
not offer. StatefulDataLoader gets the state that it gave at that place of an epoch. Before that, each batch is compared
with the one an uninterrupted epoch has there, wherever the order is deterministic. Without torchdata it is left out.
"""

import importlib.util
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import accelerate
import common
import numpy as np
import torch
import webdataset
from loader import TORCHVISION, Data, big_pictures, write
from torch.utils.data import DataLoader, RandomSampler

from mlc.data.dataset import TrainDataset
from mlc.data.loader import load, plan_batches, train_positions
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform
from shards.dataset import load_dataset
from shards.image import packed_bytes

BATCH, SIZE, WORKERS = 64, 256, 2
PLACES = {"0 %": 0.0, "50 %": 0.5, "99 %": 0.99}


@dataclass(frozen=True)
class Candidate:
    """`start(batch number, state)` -> batches from there on; `watch(places)` -> the state at each of these numbers."""

    start: Callable[[int, dict | None], Iterable]
    watch: Callable[[list[int]], dict[int, dict]] | None = None


# ---- data sets -------------------------------------------------------------------------------------------------------


def stream(data: Data) -> TrainDataset:
    return TrainDataset.of(open_split(load_dataset(data.shards), "train"), TrainTransform(size=SIZE), seed=0)


class ByNumber:
    """Our reader behind the usual interface: `dataset[i]`, shuffled and batched by somebody else."""

    def __init__(self, data: Data):
        self._stream, self._count = stream(data), data.count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._stream.__getitems__([i])["image"][0]


def tars(data: Data) -> webdataset.WebDataset:
    shards = sorted(map(str, data.shards.glob("train-*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=False, seed=0).shuffle(1000, seed=0)
    return samples.decode("pilrgb").to_tuple("jpg").map_tuple(TORCHVISION).map(_only)


def _only(sample: tuple) -> torch.Tensor:
    return sample[0]


# ---- loaders ---------------------------------------------------------------------------------------------------------


def ours(data: Data, number: int, _) -> Iterable:
    plan = plan_batches(BATCH, BATCH, 1, together=1)
    positions = train_positions(number * BATCH, 10**9, plan, 0)
    return (batch["image"] for batch in load(stream(data), positions, workers=WORKERS, device=torch.device("cpu")))


def _loader(kind: type, make: Callable[[Data], object], data: Data):
    dataset = make(data)
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0)) if make is ByNumber else None
    return kind(dataset, BATCH, sampler=sampler, num_workers=WORKERS, drop_last=True)


def skipping(make: Callable[[Data], object], data: Data, number: int, _) -> Iterable:
    return accelerate.skip_first_batches(_loader(DataLoader, make, data), number)


def _stateful_loader(make: Callable[[Data], object], data: Data):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _loader(StatefulDataLoader, make, data)


def stateful(make: Callable[[Data], object], data: Data, _, state: dict | None) -> Iterable:
    loader = _stateful_loader(make, data)
    if state:
        loader.load_state_dict(state)
    return loader


def states(make: Callable[[Data], object], data: Data, numbers: list[int]) -> dict[int, dict]:
    """The states a run would have saved: one epoch read up to the last of the numbers."""
    loader, found = _stateful_loader(make, data), {}
    for done, _ in enumerate(loader, 1):
        if done in numbers:
            found[done] = loader.state_dict()
        if done >= max(numbers):
            break
    return found


def candidates(data: Data) -> dict[str, Candidate]:
    torchdata = importlib.util.find_spec("torchdata") is not None
    if not torchdata:
        print("StatefulDataLoader: torchdata is not installed, left out")
    found = {"mlc": Candidate(partial(ours, data))}
    for kind, make in (("by number", ByNumber), ("webdataset", tars)):
        found[f"skip_first_batches, {kind}"] = Candidate(partial(skipping, make, data))
        if torchdata:
            found[f"StatefulDataLoader, {kind}"] = Candidate(partial(stateful, make, data), partial(states, make, data))
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds(candidate: Candidate, number: int, state: dict | None) -> float:
    """From nothing to the first batch."""
    begin = time.perf_counter()
    batch = next(iter(candidate.start(number, state)))
    took = time.perf_counter() - begin
    assert tuple(batch.shape) == (BATCH, 3, SIZE, SIZE), batch.shape
    return took


def refuse_another_batch(data: Data, number: int) -> None:
    """Ours must be the batch that a run from the start has there, to the pixel."""
    resumed = next(iter(ours(data, number, None)))
    straight = next(itertools.islice(ours(data, number - 1, None), 1, None))
    if not np.array_equal(resumed, straight):
        raise SystemExit(f"batch {number} is another one after a resume")


def measure(data: Data, rounds: int) -> dict[str, dict[str, list[float]]]:
    batches = data.count // BATCH
    numbers = {place: int(share * batches) for place, share in PLACES.items()}
    refuse_another_batch(data, numbers["99 %"])
    turns = {}
    for name, candidate in candidates(data).items():
        known = candidate.watch([n for n in numbers.values() if n]) if candidate.watch else {}
        for place, number in numbers.items():
            turns[name, place] = partial(seconds, candidate, number, known.get(number))
    values = common.interleaved(turns, rounds)
    return {name: {place: values[name, place] for place in numbers} for name, _ in turns}


def main() -> int:
    args = common.arguments(__doc__, rounds=3).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    unique, count, rounds = (32, 1024, 1) if args.quick else (256, 12_800, args.rounds)
    pictures = [packed_bytes(p, resize=288, quality=92)[0] for p in big_pictures(unique)]
    with tempfile.TemporaryDirectory() as root:
        data = Data(Path(root), pictures, count)
        write(data)
        values = measure(data, rounds)
    versions = common.versions("torch", "accelerate", "torchdata", "webdataset")
    print(f"{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"{count} pictures of short side 288; seconds to the first batch; {common.rounds_said(rounds)}\n")
    rows = []
    for name, places in values.items():
        cells = [f"{median(v):.2f} ({common.spread(v):.0%})" for v in places.values()]
        rows.append([name, *cells, f"{median(places['99 %']) / median(places['0 %']):.1f} x"])
    print(common.table(["at this part of an epoch (spread)", *PLACES, "99 % / 0 %"], rows))
    common.write_json(args.json, versions=versions, seconds=values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
