"""Damage of every kind, done to real shards: one clear error before training, or a skip that is counted and named."""

import re
import shutil
import time

import faults
import numpy as np
import pytest
import torch
from conftest import TINY, log_of

from mlc import train
from mlc.data import dataset as dataset_module
from mlc.data.dataset import BadSamples, EvalDataset, TrainDataset
from mlc.data.order import AUGMENT, Draws, locate
from mlc.data.reader import FolderReader, TarReader
from mlc.data.sources import open_split
from mlc.data.transforms import EvalTransform, TrainTransform
from shards import index as index_verb
from shards.console import UserError, run
from shards.dataset import load_dataset

SEED = 3
TRANSFORM = TrainTransform(size=24)


@pytest.fixture
def out(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


@pytest.fixture
def foreign(shards, tmp_path):
    """Two tars of somebody else's."""
    (tmp_path / "tars").mkdir()
    for path in sorted(shards.glob("train-*.tar"))[:2]:
        shutil.copy(path, tmp_path / "tars")
    return tmp_path / "tars"


def index_tars(tars) -> int:
    return run(index_verb.main, [str(tars / "train-*.tar"), "--out", str(tars), "-j", "1"])


def stream_of(folder, **options) -> TrainDataset:
    return TrainDataset.of(open_split(load_dataset(folder), "train"), TRANSFORM, SEED, **options)


def epoch(stream) -> dict[str, torch.Tensor]:
    return stream.__getitems__(range(len(stream.readers[0])))


# ---- before training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda out: faults.truncate(out, 45),
            r"train-000001.tar is truncated: \d+ bytes, dataset.json says \d+; copy",
        ),
        (lambda out: (out / "train-000001.tar").unlink(), r"train-000001.tar cannot be read \(No such file"),
        (lambda out: faults.append_samples(out, 1, 9), r"train-000001.tar has been replaced or grown since"),
    ],
)
def test_a_shard_that_cannot_be_the_indexed_one(out, damage, says):
    damage(out)
    with pytest.raises(UserError, match=rf"{says}.*mlc verify .* --repair"):
        open_split(load_dataset(out), "train")
    open_split(load_dataset(out), "val")


def test_several_such_shards_are_counted(out):
    for path in out.glob("train-*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"train-000000.tar .*\(and 2 more of 3 tars of 'train'\)"):
        open_split(load_dataset(out), "train")


@pytest.mark.parametrize(
    ("tangle", "says"),
    [
        (lambda members: [*members, members[0]], "sample '.*' are not next to each other, or the key is there twice"),
        (lambda members: [members[0], *members], "is there twice"),
        (lambda members: [members[0], members[3], *members[1:3], *members[4:]], "are not next to each other"),
    ],
)
def test_keys_that_come_twice_or_interleaved_are_not_indexed(foreign, capsys, tangle, says):
    faults.change_members(foreign / "train-000000.tar", tangle)
    assert index_tars(foreign) == 2
    said = capsys.readouterr().err
    assert "train-000000.tar" in said and re.search(says, said)


def test_a_key_in_two_tars_is_not_indexed(foreign, capsys):
    first = faults.members(foreign / "train-000000.tar")[:3]
    faults.change_members(foreign / "train-000001.tar", lambda members: [*members, *first])
    assert index_tars(foreign) == 2
    said = capsys.readouterr().err
    assert "1 keys are in two tars" in said and "train-000000.tar and in" in said


# ---- counted skips ---------------------------------------------------------------------------------------------------


def bad_rows(stream, batch) -> set[int]:
    return set(locate(batch["bad"].numpy(), len(stream.readers[0]), SEED)[1].tolist())


def check_neighbours(stream, bad: set[int], positions) -> None:
    """Against brute force: every position has the sample of the first position from there on that is not bad."""
    batch = stream.__getitems__(positions)
    n = len(stream.readers[0])
    for place, position in enumerate(batch["position"].tolist()):
        row = next(r for r in locate(np.arange(position, position + n), n, SEED)[1].tolist() if r not in bad)
        assert batch["row"][place] == row
        pixels = TRANSFORM(stream.readers[0].read(row), Draws(SEED, AUGMENT, position))
        assert np.array_equal(batch["image"][place].permute(1, 2, 0).numpy(), pixels)
    assert torch.equal(batch["target"], torch.from_numpy(stream.readers[0].index.targets(batch["row"].numpy())))


@pytest.mark.parametrize(
    ("damage", "rows", "says"),
    [
        (lambda out: faults.flip_image(out, 3, 40), {3, 40}, "crc32 is not the index's"),
        (lambda out: faults.swap_samples(out, 50), {50, 51}, "crc32 is not the index's"),
    ],
)
def test_bytes_that_are_not_the_indexed_ones(out, damage, rows, says):
    """A flipped bit; an index older than a shard that has kept its size."""
    damage(out)
    stream = stream_of(out)
    batch = epoch(stream)
    assert bad_rows(stream, batch) == rows
    for position in batch["bad"].tolist():
        row = int(locate(position, len(stream.readers[0]), SEED)[1])
        name, reason = stream.problem(position)
        assert name == f"train-{row // 40:06d}.tar:{stream.readers[0].index.key(row)}"
        assert says in reason
    check_neighbours(stream, rows, range(3 * len(stream.readers[0])))


def test_without_the_checksum_a_flipped_bit_goes_in(out):
    faults.flip_image(out, 3)
    for options, rows in ({}, {3}), ({"check_crc": False}, set()):
        stream = stream_of(out, **options)
        assert bad_rows(stream, epoch(stream)) == rows


@pytest.mark.parametrize("when", ["truncated", "gone"])
def test_a_shard_that_breaks_while_training(out, when):
    stream = stream_of(out)
    rows = set(range(77, 80)) if when == "truncated" else set(range(40, 80))
    if when == "truncated":
        faults.truncate(out, 77)
    else:
        (out / "train-000001.tar").unlink()
    batch = epoch(stream)
    assert bad_rows(stream, batch) <= rows and set(batch["row"].tolist()).isdisjoint(rows)
    says = "truncated" if when == "truncated" else "No such file"
    assert says in stream.problem(int(batch["bad"][0]))[1]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: b"", "the image is empty"),
        (lambda: b"not a picture", "not a picture"),
        (faults.jpeg_bomb, "decompression bombs"),
        (faults.png_bomb, "decompression bombs"),
        (lambda: faults.picture(1)[:-300], ""),
    ],
)
def test_images_that_were_bad_before_they_were_indexed(foreign, data, says):
    """Nothing but the decoder can find out; a bomb must not go off first."""
    path = foreign / "train-000001.tar"
    key = faults.members(path)[0][0].split(".")[0]
    faults.change_members(path, lambda members: faults.with_image(members, key, data()))
    assert index_tars(foreign) == 0
    stream = stream_of(foreign)
    begin = time.perf_counter()
    batch = epoch(stream)
    assert time.perf_counter() - begin < 3
    assert bad_rows(stream, batch) == {40}
    name, reason = stream.problem(int(batch["bad"][0]))
    assert name == f"train-000001.tar:{key}" and says in reason
    check_neighbours(stream, {40}, range(2 * len(stream.readers[0])))


@pytest.mark.parametrize("crop", ["rrc", "squish", "center"])
def test_a_very_long_image_is_an_image(foreign, crop):
    """20,000 x 300 pixels are odd, not damage."""
    path = foreign / "train-000000.tar"
    key = faults.members(path)[0][0].split(".")[0]
    faults.change_members(path, lambda members: faults.with_image(members, key, faults.long_image()))
    assert index_tars(foreign) == 0
    index = open_split(load_dataset(foreign), "train")
    stream = TrainDataset.of(index, TrainTransform(size=24, crop=crop), SEED)
    position = next(p for p in range(len(index)) if locate(p, len(index), SEED)[1] == 0)
    batch = stream.__getitems__([position])
    assert batch["row"].tolist() == [0] and not len(batch["bad"])
    assert batch["image"].shape == (1, 3, 24, 24) and batch["image"].float().std() > 1
    if crop != "rrc":
        assert EvalDataset(TarReader(index), EvalTransform(size=24, crop=crop)).__getitems__([0])["valid"].all()


def test_more_damage_than_the_budget_ends_in_a_black_image_and_is_told(out):
    """The worker does not search a dead disk for ever; the loop learns of more bad samples than it may accept."""
    stream = stream_of(out, max_bad=2)
    for path in out.glob("train-*.tar"):
        path.unlink()
    batch = stream.__getitems__([7])
    assert batch["bad"].tolist() == [7, 8, 9] and not batch["image"].any()
    with pytest.raises(UserError, match="3 bad samples, --max-bad-samples allows 2"):
        BadSamples(2).add(map(stream.problem, batch["bad"].tolist()))


def test_a_data_set_without_a_good_image_is_refused_at_once(foreign, monkeypatch):
    monkeypatch.setattr(dataset_module, "TRIES", 20)
    (foreign / "train-000001.tar").unlink()
    faults.change_members(
        foreign / "train-000000.tar", lambda members: faults.with_image(members[:3], members[0][0][:-4], b"")
    )
    assert index_tars(foreign) == 0
    with pytest.raises(
        UserError, match=r"no image of the training split can be read, from train-000000.tar:.*: the image is empty"
    ):
        stream_of(foreign).__getitems__([0])


def test_bad_samples_are_counted_once():
    bad = BadSamples(2)
    assert bad.add([("a.tar:1", "empty"), ("a.tar:1", "empty")]) == ["bad sample a.tar:1: empty; it is left out"]
    assert bad.add([("a.tar:1", "empty")]) == [] and len(bad) == 1
    assert len(bad.add([("a.tar:2", "cut")])) == 1
    again = BadSamples(2, bad.known)  # after a resume
    with pytest.raises(
        UserError, match=r"3 bad samples, --max-bad-samples allows 2(.|\n)*a.tar:1: empty\n.*\n  b.tar:9: odd"
    ):
        again.add([("b.tar:9", "odd")])


def test_evaluation_marks_what_it_could_not_read(out, tmp_path):
    faults.flip_image(out, 1)
    index = open_split(load_dataset(out), "train")
    data = EvalDataset(TarReader(index), EvalTransform(size=24))
    batch = data.__getitems__([0, 1, 2, -1])
    assert batch["valid"].tolist() == [True, False, True, False] and batch["row"].tolist() == [0, 1, 2, -1]
    assert not batch["image"][1].any()
    assert data.problem(1) == (f"train-000000.tar:{index.key(1)}", data.problem(1)[1]) and "crc32" in data.problem(1)[1]
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    folder = EvalDataset(FolderReader(tmp_path), EvalTransform(size=24))
    rows = [folder.reader.names.index(name) for name in ("a.jpg", "b.jpg")]
    assert not folder.__getitems__(rows)["valid"].any()
    assert "No such file" in folder.problem(rows[1])[1]


# ---- the story -------------------------------------------------------------------------------------------------------


def train_on(out, tmp_path, *more: str) -> int:
    steps = ("--max-steps", "20", "--log-interval", "1", "-b", "8", "--no-model-ema")
    return run(train.main, ["--data", str(out), "--output", str(tmp_path), "--experiment", "run", *TINY, *steps, *more])


def test_a_run_goes_on_and_names_what_it_skipped(out, tmp_path, capsys):
    """Two epochs, and the evaluations do not count: a bad sample that is met twice is one bad sample."""
    faults.flip_image(out, 3, 40)
    index = open_split(load_dataset(out), "train")
    assert train_on(out, tmp_path, "-j", "1", "--max-steps", "30", "--eval-every", "9ep") == 0
    said = "".join(capsys.readouterr())
    for row in (3, 40):
        name = f"bad sample train-{row // 40:06d}.tar:{index.key(row)}: its crc32 is not the index's"
        assert said.count(name) == 1
    counts = [line["data/bad_samples"] for line in log_of(tmp_path / "run") if "data/bad_samples" in line]
    assert counts[0] == 0 and counts[-1] == 2 and counts == sorted(counts)


def test_a_run_stops_when_it_is_too_much(out, tmp_path, capsys):
    faults.flip_image(out, *range(0, 60, 10))
    assert train_on(out, tmp_path, "-j", "0", "--max-bad-samples", "3", "--val-split", "") == 2
    said = capsys.readouterr().err
    assert "--max-bad-samples allows 3" in said and "train-000000.tar:" in said and "Traceback" not in said


def test_evaluation_leaves_bad_images_out(out, tmp_path, capsys):
    index = open_split(load_dataset(out), "val")
    path = index.shard_path(0)
    faults.change_bytes(path, int(index.offset[2]) + 50, b"\0\xff\0")
    assert train_on(out, tmp_path, "-j", "0", "--max-steps", "2", "--epochs", "1") == 0
    assert f"bad sample val-000000.tar:{index.key(2)}" in "".join(capsys.readouterr())
    values = [line for line in log_of(tmp_path / "run") if "val/loss" in line][-1]
    assert all(np.isfinite(value) for value in values.values() if isinstance(value, float))
    assert train_on(out, tmp_path / "strict", "-j", "0", "--max-steps", "2", "--max-bad-samples", "0") == 2
    assert "1 bad sample, --max-bad-samples allows 0" in capsys.readouterr().err
