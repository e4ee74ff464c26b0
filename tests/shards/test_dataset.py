"""The opened data set: columns, multi-hot targets, pickling, and clear words for what is damaged."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from packing import opened, pack_raw, write_raw

from shards.console import UserError
from shards.dataset import SCHEMA, Dataset, Shard, Split, load_dataset, open_index, write_dataset, write_index


def make(folder, labels, classes=7):
    """A data set of these label sets, without tars."""
    rows = len(labels)
    folder.mkdir(exist_ok=True)
    write_index(
        folder / "train.arrow",
        {
            "key": [str(row) for row in range(rows)],
            "image_id": [f"{row}.jpg" for row in range(rows)],
            "shard": [row // 10 for row in range(rows)],
            "offset": [512 * row for row in range(rows)],
            "size": [9] * rows,
            "ext": ["jpg"] * rows,
            "labels": labels,
            "caption": [f"c{row}" for row in range(rows)],
            "fold": [-1] * rows,
            "weight": [1.0] * rows,
            "crc32": [2**32 - 1] * rows,
        },
    )
    shards = tuple(Shard(f"train-{number:06d}.tar", 10, 1, "ab") for number in range(-(-rows // 10)))
    dataset = Dataset(
        folder,
        tuple("abcdefg"[:classes]),
        {"vowels": ("a", "e")},
        0,
        {"train": Split("train", "train.arrow", rows, shards)},
    )
    write_dataset(dataset)
    return dataset


def test_dataset_json_round_trip(tmp_path):
    dataset = make(tmp_path, [[0], [1, 2], []])
    assert load_dataset(tmp_path) == dataset
    assert load_dataset(str(tmp_path)).fingerprint == dataset.fingerprint


def test_targets_and_counts_against_a_loop(tmp_path):
    rng = np.random.RandomState(0)
    labels = [sorted(rng.choice(7, rng.randint(0, 6), replace=False).tolist()) for _ in range(200)]
    index = open_index(make(tmp_path, labels), "train")
    rows = rng.randint(0, 200, 64)
    expected = np.zeros((64, 7), np.float32)
    for place, row in enumerate(rows):
        for column in labels[row]:
            expected[place, column] = 1
    targets = index.targets(rows)
    assert targets.dtype == np.float32
    assert np.array_equal(targets, expected)
    assert [index.labels(row).tolist() for row in range(200)] == labels
    assert index.class_counts().tolist() == [sum(column in row for row in labels) for column in range(7)]
    assert index.class_counts().dtype == np.int64
    assert index.labels_per_row().tolist() == [len(row) for row in labels]
    assert index.targets([]).shape == (0, 7)


def test_columns_are_views_of_the_mapped_file(tmp_path):
    index = open_index(make(tmp_path, [[1]] * 30), "train")
    dtypes = {
        "shard": np.int32,
        "offset": np.int64,
        "size": np.int64,
        "fold": np.int16,
        "weight": np.float32,
        "crc32": np.uint32,
    }
    for name, dtype in dtypes.items():
        column = getattr(index, name)
        assert (column.dtype, column.shape, column.flags.owndata) == (dtype, (30,), False)
    assert (index.key(np.int64(3)), index.image_id(3), index.caption(3), index.ext(3)) == ("3", "3.jpg", "c3", "jpg")
    assert index.shard_path(int(index.shard[25])) == tmp_path / "train-000002.tar"
    assert pa.total_allocated_bytes() < 10_000


def test_pickle_is_a_path_whatever_was_read_before(tmp_path):
    index = open_index(make(tmp_path, [[1]] * 1000), "train")
    fresh = len(pickle.dumps(index))
    index.targets(range(1000))
    _ = index.offset, index.crc32
    # It carries the name, size and checksum of each of its 100 shards, and nothing per row.
    assert len(pickle.dumps(index)) == fresh < 1000 + 50 * len(index.shards)
    again = pickle.loads(pickle.dumps(index))
    assert len(again) == 1000
    assert np.array_equal(again.targets(range(1000)), index.targets(range(1000)))


def test_a_split_without_labels(tmp_path):
    index = open_index(make(tmp_path, [None] * 4), "train")
    assert not index.has_labels
    assert index.labels(2).tolist() == []
    assert index.class_counts().tolist() == [0] * 7
    assert open_index(make(tmp_path / "empty", [[]] * 4), "train").has_labels


def test_fingerprint_follows_data_and_classes(tmp_path):
    raw = write_raw(tmp_path / "raw")
    prints = []
    for name, flags in {"a": (), "b": ("--shard-size", "5"), "c": ("--resize", "8")}.items():
        pack_raw(raw, tmp_path / name, *flags)
        prints.append(load_dataset(tmp_path / name).fingerprint)
    (raw / "classes.yaml").write_text("classes: [0, 1, 2, 3, 4, 5]")
    pack_raw(raw, tmp_path / "d")
    prints.append(load_dataset(tmp_path / "d").fingerprint)
    assert len(set(prints)) == 4
    (tmp_path / "a").rename(tmp_path / "moved")
    assert load_dataset(tmp_path / "moved").fingerprint == prints[0]
    assert len(prints[0]) == 16
    assert len(opened(tmp_path / "moved")) == 12


def test_unknown_split(tmp_path):
    dataset = make(tmp_path, [[0]])
    with pytest.raises(UserError, match=r"no split 'trian'; it has: train; did you mean train"):
        dataset.split("trian")
    with pytest.raises(UserError, match="no split"):
        open_index(dataset, "val")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(format="other"), "is not a packed data set"),
        (lambda data: data.update(version=2), "2"),
        (lambda data: data.pop("classes"), "is incomplete"),
        (lambda data: data["splits"].update(train=3), "is incomplete"),
    ],
)
def test_other_dataset_json(tmp_path, change, says):
    make(tmp_path, [[0]])
    data = json.loads((tmp_path / "dataset.json").read_text())
    change(data)
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=says):
        load_dataset(tmp_path)


def test_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no data set at"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        load_dataset(tmp_path)


def test_damaged_index(tmp_path):
    dataset = make(tmp_path, [[0]] * 50)
    path = tmp_path / "train.arrow"
    data = path.read_bytes()
    path.write_bytes(data[:-50])
    with pytest.raises(UserError, match="is damaged"):
        open_index(dataset, "train")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_index(dataset, "train")
    make(tmp_path, [[0]] * 49)
    with pytest.raises(UserError, match="does not belong"):
        open_index(dataset, "train")


def test_the_schema_is_the_contract(tmp_path):
    make(tmp_path, [[0]])
    read = pa.ipc.open_file(tmp_path / "train.arrow")
    assert read.num_record_batches == 1
    assert read.schema == SCHEMA
    assert [f"{field.name}:{field.type}" for field in read.schema] == [
        "key:large_string",
        "image_id:large_string",
        "shard:int32",
        "offset:int64",
        "size:int64",
        "ext:string",
        "labels:large_list<item: int32>",
        "caption:large_string",
        "fold:int16",
        "weight:float",
        "crc32:uint32",
    ]
