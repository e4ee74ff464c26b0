"""Packing against its input: what went in comes out through the index, and nothing comes out of bad input."""

import csv
import io
import json
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing import encoded, image_bytes, opened, pack_raw, picture, tree, write_raw, write_table
from PIL import Image, ImageOps

from shards import pack, pictures, plan, table, tar
from shards.dataset import load_dataset
from shards.duplicates import group_numbers
from shards.plan import Keys

HEADER = ["ImageID", "Labels", "Caption"]


def write_images(raw: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        path = raw / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return raw


def pack_images(folder: Path, images: dict[str, bytes], *flags: str):
    """The index of a train split of these images, in order."""
    raw = write_images(folder / "raw", images)
    write_table(raw / "train.csv", HEADER, [[name, "1", ""] for name in images])
    assert pack_raw(raw, folder / "out", *flags) == 0
    return opened(folder / "out")


def refused(capsys, raw: Path, *flags: str) -> str:
    """What a pack says that ends with exit code 2, and leaves nothing."""
    out = raw.parent / f"{raw.name}-refused"
    capsys.readouterr()
    assert pack_raw(raw, out, *flags) == 2
    assert not list(raw.parent.glob(out.name + "*"))
    return capsys.readouterr().err


def test_what_goes_in_comes_out(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=25, test=6)
    assert pack_raw(raw, tmp_path / "out", "--test-csv", raw / "test.csv", "--shard-size", "10") == 0
    dataset = load_dataset(tmp_path / "out")
    assert dataset.classes == tuple("01234")
    assert [shard.num_samples for shard in dataset.split("train").shards] == [10, 10, 5]
    rows = table.read_rows(raw / "train.csv", table.Columns(), table.Problems(), need_labels=True)
    index = opened(tmp_path / "out")
    assert len(index) == len(rows) == 25
    for number, row in enumerate(rows):  # in the order of the CSV
        data = (raw / "images" / row.image_id).read_bytes()
        assert (index.image_id(number), index.caption(number)) == (row.image_id, row.caption)
        assert [dataset.classes[column] for column in index.labels(number)] == list(row.labels)
        assert image_bytes(index, number) == data
        assert index.crc32[number] == zlib.crc32(data)
        assert index.shard[number] == number // 10
    assert set(index.fold.tolist()) == {-1}
    assert set(index.weight.tolist()) == {1.0}
    test = opened(tmp_path / "out", "test")
    assert not test.has_labels
    assert index.has_labels
    assert [test.image_id(row) for row in range(6)] == [f"t{row}.jpg" for row in range(6)]
    assert test.targets(range(6)).sum() == 0


def test_the_tars_are_plain_ustar_with_json_and_text(tmp_path):
    raw = write_raw(tmp_path / "raw")
    pack_raw(raw, tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    groups = list(tar.groups(path))
    data = path.read_bytes()
    first = {ext: data[member.offset : member.offset + member.size] for ext, member in groups[0].members.items()}
    assert json.loads(first["json"]) == {
        "image_id": "0.jpg",
        "labels": list("01234"),
        "columns": [0, 1, 2, 3, 4],
        "label": 0,
    }
    assert first["txt"] == b""
    assert first["jpg"] == (raw / "images" / "0.jpg").read_bytes()
    assert sum(len(group.members) for group in groups) == 36
    assert b"PaxHeader" not in data
    assert data[257:263] == b"ustar\0"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40), st.sets(st.integers(0, 30))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_caption_and_any_labels_survive(samples):
    with tempfile.TemporaryDirectory() as folder:
        raw, data = Path(folder) / "raw", encoded(picture())
        write_images(raw, {f"{number}.jpg": data for number in range(len(samples))})
        (raw / "classes.yaml").write_text(f"classes: {list(range(31))}")
        rows = [
            [f"{number}.jpg", " ".join(map(str, labels)), caption] for number, (caption, labels) in enumerate(samples)
        ]
        bare_return = any("\r" in caption for caption, _ in samples)  # which Python's writer forgets to quote
        write_table(raw / "train.csv", HEADER, rows, csv.QUOTE_ALL if bare_return else csv.QUOTE_MINIMAL)
        assert pack_raw(raw, Path(folder) / "out") == 0
        index = opened(Path(folder) / "out")
        packed = [(caption.lstrip("\ufeff"), labels) for caption, labels in samples]
        assert [(index.caption(row), set(index.labels(row).tolist())) for row in range(len(index))] == packed
        assert index.targets(range(len(samples))).sum(1).tolist() == [len(labels) for _, labels in samples]


def turned(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A JPEG, smooth but nowhere alike, that is to be shown after a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(seed, (5, 3)).resize(size, Image.Resampling.BICUBIC), exif=exif, quality=95)


def test_bytes_of_usual_formats_are_unchanged_and_named_by_content(tmp_path):
    deep = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)
    images = {
        "rgb.jpg": encoded(picture(1)),
        "grey.jpg": encoded(picture(2, mode="L")),
        "cmyk.jpg": encoded(picture(3, mode="CMYK")),
        "turned.jpg": turned(4),
        "palette.png": encoded(picture(5, mode="P"), "PNG"),
        "alpha.png": encoded(picture(6, mode="RGBA"), "PNG"),
        "greyalpha.png": encoded(picture(7, mode="LA"), "PNG"),
        "bits.png": encoded(picture(8, mode="1"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "web.webp": encoded(picture(9), "WEBP"),
        "double.jpg": encoded(picture(10), "MPO", save_all=True, append_images=[picture(11)]),
        "jpeg-called.png": encoded(picture(12)),
        "png-called.JPG": encoded(picture(13), "PNG"),
    }
    index = pack_images(tmp_path, images)
    assert [image_bytes(index, row) for row in range(len(index))] == list(images.values())
    assert [index.ext(row) for row in range(len(index))] == ["jpg"] * 4 + ["png"] * 5 + ["webp", "jpg", "jpg", "png"]


def test_other_formats_become_png_without_loss(tmp_path):
    gif = picture(2).quantize(64)
    images = {
        "a.bmp": encoded(picture(1), "BMP"),
        "b.gif": encoded(gif, "GIF"),
        "c.tif": encoded(picture(3), "TIFF"),
        "d.tif": encoded(picture(4, mode="CMYK"), "TIFF"),
        "e.tif": encoded(picture(5, mode="I;16"), "TIFF"),
    }
    index = pack_images(tmp_path, images)
    for row, data in enumerate(images.values()):
        packed = Image.open(io.BytesIO(image_bytes(index, row)))
        assert packed.format == "PNG"
        assert index.ext(row) == "png"
        before = Image.open(io.BytesIO(data))
        kind = "I" if before.mode == "I;16" else "RGB"
        assert np.array_equal(np.asarray(packed.convert(kind)), np.asarray(before.convert(kind)))


def test_resize_shrinks_upright_and_leaves_small_images_alone(tmp_path):
    white_hole = picture(4, (64, 48), "RGBA")
    white_hole.putalpha(0)
    images = {
        "wide.jpg": encoded(picture(1, (96, 48)), quality=95),
        "turned.jpg": turned(2, (96, 48)),
        "small.png": encoded(picture(3, (40, 24), "RGBA"), "PNG"),
        "hole.png": encoded(white_hole, "PNG"),
        "cmyk.jpg": encoded(picture(5, (50, 60), "CMYK")),
        "thin.png": encoded(picture(6, (500, 25)), "PNG"),
        "deep.png": encoded(Image.fromarray(np.full((40, 40), 0x8000, np.uint16)), "PNG"),
    }
    index = pack_images(tmp_path, images, "--resize", "24", "--quality", "98")
    packed = [Image.open(io.BytesIO(image_bytes(index, row))) for row in range(len(index))]
    assert [image.size for image in packed] == [(48, 24), (24, 48), (40, 24), (32, 24), (24, 29), (480, 24), (24, 24)]
    assert image_bytes(index, 2) == images["small.png"]
    assert all(image.mode == "RGB" and image.format == "JPEG" for row, image in enumerate(packed) if row != 2)
    assert [index.ext(row) for row in range(len(index))] == ["jpg", "jpg", "png", "jpg", "jpg", "jpg", "jpg"]
    assert np.asarray(packed[3]).min() >= 254  # what is transparent lies on white
    assert np.abs(np.asarray(packed[6]).astype(int) - 0x80).max() <= 2
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(images["turned.jpg"]))).resize((24, 48), Image.LANCZOS)
    assert np.abs(np.asarray(packed[1]).astype(int) - np.asarray(reference)).mean() < 4
    assert packed[1].getexif().get(0x0112, 1) == 1


def test_keys_are_plain_unique_and_stable():
    keys = Keys()
    names = ["a.jpg", "b/a.jpg", "A.jpg", "c d.jpg", "c_d.jpg", "c.d.jpg", "größe.png", "x" * 200 + ".jpg", ".jpg", "e"]
    made = [keys.make(name) for name in names]
    assert (made[0], made[2], made[4], made[9]) == ("a", "A", "c_d", "e")
    assert len(set(made)) == len(made)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in made)
    assert made[1].startswith("a-")
    again = Keys()
    assert [again.make(name) for name in names] == made


def test_folders_and_missing_extensions_in_image_ids(tmp_path):
    raw = write_images(
        tmp_path / "raw",
        {"a/1.jpg": encoded(picture(1)), "b/1.jpg": encoded(picture(2)), "77.png": encoded(picture(3), "PNG")},
    )
    write_table(raw / "train.csv", HEADER, [["a/1.jpg", "1", ""], ["b/1.jpg", "1", ""], ["77", "1", ""]])
    assert pack_raw(raw, tmp_path / "out") == 0
    index = opened(tmp_path / "out")
    assert [index.image_id(row) for row in range(3)] == ["a/1.jpg", "b/1.jpg", "77"]
    assert [index.key(row)[:2] for row in range(3)] == ["1", "1-", "77"]


def test_val_fraction_and_folds(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=40)
    assert pack_raw(raw, tmp_path / "out", "--val-fraction", "0.25", "--folds", "3") == 0
    train, val = opened(tmp_path / "out"), opened(tmp_path / "out", "val")
    assert (len(train), len(val)) == (30, 10)
    ids = [index.image_id(row) for index in (train, val) for row in range(len(index))]
    assert sorted(ids) == sorted(f"{row}.jpg" for row in range(40))
    assert ids[:30] == sorted(ids[:30], key=lambda name: int(name[:-4]))  # the order of the CSV
    assert np.bincount(train.fold).tolist() == [10, 10, 10]
    assert set(val.fold.tolist()) == {-1}
    assert load_dataset(tmp_path / "out").folds == 3


def test_val_csv_and_a_test_table_with_labels(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=12)
    lines = (raw / "train.csv").read_text().splitlines()
    for name, part in {"train": lines[1:7], "val": lines[7:10], "test": lines[10:]}.items():
        (raw / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    assert pack_raw(raw, tmp_path / "out", "--val-csv", raw / "val.csv", "--test-csv", raw / "test.csv") == 0
    assert {name: split.num_samples for name, split in load_dataset(tmp_path / "out").splits.items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert opened(tmp_path / "out", "test").has_labels
    assert "keeps its labels" in capsys.readouterr().err


def test_class_order(tmp_path, capsys):
    raw = write_images(tmp_path / "raw", {"a.jpg": encoded(picture())})
    write_table(raw / "train.csv", HEADER, [["a.jpg", "10 9 1", ""]])
    pack_raw(raw, tmp_path / "numbers")
    assert load_dataset(tmp_path / "numbers").classes == ("1", "9", "10")
    write_table(raw / "train.csv", HEADER, [["a.jpg", "red 10 blue", ""]])
    pack_raw(raw, tmp_path / "names")
    assert load_dataset(tmp_path / "names").classes == ("10", "blue", "red")
    (raw / "classes.yaml").write_text("classes: [red, blue, green, 10]\ngroups: {ink: [red, blue, green], n: [10]}")
    capsys.readouterr()
    assert pack_raw(raw, tmp_path / "file") == 0
    assert "classes.yaml, beside the CSV" in capsys.readouterr().err
    dataset = load_dataset(tmp_path / "file")
    assert dataset.classes == ("red", "blue", "green", "10")
    assert dataset.groups == {"ink": ("red", "blue", "green"), "n": ("10",)}
    assert opened(tmp_path / "file").labels(0).tolist() == [0, 1, 3]


def test_other_column_names_and_separator(tmp_path):
    raw = write_images(tmp_path / "raw", {"a.jpg": encoded(picture())})
    write_table(raw / "train.csv", ["text", "id", "tags"], [["hello", "a", "old man| sea |"]])
    assert (
        pack_raw(
            raw,
            tmp_path / "out",
            "--id-column",
            "id",
            "--labels-column",
            "tags",
            "--caption-column",
            "text",
            "--label-separator",
            "|",
        )
        == 0
    )
    assert load_dataset(tmp_path / "out").classes == ("old man", "sea")
    assert opened(tmp_path / "out").caption(0) == "hello"


def test_byte_order_mark_and_windows_lines(tmp_path):
    raw = write_raw(tmp_path / "raw")
    before = (raw / "train.csv").read_text()
    (raw / "train.csv").write_bytes(b"\xef\xbb\xbf" + before.replace("\n", "\r\n").encode())
    assert pack_raw(raw, tmp_path / "out") == 0
    assert len(opened(tmp_path / "out")) == 12


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Lets tiny packs use worker processes, and workers start where torch is not installed: packing needs none."""
    monkeypatch.setattr(pack, "WORKER_BYTES", 1)
    monkeypatch.setattr(plan, "CHECK_CHUNK", 5)
    monkeypatch.setattr(plan, "WORKER_CHUNKS", 1)
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch" / "torch.py").write_text("raise ModuleNotFoundError('not installed')")
    monkeypatch.syspath_prepend(tmp_path / "no-torch")


def test_the_same_bytes_whatever_the_workers(tmp_path, processes):
    raw = write_raw(tmp_path / "raw", samples=30, test=4)
    flags = ("--test-csv", raw / "test.csv", "--val-fraction", "0.2", "--folds", "2", "--shard-size", "7")
    assert pack_raw(raw, tmp_path / "one", *flags, "-j", "1") == 0
    assert pack_raw(raw, tmp_path / "two", *flags, "-j", "2") == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert pack_raw(raw, tmp_path / "seed", *flags, "--seed", "1") == 0
    assert tree(tmp_path / "seed") != tree(tmp_path / "one")


def test_summary_as_json(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    capsys.readouterr()
    pack_raw(raw, tmp_path / "out", "--json")
    found = json.loads(capsys.readouterr().out)
    rows = [line.split(",")[1].split() for line in (raw / "train.csv").read_text().splitlines()[1:]]
    assert found["splits"]["train"]["samples"] == 12
    assert found["splits"]["train"]["without_labels"] == sum(not labels for labels in rows)
    assert found["splits"]["train"]["labels_per_image"] == round(sum(map(len, rows)) / 12, 4)


# --- bad input: exit code 2, a line that says what to do, and nothing is left behind ---


def test_bad_rows_are_listed_together(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    write_images(
        raw,
        {
            "cut.jpg": encoded(picture(1, (64, 64)))[:-200],
            "text.jpg": b"hello",
            "empty.jpg": b"",
            "cut.png": encoded(picture(2), "PNG")[:-40],
        },
    )
    bad = [
        ["gone.jpg", "1", ""],
        ["cut.jpg", "1", ""],
        ["text.jpg", "1", ""],
        ["empty.jpg", "1", ""],
        ["cut.png", "1", ""],
        ["3.jpg", "1", ""],
        ["../raw/images/1.jpg", "1", ""],
        ["/1.jpg", "1", ""],
        ["", "1", ""],
        ["x.jpg", "1 1", ""],
        ["y.jpg", "77", ""],
    ]
    with (raw / "train.csv").open("a") as file:
        file.writelines(",".join(row) + "\n" for row in bad)
    (raw / "classes.yaml").write_text("classes: [0, 1, 2, 3, 4]")
    said = refused(capsys, raw)
    assert "error: 11 bad rows, nothing is packed" in said
    for line, text in enumerate(
        [
            "'gone.jpg' is not in",
            "'cut.jpg': does not decode",
            "'text.jpg': not a picture",
            "'empty.jpg': the file is empty",
            "'cut.png': does not",
            "'3.jpg' was already in",
            "'../raw/images/1.jpg' is outside",
            "'/1.jpg' is outside",
            "the ImageID is empty",
            "label '1' is there twice",
            "label '77' is none of the 5 classes",
        ],
        start=14,
    ):
        assert re.search(rf"train.csv line {line}: .*{re.escape(text)}", said), said
    assert "--skip-bad 11" in said
    assert pack_raw(raw, tmp_path / "out", "--skip-bad", "10") == 2
    assert pack_raw(raw, tmp_path / "out", "--skip-bad", "11") == 0
    assert "left out 11 bad rows" in capsys.readouterr().err
    assert len(opened(tmp_path / "out")) == 12


def test_twenty_problems_and_a_count(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=2)
    with (raw / "train.csv").open("a") as file:
        file.writelines(f"gone{number}.jpg,1,\n" for number in range(33))
    said = refused(capsys, raw)
    assert said.count("is not in") == 20
    assert "... and 13 more" in said


def test_bad_images_are_found_by_workers_too(tmp_path, capsys, processes):
    raw = write_raw(tmp_path / "raw", samples=20)
    (raw / "images" / "13.jpg").write_bytes(b"no picture")
    assert "line 15: image '13.jpg': not a picture" in refused(capsys, raw, "-j", "2")


def test_too_many_pixels(tmp_path, capsys, monkeypatch):
    raw = write_raw(tmp_path / "raw", samples=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert "more than 300 pixels" in refused(capsys, raw)


def test_ids_are_unique_over_all_tables(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=4)
    write_table(raw / "test.csv", ["ImageID"], [["2.jpg"]])
    assert "test.csv line 2: image '2.jpg' was already in" in refused(capsys, raw, "--test-csv", raw / "test.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("ImageID,Labels,Caption\n", "no rows"),
        ("imageid,Labels\n0.jpg,1\n", "no column 'ImageID', it has: imageid, Labels; did you mean imageid?"),
        ("ImageID,Label\n0.jpg,1\n", "no column 'Labels', it has: ImageID, Label; did you mean Label?"),
        ("ImageID,Labels,Labels\n0.jpg,1,1\n", "2 columns called 'Labels'"),
        ("ImageID,Labels,Caption\n0.jpg,1,a, b\n", "line 2: 4 fields where the header has 3"),
        ("ImageID,Labels,Caption\n0.jpg,1\n", "line 2: 2 fields where the header has 3"),
        ('ImageID,Labels,Caption\n0.jpg,1,x\n1.jpg,1,"a "b" c"\n', "line 3: a quote in the middle"),
        ('ImageID,Labels,Caption\n0.jpg,1,"open\n1.jpg,1,x\n', "line 2: a quote opened here does not end"),
        ('ImageID,Labels,Caption\n0.jpg,1,"open\n1.jpg,1,"x"\n', "line 2: a quote opened here does not end"),
        ('ImageID,Labels,Caption\n0.jpg,1,"open\n1.jpg,1,6"\n', "line 2: a quote opened here runs over the rows below"),
        ("ImageID,Labels,Caption\n0.jpg,1,caf\xe9\n", "line 2 is not UTF-8 (byte 0xe9)"),
        ("ImageID,Labels,Caption\n0.jpg,,\n", "no good row of"),
    ],
)
def test_bad_tables(tmp_path, capsys, text, says):
    raw = write_raw(tmp_path / "raw", samples=3)
    (raw / "train.csv").write_bytes(text.encode("latin-1"))
    assert says in refused(capsys, raw)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes: [a, b", "cannot read"),
        ("[a, b]", "must hold `classes"),
        ("classes: [a]\nnames: [b]", "must hold"),
        ("classes: [a, a]", "'a' is twice"),
        ("classes: [a, yes]", "True in classes is not a name"),
        ("classes: [a]\ngroups: {g: [b]}", "'b' of group g is not in classes"),
        ("classes: a", "must be a list"),
        ("classes: [a]\ngroups: {g: [a], h: [a]}", "a class has one group"),
        ("classes: [old man]", "label separator"),
    ],
)
def test_bad_classes(tmp_path, capsys, text, says):
    raw = write_raw(tmp_path / "raw", samples=2)
    (tmp_path / "classes.yaml").write_text(text)
    assert says in refused(capsys, raw, "--classes", tmp_path / "classes.yaml")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--csv", "nowhere.csv"], "cannot read nowhere"),
        (["--test-csv", "nowhere.csv"], "cannot read"),
        (["--folds", "9"], "--folds 9 is more than the 3 samples"),
        (["--val-fraction", "0.01"], "the val split would be empty"),
        (["--caption-column", "Text"], "no column 'Text'"),
    ],
)
def test_bad_values(tmp_path, capsys, flags, says):
    assert says in refused(capsys, write_raw(tmp_path / "raw", samples=3), *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--val-fraction", "1.5"],
        ["--val-fraction", "0.1", "--val-csv", "x"],
        ["--folds", "1"],
        ["--shard-size", "0"],
        ["--quality", "101"],
        ["--resize", "x"],
        ["--label-separator", ""],
        ["--skip-bad", "-1"],
        ["--colour", "red"],
    ],
)
def test_bad_flags(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        pack_raw(tmp_path, tmp_path / "out", *flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert flags[0] in said
    assert said.count("\n") == 1


def test_shards_end_at_a_number_of_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(pack, "SHARD_BYTES", 3000)
    raw = write_raw(tmp_path / "raw")
    pack_raw(raw, tmp_path / "out")
    index, sizes = opened(tmp_path / "out"), {}
    for shard, size in zip(index.shard.tolist(), index.size.tolist(), strict=True):
        sizes[shard] = sizes.get(shard, 0) + size
    assert len(sizes) > 2
    assert max(sizes.values()) <= 3000


def test_weights_of_the_table_are_in_the_index(tmp_path, capsys):
    names = ["a", "b", "c"]
    raw = write_images(tmp_path / "raw", {f"{name}.jpg": encoded(picture(i)) for i, name in enumerate(names)})
    write_table(
        raw / "train.csv", ["ImageID", "Labels", "Weight"], [["a", "x", "0.5"], ["b", "x", "0"], ["c", "x", "3"]]
    )
    assert pack_raw(raw, tmp_path / "out") == 0
    assert opened(tmp_path / "out").weight.tolist() == [0.5, 0, 3]
    for bad in ("-1", "", "nan", "heavy"):
        write_table(raw / "train.csv", ["ImageID", "Labels", "Weight"], [["a", "x", "1"], ["b", "x", bad]])
        assert pack_raw(raw, tmp_path / "refused") == 2
        assert f"line 3: the Weight {bad!r} is not a number from 0 on" in capsys.readouterr().err


def near_copies(folder: Path) -> tuple[Path, list[str]]:
    """(raw data, group of each row): 24 pictures, a third of them saved three times in other sizes and qualities."""
    (folder / "images").mkdir(parents=True)
    rows, group = [], []
    for number in range(24):
        image = picture(number, (6, 6)).resize((96, 96), Image.Resampling.BICUBIC)
        for copy in range(3 if number % 3 == 0 else 1):
            name = f"{number}-{copy}.jpg"
            size = 96 - 16 * copy
            (folder / "images" / name).write_bytes(encoded(image.resize((size, size)), quality=95 - 20 * copy))
            rows.append([name, "ab"[number % 2]])
            group.append(number)
    order = np.random.RandomState(0).permutation(len(rows))
    write_table(folder / "train.csv", ["ImageID", "Labels"], [rows[i] for i in order])
    return folder, [group[i] for i in order]


def sides(folder: Path) -> dict[str, set]:
    """image_id before the dash -> the splits and folds that have it."""
    found: dict[str, set] = {}
    for split in ("train", "val"):
        index = opened(folder, split)
        for row in range(len(index)):
            found.setdefault(index.image_id(row).partition("-")[0], set()).add((split, int(index.fold[row])))
    return found


def test_near_copies_stay_on_one_side_of_every_split(tmp_path, capsys):
    raw, group = near_copies(tmp_path / "raw")
    flags = ["--val-fraction", "0.25", "--folds", "3"]
    assert pack_raw(raw, tmp_path / "out", *flags) == 0
    assert "24 training images in 8 groups of near copies: each group stays on one side" in capsys.readouterr().err
    assert all(len(where) == 1 for where in sides(tmp_path / "out").values())
    assert len(opened(tmp_path / "out", "val")) == pytest.approx(len(group) / 4, abs=2)
    assert pack_raw(raw, tmp_path / "apart", *flags, "--split-copies") == 0
    assert "near copies" not in capsys.readouterr().err
    assert any(len(where) > 1 for where in sides(tmp_path / "apart").values())


def test_a_pack_that_was_killed_keeps_near_copies_together_too(tmp_path, capsys, monkeypatch):
    raw, _ = near_copies(tmp_path / "raw")
    (raw / "images" / "9-1.jpg").write_bytes(b"no picture")
    flags = ["--val-fraction", "0.25", "--skip-bad", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(pack, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files = {"--csv": raw / "train.csv", "--images": raw / "images", "--out": tmp_path / "out", "-j": 1}
            pack.main([*(str(part) for pair in files.items() for part in pair), *flags])
    with monkeypatch.context() as patched:
        patched.setattr(pack, "check_images", lambda *_: pytest.fail("the images were looked at before"))
        assert pack_raw(raw, tmp_path / "out", *flags) == 0
    assert pack_raw(raw, tmp_path / "whole", *flags) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_pictures_of_one_kind_are_no_copies(tmp_path, capsys):
    """All of them look alike, as X-rays do: a split that kept them together would be empty."""
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    rng = np.random.RandomState(0)
    base = np.asarray(picture(0, (6, 6)).resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    for number in range(60):
        pixels = np.clip(base + rng.randint(-6, 7, base.shape), 0, 255).astype(np.uint8)
        (raw / "images" / f"{number}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    write_table(raw / "train.csv", ["ImageID", "Labels"], [[f"{number}.png", "a"] for number in range(60)])
    assert pack_raw(raw, tmp_path / "out", "--val-fraction", "0.2") == 0
    assert "60 training images look so much alike that they are of one kind" in capsys.readouterr().err
    assert len(opened(tmp_path / "out", "val")) == 12


def test_equal_files_whose_checksum_is_large_are_copies_and_others_are_not(tmp_path):
    """Whatever the size of the numbers: files of one colour, which nothing but their bytes tells apart."""
    files = []
    for number in range(40):
        for copy in "ab":
            files.append(tmp_path / f"{number}{copy}.png")
            files[-1].write_bytes(encoded(Image.new("RGB", (8, 8), (number, 0, 0)), "PNG"))
    seen = pictures.look_at_files(files, fingerprints=True)
    assert (seen.content > 2**61).any() and (seen.content >= 0).all() and seen.content.dtype == np.int64
    numbers = group_numbers(seen.hash, seen.tiny, seen.content, np.ones(80, bool))
    assert np.array_equal(numbers, np.repeat(np.arange(40), 2))
