"""The shards as the stock readers see them: webdataset, timm and open_clip themselves, without a flag of theirs."""

import functools
import json
import sys
import types

import numpy as np
import pytest
import webdataset
from packing import encoded, opened, pack_raw, picture, tree, write_raw, write_table
from PIL import Image

from shards import tar
from shards.dataset import load_dataset

MODES = {
    "rgb.jpg": encoded(picture(1)),
    "grey.jpg": encoded(picture(2, mode="L")),
    "cmyk.jpg": encoded(picture(3, mode="CMYK")),
    "palette.png": encoded(picture(4, mode="P"), "PNG"),
    "alpha.png": encoded(picture(5, mode="RGBA"), "PNG"),
    "web.webp": encoded(picture(6), "WEBP"),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Train and test splits; the last six rows of train are of every picture mode."""
    folder = tmp_path_factory.mktemp("compat")
    raw = write_raw(folder / "raw", samples=20, test=5)
    with (raw / "train.csv").open("a") as file:
        for number, (name, data) in enumerate(MODES.items()):
            (raw / "images" / name).write_bytes(data)
            file.write(f"{name},{'4 ' if number % 2 else ''}{number % 4},mode {name}\n")
    assert pack_raw(raw, folder / "out", "--test-csv", raw / "test.csv", "--shard-size", "7") == 0
    return folder / "out"


def urls(out, split):
    return [str(out / shard.name) for shard in load_dataset(out).split(split).shards]


@pytest.mark.parametrize("split", ["train", "test"])
def test_webdataset(out, split):
    index = opened(out, split)
    samples = list(webdataset.WebDataset(urls(out, split), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [index.key(row) for row in range(len(index))]
    for row, sample in enumerate(samples):
        assert sample["json"]["image_id"] == index.image_id(row)
        assert sample["txt"] == index.caption(row)
        assert sample[index.ext(row)].size == (20, 16)
        assert sample["json"].get("columns", []) == index.labels(row).tolist()
        assert ("labels" in sample["json"]) == (split == "train")


def test_webdataset_writes_the_same_bytes(out, tmp_path):
    """Rewritten by webdataset's own writer with nothing but a fixed owner and time."""
    path = out / "train-000000.tar"
    data = path.read_bytes()
    with webdataset.TarWriter(str(tmp_path / "again.tar"), user="mlc", group="mlc", mode=0o644, mtime=0) as writer:
        for group in tar.groups(path):
            writer.write(
                {"__key__": group.key}
                | {ext: data[member.offset : member.offset + member.size] for ext, member in group.members.items()}
            )
    assert (tmp_path / "again.tar").read_bytes() == data


def test_timm_reads_an_image_and_its_first_class(out):
    from timm.data import create_dataset

    index = opened(out)
    labelled = [row for row in range(len(index)) if len(index.labels(row))]
    samples = list(create_dataset("wds/", root=str(out), split="train"))
    assert len(labelled) < len(index)  # there is a row without labels, which timm passes over
    assert [target for _, target in samples] == [index.labels(row)[0] for row in labelled]
    assert all(type(target) is int and image.mode == "RGB" and image.size == (20, 16) for image, target in samples)


def test_timm_reads_all_classes_by_name(out):
    pytest.importorskip("timm.data.readers.targets", reason="this timm reads one class per image")
    from timm.data import create_dataset

    index = opened(out)
    targets = [target for _, target in create_dataset("wds/", root=str(out), split="train", target_key="columns")]
    assert targets == [index.labels(row).tolist() for row in range(len(index))]


def test_timm_trains_by_the_sizes(out):
    from timm.data import create_dataset

    dataset = create_dataset("wds/", root=str(out), split="train", is_training=True, batch_size=4)
    assert len(dataset) == 28  # 26 rows, in whole batches
    samples = list(zip(range(20), dataset, strict=False))
    assert len(samples) == 20


def test_timm_says_that_a_split_has_no_labels(out):
    from timm.data import create_dataset

    with pytest.raises(ValueError, match="label"):
        list(create_dataset("wds/", root=str(out), split="test"))


@pytest.fixture
def open_clip_data(monkeypatch):
    pytest.importorskip("open_clip_train")
    if "pandas" not in sys.modules:  # open_clip asks for it at import, for its CSV reader alone
        monkeypatch.setitem(sys.modules, "pandas", types.ModuleType("pandas"))
    return pytest.importorskip("open_clip_train.data")


def test_open_clip_finds_the_sizes(out, open_clip_data):
    assert open_clip_data.get_dataset_size(str(out / "train-{000000..000003}.tar")) == (26, 4)
    assert open_clip_data.get_dataset_size(str(out / "test-000000.tar")) == (5, 1)


@pytest.mark.parametrize("is_train", [False, True])
def test_open_clip_reads_images_and_captions(out, open_clip_data, monkeypatch, is_train):
    # Its training pipeline dies at the end of any tar under webdataset >= 0.2.96: webdataset's issue 384, with its cure
    expand = functools.partial(open_clip_data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_data, "tar_file_expander", expand)
    shards = str(out / "train-{000000..000003}.tar")
    args = types.SimpleNamespace(
        train_data=shards,
        val_data=shards,
        train_num_samples=None,
        val_num_samples=None,
        batch_size=2,
        seed=0,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        workers=0,
        world_size=1,
    )
    data = open_clip_data.get_wds_dataset(
        args, lambda image: np.asarray(image).mean(), is_train=is_train, tokenizer=lambda text: [text]
    )
    captions = [caption for _, batch in data.dataloader for caption in batch]
    index = opened(out)
    assert sorted(captions) == sorted(index.caption(row) for row in range(len(index)))


def test_sizes_json(out):
    """open_clip's documented layout: samples by the name of the tar."""
    sizes = json.loads((out / "sizes.json").read_text())
    counted = {path.name: len(list(tar.groups(path))) for path in out.glob("*.tar")}
    assert sizes == counted


def test_modes_survive_unchanged(out):
    samples = list(webdataset.WebDataset(urls(out, "train"), shardshuffle=False))
    packed = {json.loads(sample["json"])["image_id"]: sample for sample in samples}
    for name, data in MODES.items():
        assert packed[name][name.partition(".")[2]] == data


def test_long_and_foreign_names_need_no_extra_headers(tmp_path):
    names = ["x" * 150 + ".jpg", "größe 北京.jpg", "a.b.c.jpg"]
    (tmp_path / "raw" / "images").mkdir(parents=True)
    for number, name in enumerate(names):
        (tmp_path / "raw" / "images" / name).write_bytes(encoded(picture(number)))
    write_table(tmp_path / "raw" / "train.csv", ["ImageID", "Labels"], [[name, "1"] for name in names])
    assert pack_raw(tmp_path / "raw", tmp_path / "out") == 0
    data = (tmp_path / "out" / "train-000000.tar").read_bytes()
    index = opened(tmp_path / "out")
    headers = [data[offset - 512 : offset] for offset in index.offset]
    assert all(header[156:157] == b"0" and header[257:263] == b"ustar\0" for header in headers)
    samples = list(webdataset.WebDataset(urls(tmp_path / "out", "train"), shardshuffle=False).decode("pil"))
    assert [sample["json"]["image_id"] for sample in samples] == names
    assert all(isinstance(sample["jpg"], Image.Image) for sample in samples)
    assert len(tree(tmp_path / "out")) == 6
