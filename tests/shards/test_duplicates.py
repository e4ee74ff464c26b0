"""Near copies: found after re-encoding and resizing, between splits too, and none where pictures differ."""

import io

import numpy as np
import pytest
from packing import encoded, pack_raw, picture, write_raw, write_table
from PIL import Image
from sklearn.datasets import load_sample_images

from shards.console import UserError
from shards.dataset import load_dataset, open_index
from shards.duplicates import BITS, alike, find_copies, near_pairs
from shards.pictures import Survey, decoded, perceptual_hash, survey, thumbnails


def crop(seed: int) -> Image.Image:
    """A piece of a photograph, 180 x 140; neighbouring seeds share little of it."""
    photo = Image.fromarray(load_sample_images().images[seed % 2])
    left, top = 180 * (seed // 2 % 3), 140 * (seed // 6 % 3)
    return photo.crop((left, top, left + 180, top + 140))


def saved_again(image: Image.Image) -> dict[str, bytes]:
    half = (image.width // 2, image.height // 2)
    return {
        "poor.jpg": encoded(image, quality=40),
        "half.jpg": encoded(image.resize(half, Image.Resampling.BILINEAR), quality=85),
        "double.jpg": encoded(image.resize((360, 280), Image.Resampling.BICUBIC), quality=85),
        "squeezed.png": encoded(image.resize((128, 128)), "PNG"),
        "other.webp": encoded(image, "WEBP", quality=60),
        "bright.jpg": encoded(image.point(lambda level: min(255, int(1.1 * level))), quality=90),
    }


def write_photos(folder, train: dict[str, bytes], test: dict[str, bytes], labels: str = "0"):
    (folder / "images").mkdir(parents=True)
    for name, data in (train | test).items():
        (folder / "images" / name).write_bytes(data)
    write_table(folder / "train.csv", ["ImageID", "Labels"], [[name, labels] for name in train])
    write_table(folder / "test.csv", ["ImageID"], [[name] for name in test])
    assert pack_raw(folder, folder / "out", "--test-csv", folder / "test.csv") == 0
    dataset = load_dataset(folder / "out")
    return {name: open_index(dataset, name) for name in dataset.splits}


def names(indexes, pictures: Survey, group) -> set[str]:
    return {indexes[pictures.names[pictures.split[i]]].image_id(pictures.row[i]) for i in group.members}


def test_hash_is_the_dct_written_out():
    image = crop(3)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX)).astype(float)
    wave = np.cos(np.pi * (np.arange(32) + 0.5)[None] * np.arange(8)[:, None] / 32)
    wave *= np.where(np.arange(8) == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))[:, None]
    low = (wave @ grey @ wave.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    assert perceptual_hash(image) == np.packbits(bits).view(np.uint64)[0]
    assert bits.sum() == 31


def test_pairs_are_those_of_a_search_over_all():
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**63, 40, dtype=np.uint64)
    hashes = np.repeat(centres, 12)
    for _ in range(9):  # up to 9 flipped bits: pairs on both sides of the limit
        flip = rng.random(len(hashes)) < 0.5
        hashes[flip] ^= np.uint64(1) << rng.integers(0, 64, flip.sum()).astype(np.uint64)
    tiny = np.broadcast_to(rng.integers(0, 256, 192).astype(np.uint8), (len(hashes), 192))
    far = np.bitwise_count(hashes[:, None] ^ hashes[None])
    wanted = np.argwhere(np.triu(far <= BITS, 1))
    found = near_pairs(hashes, tiny)
    assert len(wanted) > 500
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert len(near_pairs(hashes[:0], tiny[:0])) == 0


def test_copies_and_leaks_are_found(tmp_path):
    train = {f"{seed}.jpg": encoded(crop(seed), quality=92) for seed in range(12)}
    test = {f"leak-{name}": data for name, data in saved_again(crop(5)).items()}
    train |= {f"again-{name}": data for name, data in saved_again(crop(7)).items()}
    train["same.jpg"] = train["9.jpg"]
    indexes = write_photos(tmp_path / "raw", train, test | {"new.jpg": encoded(crop(15))})
    pictures = survey(indexes, most=10**6, workers=1)
    found = find_copies(pictures)
    assert [names(indexes, pictures, group) for group in found] == [
        {"5.jpg", *test},
        {"7.jpg", *(name for name in train if name.startswith("again-"))},
        {"9.jpg", "same.jpg"},
    ]
    assert [group.leak for group in found] == [True, False, False]
    assert found[0].splits == ("train", "test")
    assert [group.same_bytes for group in found] == [False, False, True]


def test_different_pictures_are_not_copies(shards):
    dataset = load_dataset(shards)
    indexes = {name: open_index(dataset, name) for name in dataset.splits}
    pictures = survey(indexes, most=10**6, workers=1)
    assert len(pictures) == sum(map(len, indexes.values()))
    assert find_copies(pictures) == []


def test_colour_tells_pictures_apart():
    def shirt(colour: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (16, 8, 48, 60))
        image.paste((90, 90, 90), (28, 20, 36, 30))
        return image

    images = [shirt((200, 40, 40)), shirt((60, 70, 210)), shirt((196, 44, 42))]
    tiny = np.array([np.asarray(image.resize((8, 8), Image.Resampling.BOX)).ravel() for image in images])
    assert alike(tiny[:1], tiny[2:]).all() and not alike(tiny[:1], tiny[1:2]).any()
    hashes = np.full(3, perceptual_hash(images[0]))
    assert near_pairs(hashes, tiny).tolist() == [[0, 2]]


def test_plain_pictures_only_by_their_bytes(tmp_path):
    plain = {f"{level}.png": encoded(Image.new("RGB", (20, 20), (level,) * 3), "PNG") for level in (0, 120, 255)}
    indexes = write_photos(tmp_path / "raw", plain | {"twin.png": plain["120.png"]}, {"t.jpg": encoded(picture())})
    pictures = survey(indexes, most=10**6, workers=1)
    assert [names(indexes, pictures, group) for group in find_copies(pictures)] == [{"120.png", "twin.png"}]


def test_the_survey_says_what_is_broken(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=6)
    assert pack_raw(raw, tmp_path / "out") == 0
    index = open_index(load_dataset(tmp_path / "out"), "train")
    with index.shard_path(0).open("r+b") as file:
        file.seek(index.offset[2])
        file.write(b"\0" * int(index.size[2]))
    pictures = survey({"train": index}, most=10**6, workers=1)
    assert [(split, row) for split, row, _ in pictures.problems] == [("train", 2)]
    assert "not a picture" in pictures.problems[0][2]
    assert pictures.size.tolist() == [[20, 16], [20, 16], [0, 0], [20, 16], [20, 16], [20, 16]]
    assert find_copies(pictures) == []
    made = thumbnails({"train": index}, [("train", 5), ("train", 2)], workers=1)
    assert list(made) == [("train", 5)]
    assert Image.open(io.BytesIO(made["train", 5])).size == (20, 16)
    index.shard_path(0).unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar cannot be read \(No such file"):
        survey({"train": index}, most=10**6, workers=1)


def test_a_part_is_spread_evenly_over_the_splits(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=30, test=10)
    assert pack_raw(raw, tmp_path / "out", "--test-csv", raw / "test.csv") == 0
    dataset = load_dataset(tmp_path / "out")
    indexes = {name: open_index(dataset, name) for name in dataset.splits}
    pictures = survey(indexes, most=20, workers=1)
    assert pictures.total == 40
    assert np.bincount(pictures.split).tolist() == [15, 5]
    rows = pictures.row[pictures.split == 0]
    assert rows[0] == 0 and rows[-1] == 29 and set(np.diff(rows)) == {2, 3}


def test_sizes_are_upright():
    turned = Image.Exif()
    turned[0x0112] = 6
    size, image = decoded(encoded(picture(size=(400, 160)), exif=turned), 32)
    assert size == (160, 400)
    assert image.width < image.height < 400, "decoded at a fraction"


def test_pictures_of_one_colour_are_no_copies_whatever_the_colour():
    tiny = np.array([np.tile([red, 0, 0], 64) for red in (40, 80, 200)], np.uint8)
    assert len(near_pairs(np.zeros(3, np.uint64), tiny)) == 0
