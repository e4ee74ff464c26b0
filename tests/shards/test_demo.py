"""The demo data is what every other test and the first page of the manual stand on: its promises are checked here."""

import csv
import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import yaml
from PIL import Image, ImageChops
from sklearn.datasets import load_digits

from shards import demo, demo_scenes
from shards.console import UserError, run

HEADERS = {
    "train.csv": "ImageID,Labels,Caption",
    "val.csv": "ImageID,Labels,Caption",
    "test.csv": "ImageID,Caption",
    "test_labels.csv": "ImageID,Labels",
    "wrong_labels.csv": "ImageID,Labels,TrueLabels",
}


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digest(folder):
    """Relative path -> sha256 of the bytes, for every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make(out, *flags):
    assert demo.main([str(out), "--samples", "60", "-j", "1", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One data set of 60 samples per shape."""
    top = tmp_path_factory.mktemp("demo")
    return {shape: make(top / shape, "--shape", shape) for shape in demo_scenes.SHAPES}


def scenes(shape, split, n):
    shape = demo_scenes.SHAPES[shape]
    return [demo_scenes.draw_scene(shape, shape.size, split, np.random.default_rng([3, i])) for i in range(n)]


def shares(shape, n=3000):
    """Label -> share of the images that show it; and the number of labels per image -> its share."""
    found = [demo_scenes.scene_labels(demo_scenes.SHAPES[shape], scene) for scene in scenes(shape, "train", n)]
    return (
        {label: count / n for label, count in Counter(chain(*found)).items()},
        {size: count / n for size, count in Counter(map(len, found)).items()},
    )


# ---- files ----


@pytest.mark.parametrize("shape", list(demo_scenes.SHAPES))
def test_files_are_as_a_competition_ships_them(made, shape):
    out = made[shape]
    for name, header in HEADERS.items():
        raw = (out / name).read_bytes()
        assert raw.decode("utf-8").splitlines()[0] == header
        assert raw.endswith(b"\n") and b"\r" not in raw
    tables = {name: read(out / name) for name in HEADERS}
    counts = {"train.csv": 50, "val.csv": 6, "test.csv": 10, "test_labels.csv": 10}
    assert {name: len(tables[name]) for name in counts} == counts
    names = [row["ImageID"] for name in ("train.csv", "val.csv", "test.csv") for row in tables[name]]
    assert names == [f"{i}.jpg" for i in range(66)]
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(names)
    assert [row["ImageID"] for row in tables["test_labels.csv"]] == names[56:]

    content = yaml.safe_load((out / "classes.yaml").read_text())
    classes = content["classes"]
    assert all(isinstance(name, str) and not re.search(r"\s", name) for name in classes)
    assert len(set(classes)) == len(classes)
    for row in tables["train.csv"] + tables["val.csv"] + tables["test_labels.csv"]:
        labels = row["Labels"].split(" ")
        assert labels == sorted(set(labels), key=classes.index)  # known, unique, in column order, never empty


def test_groups(made):
    content = {shape: yaml.safe_load((out / "classes.yaml").read_text()) for shape, out in made.items()}
    assert content["demo"]["groups"] == {
        "digit": list("0123456789"),
        "ink": ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"],
    }
    assert content["demo"]["classes"] == [*content["demo"]["groups"]["digit"], *content["demo"]["groups"]["ink"]]
    assert content["comp5329"] == {"classes": [str(k) for k in range(1, 20) if k != 12]}
    groups = content["imet"]["groups"]
    assert list(groups) == ["culture", "tag"] and content["imet"]["classes"] == groups["culture"] + groups["tag"]
    assert all(name.startswith(f"{group}::") for group, names in groups.items() for name in names)
    assert len(content["imet"]["classes"]) > 200


def test_images_decode_at_about_the_asked_size(tmp_path, made):
    out = make(tmp_path / "out", "--size", "80x60")
    for i in range(66):
        with Image.open(out / "images" / f"{i}.jpg") as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert 80 <= image.width <= 104 and 60 <= image.height <= 78
            assert image.width == 80 or image.height == 60
    sizes = [Image.open(path).size for path in (made["imet"] / "images").iterdir()]
    assert {min(size) for size in sizes} == {64}
    assert max(w / h for w, h in sizes) > 3 and max(h / w for w, h in sizes) > 3


# ---- determinism ----


def test_same_seed_same_bytes_whatever_the_workers(tmp_path, made):
    out = make(tmp_path / "two", "-j", "2")
    assert digest(out) == digest(made["demo"])


def test_another_seed_differs(tmp_path, made):
    ours, other = digest(made["demo"]), digest(make(tmp_path / "out", "--seed", "1"))
    assert {name for name in ours if other[name] == ours[name]} == {"classes.yaml"}


def test_more_samples_keep_the_images_of_a_split(tmp_path, made):
    out = make(tmp_path / "out", "--samples", "66")
    assert read(out / "train.csv")[:50] == read(made["demo"] / "train.csv")


# ---- disjoint material ----


def test_scan_pools_partition_the_scans():
    target = load_digits().target
    pools = {split: [demo_scenes.scan_pool(split, digit) for digit in range(10)] for split in demo_scenes.SPLITS}
    for by_digit in pools.values():
        assert all((target[rows] == digit).all() and len(rows) > 10 for digit, rows in enumerate(by_digit))
    rows = np.concatenate(list(chain(*pools.values())))
    assert sorted(rows) == list(range(1797))


@pytest.mark.parametrize("split", demo_scenes.SPLITS)
def test_scenes_use_only_their_own_scans_and_tiles(split):
    pool = set(np.concatenate([demo_scenes.scan_pool(split, digit) for digit in range(10)]))
    tiles = demo_scenes.photo_tiles(split)
    drawn = scenes("demo", split, 300)
    assert {thing.scan for scene in drawn for thing in scene.things} <= pool
    assert {(scene.photo, scene.tile) for scene in drawn} == set(tiles)
    target = load_digits().target
    assert all(target[thing.scan] == thing.kind.digit for scene in drawn for thing in scene.things)


def test_tiles_share_no_pixel():
    seen = [np.zeros(photo.size[::-1], int) for photo in demo_scenes._photos()]
    for split in demo_scenes.SPLITS:
        for photo, (left, top, right, bottom) in demo_scenes.photo_tiles(split):
            seen[photo][top:bottom, left:right] += 1
    assert max(pixels.max() for pixels in seen) == 1
    assert all(pixels.mean() > 0.98 for pixels in seen)


def test_background_reads_nothing_outside_its_tile(monkeypatch):
    """Everything but one tile is painted red: no background of that tile may turn red at its rim."""
    ((photo, tile),) = demo_scenes.photo_tiles("test")[:1]
    painted = Image.new("RGB", demo_scenes._photos()[photo].size, (255, 0, 0))
    painted.paste((0, 0, 255), tile)
    monkeypatch.setattr(demo_scenes, "_photos", lambda: [painted] * 2)
    for i in range(60):
        size = [(96, 96), (64, 512), (512, 64)][i % 3]
        image = demo_scenes.background(demo_scenes.Scene(size, photo, tile, []), np.random.default_rng(i))
        assert image.size == size
        assert image.getextrema()[0] == (0, 0)


# ---- frequencies ----


def test_demo_frequencies():
    share, _ = shares("demo")
    assert len(share) == 18
    assert 0.71 < max(share.values()) < 0.79 and 0.006 < min(share.values()) < 0.018
    objects = Counter(len(scene.things) for scene in scenes("demo", "train", 3000))
    assert set(objects) == {1, 2, 3, 4, 5}
    assert sum(objects[n] for n in (1, 2, 3)) > 0.8 * 3000


def test_comp5329_frequencies():
    counts = {
        1: 22797,
        2: 1164,
        3: 4365,
        4: 1272,
        5: 1132,
        6: 1395,
        7: 1221,
        8: 2210,
        9: 1042,
        10: 1471,
        11: 604,
        13: 605,
        14: 252,
        15: 1934,
        16: 1099,
        17: 1430,
        18: 1525,
        19: 1020,
    }
    share, sizes = shares("comp5329")
    assert abs(share["1"] - 0.76) < 0.025
    for label, count in counts.items():
        assert abs(share[str(label)] - count / 30000) < 0.025, label
    per_image = {1: 19377, 2: 6651, 3: 2563, 4: 978, 5: 339, 6: 81, 7: 11}
    assert max(sizes) <= 7
    assert all(abs(sizes.get(n, 0) - count / 30000) < 0.025 for n, count in per_image.items())


def test_imet_has_a_long_tail_and_two_to_five_labels():
    share, sizes = shares("imet")
    assert len(share) > 200 and max(share.values()) < 0.2
    assert np.median(list(share.values())) < 0.01
    assert sum(share for n, share in sizes.items() if 2 <= n <= 5) > 0.8
    aspect = [scene.size[0] / scene.size[1] for scene in scenes("imet", "train", 600)]
    assert 6 < max(aspect) < 8.01 and 1 / 8.01 < min(aspect) < 1 / 6


# ---- labels, captions, pictures ----


def test_labels_are_what_is_shown():
    for scene in scenes("demo", "test", 100):
        shown = {str(t.kind.digit) for t in scene.things} | {t.ink for t in scene.things}
        assert set(demo_scenes.scene_labels(demo_scenes.SHAPES["demo"], scene)) == shown
    for scene in scenes("comp5329", "test", 100):  # one label per object
        assert len(demo_scenes.scene_labels(demo_scenes.SHAPES["comp5329"], scene)) == len(scene.things)


def test_wrong_labels_are_recorded_and_only_in_train(tmp_path):
    out = make(tmp_path / "out", "--samples", "600", "--size", "32")
    train, wrong = read(out / "train.csv"), read(out / "wrong_labels.csv")
    assert 0.015 < len(wrong) / len(train) < 0.075
    written = {row["ImageID"]: row["Labels"] for row in train}
    assert all(written[row["ImageID"]] == row["Labels"] != row["TrueLabels"] for row in wrong)

    spoiled = {row["ImageID"] for row in wrong}
    tables = [("train", i, row) for i, row in enumerate(train)]
    tables += [
        (split, i, row)
        for split, name in (("val", "val.csv"), ("test", "test_labels.csv"))
        for i, row in enumerate(read(out / name))
    ]
    shape = demo_scenes.SHAPES["demo"]
    for split, i, row in tables:  # the truth, drawn again
        scene = demo_scenes.draw_scene(
            shape, (32, 32), split, np.random.default_rng([0, demo_scenes.SPLITS.index(split), i])
        )
        right = row["Labels"].split() == demo_scenes.scene_labels(shape, scene)
        assert right == (row["ImageID"] not in spoiled)


def test_spoiled_labels_differ_by_one_step():
    shape, seen = demo_scenes.SHAPES["demo"], set()
    for i in range(200):
        wrong = set(demo_scenes.spoil(shape, ["3", "red"], np.random.default_rng(i)))
        came, went = wrong - {"3", "red"}, {"3", "red"} - wrong
        seen.add((len(came), len(went)))
        assert len(demo_scenes.spoil(shape, ["3"], np.random.default_rng(i))) == 1
    assert seen == {(1, 0), (0, 1), (1, 1)}


def test_captions_tell_a_part_and_sometimes_lie():
    drawn = scenes("demo", "train", 1500)
    said = [demo_scenes.write_caption(scene, np.random.default_rng([5, i])) for i, scene in enumerate(drawn)]
    assert 0.05 < said.count("") / 1500 < 0.12
    assert any("," in text for text in said)
    assert any(re.fullmatch(r"two red digits, one of them an? \w+", text) for text in said)
    assert not any(re.search(r"\ban (?!orange|eight)|\ba (orange|eight)", text) for text in said)
    named = [
        (set(re.findall("|".join(demo_scenes.INKS), text)), {thing.ink for thing in scene.things})
        for text, scene in zip(said, drawn, strict=True)
        if text
    ]
    lies, partial = (np.mean([bool(a - b) for a, b in named]), np.mean([bool(b - a) for a, b in named]))
    assert 0.02 < lies < 0.15 and partial > 0.3


def test_every_object_is_seen():
    """Objects are painted one over another: of each, at least a third of the strokes is left uncovered."""
    for i, scene in enumerate(scenes("demo", "train", 150)):
        masks = [demo_scenes.glyph(thing, round(thing.height * min(scene.size))) for thing in scene.things]
        boxes = demo_scenes.arrange(scene.size, [mask.size for mask in masks], np.random.default_rng([4, i]))
        strokes = [np.zeros(scene.size[::-1], bool) for _ in masks]
        for stroke, mask, (left, top, right, bottom) in zip(strokes, masks, boxes, strict=True):
            stroke[top:bottom, left:right] = np.asarray(mask) > 128  # fails where a box leaves the image
        for k, stroke in enumerate(strokes):
            over = np.any(strokes[k + 1 :], axis=0) if strokes[k + 1 :] else np.zeros_like(stroke)
            assert (stroke & ~over).sum() > stroke.sum() / 3


def test_arrange_separates_what_can_be_separated():
    boxes = demo_scenes.arrange((100, 50), [(45, 45), (45, 45)], np.random.default_rng(0))
    assert demo_scenes.worst_overlap(boxes) < 0.1
    assert demo_scenes.worst_overlap([(0, 0, 10, 10), (5, 5, 25, 25), (50, 50, 60, 60)]) == 0.25


def test_a_digit_is_half_as_wide_as_the_image_and_in_its_ink():
    scene = next(
        scene for scene in scenes("demo", "train", 50) if len(scene.things) == 1 and scene.things[0].ink == "red"
    )
    bare = demo_scenes.render(scene._replace(things=[]), np.random.default_rng(0))
    image = demo_scenes.render(scene, np.random.default_rng(0))
    left, top, right, bottom = ImageChops.difference(bare, image).getbbox()
    assert 0.45 < (bottom - top) / min(scene.size) < 1.0
    changed = np.asarray(image)[top:bottom, left:right].astype(int)
    red = (changed[..., 0] > 120) & (changed[..., 1:] < 90).all(-1)
    assert red.mean() > 0.15


# ---- the verb ----


def test_second_run_says_already_there(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made["demo"].rglob("*")}
    make(made["demo"], "-j", "2")
    assert "already there" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in made["demo"].rglob("*")}


def test_other_arguments_are_refused(made):
    for flags in (["--seed", "1"], ["--size", "64"], ["--shape", "imet"], ["--samples", "61"]):
        with pytest.raises(UserError, match=r"other arguments.*another folder"):
            make(made["demo"], *flags)


def test_unfinished_data_is_made_again(tmp_path, made, monkeypatch):
    def crash(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_tables", crash)
        with pytest.raises(RuntimeError):
            make(tmp_path / "out", "--samples", "90")
    assert not (tmp_path / "out" / "demo.json").exists()
    assert digest(make(tmp_path / "out")) == digest(made["demo"])


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "train.csv").write_text("mine")
    with pytest.raises(UserError, match="not demo data"):
        make(tmp_path)
    with pytest.raises(UserError, match="not demo data"):
        make(tmp_path / "train.csv")
    assert (tmp_path / "train.csv").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "5"], "whole number from 6"),
        (["--samples", "many"], "whole number"),
        (["--seed", "-1"], "whole number from 0"),
        (["--size", "16"], "32 to 2048"),
        (["--size", "96x"], "is not a size"),
        (["--size", "96x72x3"], "is not a size"),
        (["--shape", "coco"], "invalid choice"),
        (["-j", "0"], "whole number from 1"),
        (["--sample", "60"], "did you mean --samples"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        demo.main([str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unwritable_place_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(demo.main, [str(tmp_path / "file" / "out")]) == 2
    assert re.fullmatch(r"error: cannot write .*file.*\n", capsys.readouterr().err)


def test_needs_no_torch():
    code = "import sys, shards.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
