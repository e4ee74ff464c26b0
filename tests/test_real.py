"""The real data sets, made of tiny packages, and how their sides are compared; nothing is fetched or trained."""

import io
import json
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))
import real
import real_data
import real_sides

from mlc.data.prediction_files import write_probabilities
from shards.console import UserError


def png(colour, size=64):
    file = io.BytesIO()
    Image.new("RGBA", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def archive(files, links=()):
    """An open tar of {path: bytes} and of links to the first path."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for path in links:
            member = tarfile.TarInfo(path)
            member.type, member.linkname = tarfile.SYMTYPE, next(iter(files))
            tar.addfile(member)
    return tarfile.open(fileobj=io.BytesIO(file.getvalue()))


def dots(shift=0, spots=((8, 20), (40, 12), (30, 44))):
    image = Image.new("RGB", (64, 64), "white")
    for x, y in spots:
        image.paste((20 + shift, 90, 160), (x, y, x + 14, y + 14))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_near_copies_do_not_straddle_splits():
    by_split = {}
    for i in range(100):
        by_split.setdefault(real_data.split_of(str(i)), str(i))
    others = [str(i) for i in range(100) if real_data.split_of(str(i)) == "test"][1:2]
    pictures = [
        real_data.Picture(f"{split}.png", concept, frozenset("a"), "", dots(shift=shift))
        for shift, (split, concept) in enumerate(by_split.items())
    ]
    pictures.append(real_data.Picture("else.png", others[0], frozenset("a"), "", dots(spots=((44, 4), (3, 46)))))
    assert [picture.name for picture in real_data.without_leaks(pictures)] == ["train.png", "else.png"]


# ---- emoji -----------------------------------------------------------------------------------------------------------

ENTRIES = {  # unified: (category, short name)
    "1F468-200D-1F3A8": ("People & Body", "male-artist"),
    "1F9D1-200D-1F3A8": ("People & Body", "artist"),
    "1F937-200D-2642-FE0F": ("People & Body", "man-shrugging"),
    "1F937": ("People & Body", "shrug"),
    "2764-FE0F": ("Smileys & Emotion", "heart"),
    "1F1E6-1F1F9": ("Flags", "flag-at"),
    "1F436": ("Animals & Nature", "dog"),
}
WORDS = {"👨‍🎨": ["man_artist", "paint", "man"], "❤": ["red_heart", "love", "<3"], "🤷": ["shrug"]}


def emoji_archive(vendor, without=()):
    entries, files = [], {}
    for i, (unified, (category, name)) in enumerate(ENTRIES.items()):
        image = f"{unified.lower()}.png"
        entry = {"unified": unified, "image": image, "category": category, "subcategory": "", "short_name": name}
        entries.append(entry)
        if unified not in without:
            files[f"package/img/{vendor}/64/{image}"] = png((i, len(vendor), 0))
    return archive({"package/emoji.json": json.dumps(entries).encode(), **files})


def test_emoji_of_one_vendor():
    pictures = real_data.emoji_of("acme", emoji_archive("acme", without=["1F436"]), WORDS)
    found = {picture.name: picture for picture in pictures}
    assert len(found) == 5  # neither the flag, nor the dog that this vendor has not drawn
    heart = found["2764-fe0f-acme.png"]
    assert (heart.words, heart.caption) == ({"love"}, "heart")
    artist = found["1f468-200d-1f3a8-acme.png"]
    assert (artist.words, artist.caption) == ({"paint", "man"}, "male artist")


def test_variants_of_an_emoji_are_one_concept():
    concepts = {name: real_data.emoji_concept(unified.split("-")) for unified, (_, name) in ENTRIES.items()}
    assert concepts["male-artist"] == concepts["artist"] and concepts["man-shrugging"] == concepts["shrug"]
    assert len(set(concepts.values())) == 5


# ---- icons -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("icons/Blue/48x48/actions/Edit-Copy.png", ("actions", 48, "edit-copy")),
        ("icons/Blue/base/128x128/apps/vlc.png", ("apps", 128, "vlc")),
        ("icons/Blue/mimes/64/text-x-c.png", ("mimetypes", 64, "text-x-c")),
        ("icons/Blue/32x32/actions/edit-copy.png", None),
        ("icons/Blue/scalable/actions/edit-copy.png", None),
        ("icons/Blue/64x64@2x/actions/edit-copy.png", None),
        ("icons/Blue/64x64/legacy/edit-copy.png", None),
        ("icons/Blue/64x64/actions/edit-copy-symbolic.symbolic.png", None),
        ("icons/Blue-Dark/64x64/actions/edit-copy.png", None),
    ],
)
def test_which_files_are_icons(path, found):
    assert real_data.icon_at(f"./usr/share/{path}", "Blue") == found


def test_an_icon_is_taken_once_at_64_pixels_or_the_next_size():
    sizes = {"a-thing": (48, 64, 128), "larger": (48, 96, 128), "smaller": (48,)}
    path = "./usr/share/icons/Blue/{0}x{0}/actions/{1}.png".format
    files = {path(size, name): png("red", size) for name, each in sizes.items() for size in each}
    pictures = real_data.icons_of("Blue", archive(files, links=[path(64, "same-thing")]))
    found = {picture.concept: Image.open(io.BytesIO(picture.png)).width for picture in pictures}
    assert found == {"a-thing": 64, "larger": 96, "smaller": 48}
    assert (pictures[0].words, pictures[0].caption) == ({"actions", "thing"}, "thing")


# ---- a set out of pictures -------------------------------------------------------------------------------------------


def noise(seed):
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((96, 96), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def pictures(concepts=60):
    """Of two vendors; every third concept is also there as an exact copy, under a name of its own."""
    made = []
    for i in range(concepts):
        words = frozenset(["even", "rare"] if i == 0 else ["even"] if i % 2 == 0 else ["odd"] if i > 1 else [])
        for j, vendor in enumerate(("one", "two")):
            made.append(real_data.Picture(f"{i}-{vendor}.png", str(i), words, f"number {i}", noise(2 * i + j)))
        if i % 3 == 0:
            made.append(real_data.Picture(f"z{i}.png", f"z{i}", words, "copy", noise(2 * i)))
    return made


def test_no_concept_and_no_picture_is_in_two_splits(tmp_path, monkeypatch):
    monkeypatch.setitem(real_data.SETS, "emoji", lambda folder: pictures())
    folder = real_data.make("emoji", tmp_path)
    rows = {split: real_data.read(folder, split) for split in real_data.SHARES}
    concepts = [{row["ImageID"].split("-")[0] for row in found} for found in rows.values()]
    content = [{(folder / "images" / row["ImageID"]).read_bytes() for row in found} for found in rows.values()]
    for parts in (concepts, content):
        assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    every = [row for found in rows.values() for row in found]
    assert len(every) == 118 == len(list((folder / "images").iterdir()))  # no copy, nothing without a label
    assert {row["Labels"] for row in every} == {"even", "odd"}
    assert real_data.summary(folder).startswith("emoji: 118 images (train ")
    first = {file.name: file.read_bytes() for file in folder.glob("*.csv")}
    real_data.make("emoji", tmp_path)
    assert {file.name: file.read_bytes() for file in folder.glob("*.csv")} == first


def test_the_splits_have_their_shares():
    splits = [real_data.split_of(str(i)) for i in range(50_000)]
    shares = [splits.count(split) / 50_000 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.01)


def test_a_folder_of_another_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setitem(real_data.SETS, "emoji", lambda folder: pictures(2))
    (tmp_path / "emoji").mkdir()
    with pytest.raises(UserError, match="choose another --data-dir"):
        real_data.make("emoji", tmp_path)


def test_the_commonest_words_are_counted_by_concept():
    made = [real_data.Picture("", concept, frozenset(words), "", b"") for concept, words in [("a", "xy"), ("b", "yz")]]
    assert real_data.commonest([*made, made[0], made[0]], least=1, most=2) == {"y", "x"}
    assert real_data.commonest([*made, made[0], made[0]], least=2) == {"y"}


def test_pictures_lie_on_white_and_are_reduced():
    (flat,) = real_data.flattened([real_data.Picture("a.png", "a", frozenset(), "", png((0, 0, 0, 0), 96))])
    with Image.open(io.BytesIO(flat.png)) as image:
        assert (image.size, image.mode, image.getpixel((5, 5))) == ((64, 64), "RGB", (255, 255, 255))


def test_a_registry_that_does_not_answer(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no-such-npm is not installed: install it, or put a-1\.tgz into"):
        real_data._fetched(["no-such-npm", "pack"], "a-1.tgz", tmp_path)
    failing = [sys.executable, "-c", "import sys; sys.exit('it is not there')"]
    with pytest.raises(UserError, match=r"failed \(it is not there\): make sure that the package registry can be"):
        real_data._fetched(failing, "a-1.tgz", tmp_path)
    (tmp_path / "a-1.tgz").touch()
    monkeypatch.setenv("PATH", "")
    assert real_data.npm("a@1", tmp_path) == tmp_path / "a-1.tgz"  # kept from last time


# ---- the comparison --------------------------------------------------------------------------------------------------


def test_the_threshold_is_tuned_on_val_and_the_scores_are_of_test():
    val, test = np.array([[1, 0]], bool), np.array([[1, 0], [0, 1]], bool)
    found = {"val": np.array([[0.4, 0.2]]), "test": np.array([[0.45, 0.1], [0.35, 0.7]])}
    scores = real.scores(found, val, test)
    assert scores["threshold"] == pytest.approx(0.3)
    assert (scores["f1@0.5"], scores["map"], scores["map_val"]) == (0.5, 1, 1)
    assert scores["f1@tuned"] == pytest.approx((1 + 2 / 3) / 2) == scores["macro_f1@tuned"]


def test_means_and_ranges_over_seeds():
    runs = {seed: dict.fromkeys(real.METRICS, value) | {"seconds": 9} for seed, value in ((1, 0.2), (2, 0.4))}
    assert real.rows({"bare": runs}) == [["bare", "2", *(["0.300", "0.200..0.400"] * 4), "9"]]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setitem(real_data.SETS, "emoji", lambda folder: pictures())
    data = real_data.make("emoji", tmp_path)
    return real_sides.Task(data, tmp_path / "shards", tmp_path / "weights", tmp_path / "out", size=64, epochs=3)


def test_the_constant_answers_with_the_shares_of_train(task):
    found = real_sides.constant(task, seed=1)
    assert found["test"].shape == task.target("test").shape
    assert found["val"][-1] == pytest.approx(task.target("train").mean(0))


def test_rows_of_a_run_come_in_the_order_of_the_table(task, monkeypatch):
    called = []

    def python(*command):
        called.append([str(word) for word in command])
        if "predict" in command:
            out, split = command[-1], command[command.index("--split") + 1]
            out.mkdir(parents=True)
            names = task.names(split)
            values = np.arange(len(names) * 2, dtype=np.float32).reshape(-1, 2) / 100
            write_probabilities(out / f"{split}.csv", names[::-1], task.classes, values[::-1])

    monkeypatch.setattr(real_sides, "_python", python)
    found = real_sides.side("recipe:demo-finetune")(task, 7)
    for split in real_sides.EVALUATED:
        expected = np.arange(found[split].size).reshape(-1, 2) / 100
        assert found[split] == pytest.approx(expected)
    train = called[0]
    assert train[:3] == ["train.py", "-c", "demo-finetune"] and train[train.index("--seed") + 1] == "7"
    real_sides.side("bare")(task, 8)
    flags = " ".join(word for word in called[3] if word.startswith("-"))
    assert flags == "--data --model --pretrained-path --img-size --epochs --seed --output --experiment"


def test_fit_answers_with_its_best_stage(task, monkeypatch):
    called = []

    def python(*command):
        called.append(command)
        out = command[-1]
        for place, stage in enumerate(("head", "ensemble")):
            (out / stage).mkdir(parents=True)
            for split in real_sides.EVALUATED:
                names = task.names(split)
                values = np.full((len(names), 2), 0.25 + place / 2, np.float32)
                write_probabilities(out / stage / f"{split}.csv", names, task.classes, values)
        results = [{"value": 0.6, "predictions": "head"}, {"value": 0.7, "predictions": "ensemble"}]
        (out / "fit.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(real_sides, "_python", python)
    assert (real_sides.side("fit")(task, 3)["test"] == 0.75).all()
    assert called[0][called[0].index("--epochs") + 1] == 3
    real_sides.side("fit --time 5min --preset best")(task, 3)
    assert "--epochs" not in called[1] and called[1][-6:-2] == ("--time", "5min", "--preset", "best")


def test_sides_by_name():
    assert isinstance(real_sides.side("recipe:demo"), partial) and real_sides.side("loop45") is real_sides.loop45
    for wrong in ("recipe:", "none"):
        with pytest.raises(UserError, match="choose among constant"):
            real_sides.side(wrong)
