"""Every kind of damage must be found and named, and nothing else."""

import json
import shutil

import pytest
from packing import opened, pack_raw, write_raw

from shards import verify as verb
from shards.console import run
from shards.dataset import load_dataset, write_dataset, write_index


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    raw = write_raw(folder / "raw", samples=20, test=5)
    assert pack_raw(raw, folder / "out", "--test-csv", raw / "test.csv", "--shard-size", "8") == 0
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "out")


def found(capsys, out, *flags) -> list[tuple[str, str, str]]:
    """(shard, key, problem) of a verification, whose exit code agrees."""
    capsys.readouterr()
    code = run(verb.main, [str(out), "--json", "-j", "1", *flags])
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert code == (1 if problems else 0)
    return [(problem["shard"], problem["key"], problem["problem"]) for problem in problems]


def change_bytes(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rewrite_index(out, change):
    """Writes train.arrow again with some cells changed."""
    columns = opened(out).batch.to_pydict()
    change(columns)
    write_index(out / "train.arrow", columns)


def test_a_clean_pack(out, capsys):
    assert run(verb.main, [str(out), "--decode", "-j", "2"]) == 0
    assert "25 samples in 4 shards are as they were packed, every image decodes" in capsys.readouterr().err
    assert found(capsys, out) == []


def test_a_changed_image(out, capsys):
    index = opened(out)
    change_bytes(index.shard_path(1), int(index.offset[9]) + 100, b"\xff\x00\xff")
    assert found(capsys, out) == [
        ("train-000001.tar", "", "sha256 differs from the pack's"),
        ("train-000001.tar", "9", "the image's crc32 differs from the pack's"),
    ]
    assert run(verb.main, [str(out), "-j", "1"]) == 1
    said = capsys.readouterr().err
    assert "2 problems" in said
    assert "train-000001.tar: 9: the image's crc32" in said


def test_a_changed_caption(out, capsys):
    path = out / "train-000000.tar"
    change_bytes(path, path.read_bytes().index(b"caption 1"), b"Caption")
    assert found(capsys, out) == [
        ("train-000000.tar", "", "sha256 differs from the pack's"),
        ("train-000000.tar", "1", "the index has another image_id or caption than the tar"),
    ]


def test_a_shard_that_is_cut_or_gone(out, capsys):
    path = out / "train-000002.tar"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(2500)
    (out / "test-000000.tar").unlink()
    problems = found(capsys, out)
    assert ("train-000002.tar", "", f"2500 bytes, packed with {size}") in problems
    assert ("test-000000.tar", "", "the file is missing") in problems
    assert {key for shard, key, _ in problems if shard == "train-000002.tar"} >= {"17", "18", "19"}
    assert {shard for shard, _, _ in problems} == {"train-000002.tar", "test-000000.tar"}


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("offset", 10**12, "the image runs over the end of the shard"),
        ("offset", -5, "runs over the end"),
        ("offset", 1024, "the index says"),
        ("labels", [4], "the index has other labels than the tar"),
        ("caption", "other", "another image_id or caption"),
        ("image_id", "other", "another image_id or caption"),
        ("key", "other", "in the index, but the tar has no image of that key"),
        ("ext", "png", "the index says"),
        ("crc32", 5, "the image's crc32 differs"),
    ],
)
def test_a_wrong_cell_in_the_index(out, capsys, column, value, says):
    def change(columns):
        assert columns[column][3] != value
        columns[column][3] = value

    rewrite_index(out, change)
    problems = found(capsys, out)
    assert any(says in problem for _, _, problem in problems)
    assert {shard for shard, _, _ in problems} == {"train-000000.tar"}
    assert {key for _, key, _ in problems} <= {"3", "other"}


def test_a_row_in_another_shard(out, capsys):
    rewrite_index(out, lambda columns: columns["shard"].__setitem__(3, 1))
    problems = found(capsys, out)
    assert ("train-000000.tar", "", "the index has 7 samples of it, dataset.json says 8") in problems
    assert ("train-000000.tar", "3", "in the tar, but not in the index") in problems
    assert ("train-000001.tar", "3", "in the index, but the tar has no image of that key") in problems


def test_images_that_do_not_decode(out, capsys):
    """A checksum can be right and the picture bad: a foreign tar is indexed without decoding."""
    index = opened(out)
    path, offset = index.shard_path(0), int(index.offset[2])
    change_bytes(path, offset, b"not a picture")
    dataset = load_dataset(out)
    for name in ("train", "test"):
        (out / f"{name}.arrow").unlink()
    (out / "dataset.json").unlink()
    from shards import index as index_verb

    shards = [str(out / shard.name) for shard in dataset.split("train").shards]
    assert run(index_verb.main, [*shards, "--out", str(out), "-j", "1"]) == 0
    problems = found(capsys, out)
    assert problems == found(capsys, out, "--decode")
    assert [(shard, key) for shard, key, _ in problems] == [("train-000000.tar", "2")]
    assert "not a picture" in problems[0][2]


def test_index_files(out, capsys):
    (out / "test.arrow").write_bytes(b"ARROW1 but not really")
    problems = found(capsys, out)
    assert [(shard, key) for shard, key, _ in problems] == [("test.arrow", "")]
    shutil.rmtree(out)
    assert run(verb.main, [str(out)]) == 2
    assert "no data set at" in capsys.readouterr().err


def test_more_shards_than_dataset_json_has(out, capsys):
    dataset = load_dataset(out)
    object.__setattr__(dataset.splits["train"], "shards", dataset.splits["train"].shards[:2])
    write_dataset(dataset)
    assert ("train-000001.tar", "", "the index names shards that dataset.json does not have") in found(capsys, out)
