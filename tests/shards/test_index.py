"""Tars of other people: indexed where they lie, against the same samples packed by us, and refused where unclear."""

import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
import webdataset
from packing import encoded, image_bytes, opened, pack_raw, picture, tree, write_raw

from mlc.data.filters import matches
from shards import index as verb
from shards import verify
from shards.console import run
from shards.dataset import load_dataset
from shards.repair import survey


def index_tars(out, *argv) -> int:
    return run(verb.main, [*map(str, argv), "--out", str(out), "-j", "1"])


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def sample(number, **members):
    return {"__key__": f"s{number:03d}", "jpg": encoded(picture(number))} | members


def refused(capsys, out, *argv) -> str:
    capsys.readouterr()
    before = tree(out) if out.exists() else {}
    assert index_tars(out, *argv) == 2
    assert (tree(out) if out.exists() else {}) == before
    return capsys.readouterr().err


def test_our_own_shards_index_to_the_same(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=30, test=7)
    pack_raw(raw, tmp_path / "out", "--test-csv", raw / "test.csv", "--shard-size", "8")
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "out").glob("*.tar"):
        (tmp_path / "tars" / path.name).write_bytes(path.read_bytes())
    assert index_tars(tmp_path / "tars", tmp_path / "tars" / "train-{000000..000003}.tar") == 0
    assert index_tars(tmp_path / "tars", tmp_path / "tars" / "test-*.tar", "--split", "test") == 0
    assert load_dataset(tmp_path / "tars").fingerprint == load_dataset(tmp_path / "out").fingerprint
    for name in ("train.arrow", "test.arrow", "dataset.json"):
        assert (tmp_path / "tars" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_foreign_samples(tmp_path, capsys):
    """Folders in keys, JPEG and upper-case extensions, members nobody knows, other headers, other owners."""
    path = tmp_path / "a" / "shard.tar"
    path.parent.mkdir()
    images = [encoded(picture(number)) for number in range(3)]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [
            ("set/one.JPEG", images[0]),
            ("set/one.json", b'{"labels": ["sea"], "caption": "in json"}'),
            ("set/one.seg.bin", b"x"),
            ("set/two.json", b'{"labels": []}'),
            ("set/two.jpg", images[1]),
            ("set/" + "long" * 40 + ".jpg", images[2]),
            ("set/" + "long" * 40 + ".json", b'{"labels": ["sky", "sea"]}'),
            ("set/none.json", b"{}"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    before = path.read_bytes()
    assert index_tars(tmp_path / "out", path) == 0
    assert "1 samples without an image are left out" in capsys.readouterr().err
    dataset, index = load_dataset(tmp_path / "out"), opened(tmp_path / "out")
    assert dataset.classes == ("sea", "sky")
    assert dataset.split("train").shards[0].name == str(path)
    assert [image_bytes(index, row) for row in range(3)] == images
    assert [index.labels(row).tolist() for row in range(3)] == [[0], [], [0, 1]]
    assert (index.key(0), index.image_id(0), index.caption(0)) == ("set/one", "set/one", "in json")
    assert path.read_bytes() == before


def test_class_numbers_in_cls(tmp_path):
    path = write_tar(tmp_path / "x.tar", [sample(number, cls=str(number % 4)) for number in range(9)])
    assert index_tars(tmp_path, path) == 0
    assert load_dataset(tmp_path).classes == ("0", "1", "2", "3")
    assert load_dataset(tmp_path).split("train").shards[0].name == "x.tar"  # beside dataset.json: it may be moved
    assert opened(tmp_path).targets(range(9)).argmax(1).tolist() == [number % 4 for number in range(9)]


def test_columns_and_classes_from_a_file(tmp_path):
    path = write_tar(tmp_path / "x.tar", [sample(0, json={"labels": [2, 0]}), sample(1, json={"labels": ["b"]})])
    (tmp_path / "c.yaml").write_text("classes: [a, b, c]\ngroups: {g: [a, b]}")
    assert index_tars(tmp_path / "out", path, "--classes", tmp_path / "c.yaml") == 0
    assert opened(tmp_path / "out").targets([0, 1]).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert load_dataset(tmp_path / "out").groups == {"g": ("a", "b")}


def test_no_labels_at_all(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar", [sample(0), sample(1, txt="hello")])
    assert "no sample has labels" in refused(capsys, tmp_path / "out", path)
    (tmp_path / "c.yaml").write_text("classes: [a]")
    assert index_tars(tmp_path / "out", path, "--classes", tmp_path / "c.yaml", "--split", "test") == 0
    assert not opened(tmp_path / "out", "test").has_labels
    assert opened(tmp_path / "out", "test").caption(1) == "hello"


def test_a_second_split_has_the_classes_of_the_first(tmp_path, capsys):
    train = write_tar(tmp_path / "train.tar", [sample(0, json={"labels": ["b", "a"]})])
    val = write_tar(tmp_path / "val.tar", [sample(1, json={"labels": ["b"]})])
    odd = write_tar(tmp_path / "odd.tar", [sample(2, json={"labels": ["aa", "z"]})])
    assert index_tars(tmp_path / "out", train) == 0
    assert index_tars(tmp_path / "out", val, "--split", "val") == 0
    assert opened(tmp_path / "out", "val").labels(0).tolist() == [1]
    assert list(load_dataset(tmp_path / "out").splits) == ["train", "val"]
    said = refused(capsys, tmp_path / "out", odd, "--split", "odd")
    assert "2 labels do not fit" in said
    assert "'z' is none of the 2 classes" in said
    assert "has a split 'val' already" in refused(capsys, tmp_path / "out", val, "--split", "val")
    (tmp_path / "c.yaml").write_text("classes: [b, a]")
    assert "other classes" in refused(capsys, tmp_path / "out", odd, "--split", "odd", "--classes", tmp_path / "c.yaml")


def test_keys_that_come_twice_or_apart(tmp_path, capsys):
    labels = {"labels": ["a"]}
    one = write_tar(tmp_path / "1.tar", [sample(0, json=labels), sample(1, json=labels)])
    two = write_tar(tmp_path / "2.tar", [sample(1, json=labels)])
    said = refused(capsys, tmp_path / "out", one, two)
    assert "1 keys are in two tars" in said
    assert "'s001' is in" in said
    apart = write_tar(
        tmp_path / "3.tar", [{"__key__": "k", "jpg": encoded(picture())}, sample(1), {"__key__": "k", "json": labels}]
    )
    assert "sample 'k' are not next to each other" in refused(capsys, tmp_path / "out", apart)
    twice = write_tar(tmp_path / "4.tar", [{"__key__": "k", "jpg": b"x"}, {"__key__": "k", "jpg": b"y"}])
    assert "k.jpg is there twice" in refused(capsys, tmp_path / "out", twice)
    both = write_tar(tmp_path / "5.tar", [{"__key__": "k", "jpg": b"x", "webp": b"y"}])
    assert "has 2 images" in refused(capsys, tmp_path / "out", both)
    assert "is named twice" in refused(capsys, tmp_path / "out", one, one)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"json": b"{"}, "s000.json is not JSON"),
        ({"json": {"labels": "sea"}}, "must be a list"),
        ({"json": {"labels": [0.5]}}, "must be a list"),
        ({"json": {"labels": ["a", "a"]}}, "twice"),
        ({"txt": b"\xff"}, "s000.txt is not UTF-8"),
        ({"json": {"labels": ["a"]}, "second": 1}, "no labels, though"),
        ({"json": {"labels": ["a", 1]}}, "some name their classes"),
    ],
)
def test_unclear_labels(tmp_path, capsys, members, says):
    samples = [sample(0, **{ext: data for ext, data in members.items() if ext != "second"})]
    path = write_tar(tmp_path / "x.tar", samples + ([sample(1)] if "second" in members else []))
    assert says.replace("some name", "some samples name") in refused(capsys, tmp_path / "out", path)


def test_files_that_are_not_there_or_not_tars(tmp_path, capsys):
    out, path = tmp_path / "out", write_tar(tmp_path / "x-0.tar", [sample(0, cls="1")])
    assert "x-1.tar: no such file" in refused(capsys, out, tmp_path / "x-{0..1}.tar")
    assert "no such file" in refused(capsys, out, tmp_path / "y*.tar")
    assert "only tars on this machine" in refused(capsys, out, "s3://bucket/x.tar")
    assert "is a folder" in refused(capsys, out, tmp_path)
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b" + path.read_bytes())
    assert "it is compressed: unpack it first" in refused(capsys, out, tmp_path / "x.tar.gz")
    (tmp_path / "text.tar").write_text("hello " * 300)
    assert "is damaged or not a plain tar" in refused(capsys, out, tmp_path / "text.tar")
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:700])
    assert "is damaged or not a plain tar" in refused(capsys, out, tmp_path / "cut.tar")
    empty = write_tar(tmp_path / "empty.tar", [])
    assert "no sample with an image" in refused(capsys, out, empty)
    assert "use letters" in refused(capsys, out, path, "--split", "../x")


def test_json_summary_and_many_tars(tmp_path, capsys):
    for number in range(3):
        write_tar(tmp_path / f"x-{number}.tar", [sample(10 * number + i, cls="1") for i in range(4)])
    capsys.readouterr()
    assert index_tars(tmp_path / "out", tmp_path / "x-*.tar", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": str(tmp_path / "out"),
        "split": "train",
        "samples": 12,
        "shards": 3,
        "classes": 2,
        "without_image": 0,
        "images_left_out": 0,
    }
    index = opened(tmp_path / "out")
    assert np.array_equal(index.shard, np.repeat([0, 1, 2], 4))


def named_tar(path, *names, links=()):
    """A tar of one image under each name, then links (name, type, target)."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            member, data = tarfile.TarInfo(name), encoded(picture(number)) if "." in name else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def test_images_whose_names_have_two_dots_are_refused(tmp_path, capsys):
    """Stock webdataset makes one sample of all `v1.*`, in which timm finds no image."""
    path = named_tar(tmp_path / "x.tar", "a.jpg", "b.jpg", "v1.0001.jpg", "v1.0002.jpg", "v1.0003.jpg")
    stock = [set(sample) & {"jpg"} for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert stock == [{"jpg"}, {"jpg"}, set()]
    said = refused(capsys, tmp_path / "out", path)
    assert "v1.0001.jpg, v1.0002.jpg, v1.0003.jpg: a WebDataset key ends at the first dot" in said


def test_samples_and_images_left_out_are_all_images(tmp_path, capsys):
    names = ["a.jpg", "a.mask.png", "b.webp", "b.tif", "c.bmp", "__d.jpg", "__meta__/e.txt", "f", "._a.jpg"]
    path = named_tar(tmp_path / "x.tar", *names)
    (tmp_path / "c.yaml").write_text("classes: [z]")
    assert index_tars(tmp_path / "out", path, "--classes", tmp_path / "c.yaml") == 0
    said = capsys.readouterr().err
    assert "train has 3 samples" in said and "3 more images left out, such as a.mask.png" in said
    index = opened(tmp_path / "out")
    stock = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False) if {"jpg", "webp"} & set(s)]
    assert [index.key(row) for row in range(3)] == stock == ["a", "b", "__d"]


@pytest.mark.parametrize(
    ("kind", "says"),
    [(tarfile.LNKTYPE, "a hard link to a.jpg"), (tarfile.SYMTYPE, "a symbolic link to a.jpg")],
)
def test_links_are_refused_where_they_belong_to_a_sample(tmp_path, capsys, kind, says):
    path = named_tar(tmp_path / "x.tar", "a.jpg", links=[("b.jpg", kind, "a.jpg")])
    assert f"b.jpg is {says}, which WebDataset readers skip" in refused(capsys, tmp_path / "out", path)
    assert survey(path).groups.keys() == {"a"} and says in survey(path).bad["b"]
    named_tar(path, "a.jpg", links=[("latest", kind, "a.jpg")])
    (tmp_path / "c.yaml").write_text("classes: [z]")
    assert index_tars(tmp_path / "out", path, "--classes", tmp_path / "c.yaml") == 0


def test_byte_order_marks_are_no_part_of_the_text(tmp_path):
    mark = "\ufeff".encode()
    members = {"json": mark + b'{"labels": ["sea"]}', "txt": mark + b"a boat"}
    path = write_tar(tmp_path / "x.tar", [sample(0, **members), sample(1, cls=mark + b"sea")])
    assert index_tars(tmp_path / "out", path) == 0
    index = opened(tmp_path / "out")
    assert index.caption(0) == "a boat" and load_dataset(tmp_path / "out").classes == ("sea",)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<title>Sign in</title>", "is a web page"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_tar_yet(tmp_path, capsys, data, says):
    (tmp_path / "x.tar").write_bytes(data)
    assert says in refused(capsys, tmp_path / "out", tmp_path / "x.tar")


def test_texts_with_a_byte_order_mark_and_names_that_look_alike(tmp_path):
    forms = [unicodedata.normalize(form, "No café") for form in ("NFC", "NFD")]
    contents = [{"labels": [name], "caption": "\ufeffa cup"} for name in forms]
    samples = [sample(number, json=content) for number, content in enumerate(contents)]
    samples[1]["txt"] = "\ufeffa cup"
    assert index_tars(tmp_path / "out", write_tar(tmp_path / "t.tar", samples)) == 0
    dataset, rows = load_dataset(tmp_path / "out"), opened(tmp_path / "out")
    assert dataset.classes == (forms[0],) and rows.class_counts().tolist() == [2]
    assert [rows.caption(0), rows.caption(1)] == ["a cup", "a cup"]
    assert dataset.columns.separator == "|"  # a blank would cut the name in two
    assert run(verify.main, [str(tmp_path / "out")]) == 0
    assert matches(rows, dataset.classes, f'"{forms[1]}" in labels').all()


def test_a_class_that_is_called_like_a_column(tmp_path, capsys):
    tar = write_tar(tmp_path / "t.tar", [sample(0, json={"labels": ["ImageID"]})])
    assert index_tars(tmp_path / "out", tar) == 2
    assert "class 'ImageID' is called like a column" in capsys.readouterr().err
