import pickle
import shutil
import zlib

import numpy as np
import pytest

from mlc.data import reader as reader_module
from mlc.data.dataset import EvalDataset, TrainDataset
from mlc.data.reader import FolderReader, TarReader
from mlc.data.sources import open_split
from mlc.data.transforms import EvalTransform, TrainTransform
from shards.console import UserError
from shards.dataset import load_dataset
from shards.image import BadImage


@pytest.fixture
def index(shards):
    return open_split(load_dataset(shards), "train")


def test_bytes_are_those_of_the_files(index, demo_csv):
    reader = TarReader(index)
    for row in range(len(reader)):
        data = reader.read(row)
        assert data == (demo_csv / "images" / reader.image_id(row)).read_bytes()
        assert zlib.crc32(data) == index.crc32[row]


def test_few_files_stay_open_and_nothing_travels_with_a_pickle(index, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_FILES", 1)
    reader = TarReader(index)
    first = [reader.read(row) for row in range(len(reader))]
    assert len(set(index.shard.tolist())) > 1 and len(reader._files) == 1
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._files and len(pickle.dumps(reader)) < 2000
    assert [copy.read(row) for row in range(len(copy))] == first


def test_what_cannot_be_read_says_why(shards, tmp_path):
    broken = shutil.copytree(shards, tmp_path / "shards")
    index = open_split(load_dataset(broken), "train")
    path, row = index.shard_path(0), int(np.flatnonzero(index.shard == 0)[-1])
    data = path.read_bytes()
    path.write_bytes(data[: int(index.offset[row]) + 10])
    with pytest.raises(BadImage, match="the shard ends inside this image; it is truncated"):
        TarReader(index).read(row)
    path.unlink()
    with pytest.raises(BadImage, match=r"cannot be read \(No such file"):
        TarReader(index).read(row)
    path.write_bytes(data[:-20000] + b"?" * 20000)
    with pytest.raises(BadImage, match="crc32 is not the index's"):
        TarReader(index).read(row)
    assert len(TarReader(index, check_crc=False).read(row)) == index.size[row]


@pytest.mark.parametrize("column, value", [("offset", -5), ("offset", 1 << 62), ("size", -1), ("size", 1 << 62)])
def test_a_damaged_index_is_a_bad_image_and_no_crash(index, column, value):
    reader = TarReader(index)
    values = getattr(index, column).copy()
    values[3] = value
    setattr(index, column, values)
    with pytest.raises(BadImage):
        reader.read(3)
    reader.read(4)


def test_training_batch_follows_the_contract(index):
    data = TrainDataset.of(index, TrainTransform(size=24), seed=1)
    batch = data.__getitems__([5, 6, 7, 8])
    assert batch["image"].shape == (4, 3, 24, 24) and batch["image"].dtype.is_floating_point is False
    assert batch["position"].tolist() == [5, 6, 7, 8] and batch["valid"].all()
    assert np.array_equal(batch["target"].numpy(), index.targets(batch["row"].numpy()))
    assert batch["bad"].shape == (0,) and batch["bad"].dtype == batch["position"].dtype


def test_padding_rows_are_blank_and_invalid(index):
    batch = EvalDataset(TarReader(index), EvalTransform(size=24)).__getitems__([3, -1])
    assert batch["valid"].tolist() == [True, False] and batch["row"].tolist() == [3, -1]
    assert batch["image"][0].any() and not batch["image"][1].any()


def test_a_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in it"):
        FolderReader(tmp_path)


def test_images_of_a_folder_a_file_or_a_glob(tmp_path):
    """What a system left behind, and folders with the name of an image, are no images."""
    hidden = ["._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/b.jpg", "@eaDir/a.jpg/thumb.jpg"]
    for name in ["a.jpg", "b/a.PNG", "b.jpg/c.jpg", "c[1].jpg", "notes.txt", *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert FolderReader(tmp_path).names == ["a.jpg", "b.jpg/c.jpg", "b/a.PNG", "c[1].jpg"]
    assert FolderReader(tmp_path / "c[1].jpg").names == ["c[1].jpg"]
    some = FolderReader(f"{tmp_path}/b*")
    assert (some.folder, some.names, some.read(1)) == (tmp_path, ["b.jpg/c.jpg", "b/a.PNG"], b"b/a.PNG")
    for nothing in ("*.webp", "nowhere/*.jpg"):
        with pytest.raises(UserError, match="no images in it"):
            FolderReader(tmp_path / nothing)
