"""Names of a table and the files that they mean."""

import unicodedata

import pytest
from packing import encoded, opened, pack_raw, picture, write_table

from shards.image_folder import ImageFolder

FORMS = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


@pytest.mark.parametrize(
    ("image_id", "file"),
    [
        ("a", "a.JPG"),
        ("a", "a.bmp"),
        ("a.jpg", "a.JPG"),
        ("1.5", "1.5.PNG"),
        (f"{FORMS[0]}/{FORMS[0]}.jpg", f"{FORMS[1]}/{FORMS[1]}.jpg"),
        (FORMS[1], f"{FORMS[0]}.tif"),
        ("./a", "a.jpg"),
    ],
)
def test_a_name_means_a_file(tmp_path, image_id, file):
    for name in (file, "other.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert ImageFolder(tmp_path).find(image_id) == tmp_path / file
    for gone in ("A", "b/a", ".", "\0", "x" * 300, "other.jpg/a"):
        assert ImageFolder(tmp_path).find(gone) is None


def test_the_usual_name_comes_first(tmp_path):
    for name in ("a.png", "a.JPG", "a.jpg"):
        (tmp_path / name).touch()
    assert ImageFolder(tmp_path).find("a").name == "a.jpg"
    assert ImageFolder(tmp_path).find("a.JPG").name == "a.JPG"


def table_of(folder, names, below="images"):
    """raw/train.csv of these names, and their images below raw/`below`."""
    for number, name in enumerate(names):
        path = folder / "raw" / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    write_table(folder / "raw" / "train.csv", ["ImageID", "Labels"], [[name, "x"] for name in names])
    return folder / "raw"


def test_one_file_is_one_sample(tmp_path, capsys):
    raw = table_of(tmp_path, ["a.jpg", "b.jpg"])
    rows = [["a.jpg", "x"], ["./a.jpg", "x"], ["a", "x"], ["b", "x"]]
    write_table(raw / "train.csv", ["ImageID", "Labels"], rows)
    assert pack_raw(raw, tmp_path / "out") == 2
    said = capsys.readouterr().err
    for line, name in ((3, "./a.jpg"), (4, "a")):
        assert f"line {line}: image '{name}' is the same file as 'a.jpg' in {raw}/train.csv line 2" in said
    assert pack_raw(raw, tmp_path / "out", "--skip-bad", "2") == 0
    index = opened(tmp_path / "out")
    assert [index.image_id(row) for row in range(len(index))] == ["a.jpg", "b"]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("raw", "has none of the 30 images, such as '0.jpg'; {}/raw/images has 30 of 30"),
        ("raw/images/deep", "images has 30 of 30 that were looked up: give --images {}/raw/images\n"),
        ("other", "give the folder that the names in the table are relative to"),
    ],
)
def test_the_folder_that_has_the_images(tmp_path, capsys, images, says):
    raw = table_of(tmp_path, [f"{number}.jpg" for number in range(30)])
    for name in ("raw/images/deep", "other/empty"):
        (tmp_path / name).mkdir(parents=True)
    assert pack_raw(raw, tmp_path / "out", "--images", tmp_path / images) == 2
    said = capsys.readouterr().err
    assert says.format(tmp_path) in said and said.count("\n") == 1


def test_images_in_folders_of_their_own(tmp_path, capsys):
    raw = table_of(tmp_path, [f"of-{number}/{number}.jpg" for number in range(5)])
    write_table(raw / "train.csv", ["ImageID", "Labels"], [[f"{n}.jpg", "x"] for n in range(5)])
    assert pack_raw(raw, tmp_path / "out") == 2
    assert f"'0.jpg' is in {raw}/images/of-0: write names" in capsys.readouterr().err
