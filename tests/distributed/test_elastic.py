"""The promise of the data path: however a run is divided and cut, the same images come, seen the same way.

No launcher is needed to see that: a rank is only a number, so all ranks of all worlds are read here, through real
worker processes, and compared with one uninterrupted reading.
"""

import itertools
import shutil
import zlib

import faults
import numpy as np
import pytest
import torch
from conftest import TINY, run

from mlc.data.dataset import TrainDataset
from mlc.data.loader import load, plan_batches, train_positions
from mlc.data.reader import TarReader
from mlc.data.sampler import Rows, Sampler, source_seed
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform
from shards.dataset import load_dataset

GLOBAL = 144  # every world size from 1 to 4 times every accumulation from 1 to 4 divides it
STEPS = 24
SEED = 11
WORLDS, WORKERS, ACCUMULATIONS, LENGTHS = (1, 2, 3, 4), (0, 1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
Sample = tuple[int, str, int]  # position, key, crc32 of the augmented pixels


def divisions() -> list[tuple[int, int, int, int]]:
    """(world, workers, accumulation, steps until the next cut): every value with every value of each other axis."""
    axes = (WORLDS, WORKERS, ACCUMULATIONS, LENGTHS)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(range(4), 2) for x, y in itertools.product(axes[a], axes[b])
    }
    chosen = []
    while missing:
        best = max(itertools.product(*axes), key=lambda row: len(missing & set(pairs(row))))
        missing -= set(pairs(best))
        chosen.append(best)
    return chosen


def pairs(row):
    return itertools.combinations(enumerate(row), 2)


@pytest.fixture(scope="module", params=["plain", "mixed"])
def stream(request, shards, tmp_path_factory) -> TrainDataset:
    """Small pictures, every augmentation, and three bad samples, so that neighbours stand in.

    `mixed`: two data sets, weighted sampling, a repeated class, shuffled in blocks, without one fold.
    """
    out = shutil.copytree(shards, tmp_path_factory.mktemp("elastic") / "shards")
    faults.flip_image(out, 3, 40, 41)
    transform = TrainTransform(size=16, vflip=0.5, aa="rand-m9-mstd0.5-inc1")
    index = open_split(load_dataset(out), "train")
    if request.param == "plain":
        return TrainDataset.of(index, transform, SEED)
    other = open_split(load_dataset(out), "val")
    rows = np.flatnonzero(np.arange(len(index)) % 5 != 1)
    parts = [
        Rows(index, SEED, rows=rows, sampler="log-freq", block=8, repeats={0: 3}),
        Rows(other, source_seed(SEED, 1), sampler="class-balanced"),
    ]
    return TrainDataset(Sampler(parts, [None, 0.3], SEED), [TarReader(index), TarReader(other)], transform, SEED)


def samples(stream, batch) -> list[Sample]:
    crcs = [zlib.crc32(image.tobytes()) for image in batch["image"].numpy()]
    places = zip(batch["source"].tolist(), batch["row"].tolist(), strict=True)
    keys = [stream.readers[source].index.key(row) for source, row in places]
    return list(zip(batch["position"].tolist(), keys, crcs, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(stream) -> list[list[Sample]]:
    """The global batches as they come without ranks, workers or micro-batches."""
    return [
        samples(stream, stream.__getitems__(range(start, start + GLOBAL))) for start in range(0, STEPS * GLOBAL, GLOBAL)
    ]


def read(stream, first_step: int, steps: int, world: int, workers: int, accumulation: int) -> list[list[Sample]]:
    """Those global batches, read by all ranks of a world that resumes at `first_step`, each in order of position."""
    plan = plan_batches(GLOBAL, GLOBAL // (world * accumulation), world, together=1)
    assert plan.accumulation == accumulation
    batches: list[list[Sample]] = [[] for _ in range(steps)]
    for rank in range(world):
        positions = train_positions(first_step * GLOBAL, (first_step + steps) * GLOBAL, plan, rank)
        loader = load(stream, positions, workers=workers, device=torch.device("cpu"))
        for number, batch in enumerate(loader):
            batches[number // accumulation] += samples(stream, batch)
    return [sorted(batch) for batch in batches]


def test_the_same_pixels_whatever_the_division(stream, uninterrupted):
    """One run that is cut again and again, and goes on in another division each time."""
    step = 0
    for world, workers, accumulation, steps in divisions():
        steps = min(steps, STEPS - step)
        found = read(stream, step, steps, world, workers, accumulation)
        assert found == uninterrupted[step : step + steps], f"{world=} {workers=} {accumulation=} from step {step}"
        step = (step + steps) % (STEPS - 3)
    seen = {sample[1] for batch in uninterrupted for sample in batch}
    index, other = stream.readers[0].index, [reader.index for reader in stream.readers[1:]]
    left_out = {index.key(row) for row in (3, 40, 41)}
    if other:
        left_out |= {index.key(row) for row in range(len(index)) if row % 5 == 1}
    every = {key for one in (index, *other) for key in one.batch.column("key").to_pylist()}
    assert len(uninterrupted) * GLOBAL > 20 * len(index)  # many ends of an epoch were crossed
    assert seen == every - left_out


def test_the_divisions_are_all_pairs():
    found = {pair for row in divisions() for pair in pairs(row)}
    axes = (WORLDS, WORKERS, ACCUMULATIONS, LENGTHS)
    assert len(found) == sum(len(a) * len(b) for a, b in itertools.combinations(axes, 2))
    assert len(divisions()) < 30


def test_bad_samples_are_the_same_for_every_division(stream):
    """What the ranks of any world report adds up to the same set, so that all of them stop at the same step."""
    expected = {stream.problem(p) for p in stream.__getitems__(range(2 * GLOBAL))["bad"].tolist()}
    mixed = len(stream.readers) > 1  # some bad rows are left out, others not yet drawn
    assert 1 <= len(expected) <= 2 if mixed else len(expected) == 3
    for world, workers, accumulation in ((1, 0, 1), (2, 1, 3), (4, 2, 2)):
        plan = plan_batches(GLOBAL, GLOBAL // (world * accumulation), world, together=1)
        found = set()
        for rank in range(world):
            positions = train_positions(0, 2 * GLOBAL, plan, rank)
            for batch in load(stream, positions, workers=workers, device=torch.device("cpu")):
                found |= {stream.problem(p) for p in batch["bad"].tolist()}
        assert found == expected


@pytest.mark.distributed
def test_two_processes_stop_together_when_too_much_is_bad(shards, tmp_path):
    """One process meets the damage, both say so and end: nobody waits in a collective."""
    out = shutil.copytree(shards, tmp_path / "shards")
    faults.flip_image(out, *range(0, 100, 9))
    args = [
        "train.py",
        "--data",
        str(out),
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        *TINY,
        "-b",
        "4",
        "-j",
        "1",
    ]
    done = run(*args, "--max-steps", "30", "--val-split", "", "--max-bad-samples", "2", processes=2, check=False)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("--max-bad-samples allows 2") == 2
    first = [line for line in said.splitlines() if "bad samples, --max-bad-samples" in line]
    assert first[0].split("error: ")[1] == first[1].split("error: ")[1]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.distributed
def test_two_processes_count_bad_samples_once(shards, tmp_path):
    out = shutil.copytree(shards, tmp_path / "shards")
    faults.flip_image(out, 3, 40)
    index = open_split(load_dataset(out), "val")
    faults.change_bytes(index.shard_path(0), int(index.offset[2]) + 50, b"\0\xff\0")
    args = [
        "train.py",
        "--data",
        str(out),
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        *TINY,
        "-b",
        "8",
        "-j",
        "1",
    ]
    done = run(*args, "--epochs", "2", "--eval-every", "1ep", processes=2)
    said = done.stdout + done.stderr
    names = [line.split()[2] for line in said.splitlines() if "bad sample " in line]
    index = open_split(load_dataset(out), "train")
    assert sorted(name for name in names if "train-" in name) == [
        f"train-{shard:06d}.tar:{index.key(row)}:" for shard, row in ((0, 3), (1, 40))
    ]
    assert sum("val-" in name for name in names) == 1
