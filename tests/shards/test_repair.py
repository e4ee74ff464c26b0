"""Every kind of damage: `mlc verify` names it, `--repair` takes it out of the index, and then nothing is wrong."""

import csv
import json
import shutil

import faults
import numpy as np
import pytest
from packing import opened, pack_raw, tree, write_raw

from shards import index as index_verb
from shards import repair, verify
from shards.console import run
from shards.dataset import load_dataset, write_dataset, write_index


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    raw = write_raw(folder / "raw", samples=30, test=5)
    flags = ("--test-csv", raw / "test.csv", "--shard-size", "8", "--folds", "3")
    assert pack_raw(raw, folder / "out", *flags) == 0
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "out")


@pytest.fixture
def foreign(packed, tmp_path):
    """The training tars alone, to be changed and indexed by a test."""
    (tmp_path / "tars").mkdir()
    for path in packed.glob("train-*.tar"):
        shutil.copy(path, tmp_path / "tars")
    return tmp_path / "tars"


def index_tars(tars):
    assert run(index_verb.main, [str(tars / "train-*.tar"), "--out", str(tars), "-j", "1"]) == 0
    return tars


def problems(out, capsys, *flags) -> list[dict]:
    capsys.readouterr()
    code = run(verify.main, [str(out), "--json", "-j", "1", *flags])
    found = json.loads(capsys.readouterr().out)["problems"]
    assert code == (1 if found and "--repair" not in flags else 0)
    return found


def repaired(out, capsys, *flags) -> dict[str, str]:
    """{key: reason} of what was quarantined; afterwards all is well, and the tars are untouched."""
    before = {name: sha for name, sha in tree(out).items() if name.endswith(".tar")}
    assert problems(out, capsys, *flags)
    rows = {row: content_of(out, row) for row in keys(out)} if (out / "train.arrow").exists() else {}
    assert problems(out, capsys, "--repair", *flags)
    assert problems(out, capsys) == problems(out, capsys, "--decode") == []
    assert {name: sha for name, sha in tree(out).items() if name.endswith(".tar")} == before
    assert not list(out.glob(".*.tmp"))
    listed = list(csv.DictReader((out / repair.QUARANTINE).open(newline="")))
    lost = {row["key"]: row["reason"] for row in listed if row["key"]}
    assert not {(row["shard"], row["key"]) for row in listed} & set(places(out))
    assert all(rows[key] == content_of(out, key) for key in keys(out) if key in rows)  # labels, captions and folds
    return lost


def places(out) -> list[tuple[str, str]]:
    index = opened(out)
    return [(index.shard_path(int(index.shard[row])).name, index.key(row)) for row in range(len(index))]


def keys(out) -> list[str]:
    try:
        return opened(out).batch.column("key").to_pylist()
    except repair.UserError:
        return []


def content_of(out, key) -> tuple:
    index = opened(out)
    row = index.batch.column("key").to_pylist().index(key)
    return index.image_id(row), index.labels(row).tolist(), index.caption(row), int(index.fold[row])


def test_a_clean_data_set_is_left_alone(out, capsys):
    before = tree(out)
    assert run(verify.main, [str(out), "--repair", "-j", "1"]) == 0
    assert "as they were packed" in capsys.readouterr().err
    assert tree(out) == before


def test_flipped_bytes(out, capsys):
    faults.flip_image(out, 3, 9)
    faults.flip_caption(out, 11)
    lost = repaired(out, capsys)
    assert set(lost) == {"3", "9", "11"}
    assert "crc32 differs" in lost["3"] and "another image_id or caption" in lost["11"]
    assert keys(out) == [str(row) for row in range(30) if str(row) not in lost]
    quarantined = list(csv.reader((out / "quarantine.csv").open(newline="")))
    assert quarantined[0] == ["split", "shard", "key", "image_id", "reason"]
    assert quarantined[1][:4] == ["train", "train-000000.tar", "3", "3.jpg"]


def test_a_truncated_tar(out, capsys):
    faults.truncate(out, 12)
    lost = repaired(out, capsys)
    assert set(lost) == {"12", "13", "14", "15"} and "ends inside" in lost["12"] and "no longer" in lost["13"]
    assert load_dataset(out).split("train").shards[1].num_samples == 4
    # It has ended where it ends now: any further change is a problem again.
    path = out / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    assert [(p["shard"], p["key"]) for p in problems(out, capsys)][:1] == [("train-000001.tar", "")]


def test_a_tar_cut_between_an_image_and_its_labels(out, capsys):
    index = opened(out)
    path = out / "train-000000.tar"
    end = int(index.offset[5] + index.size[5])
    path.write_bytes(path.read_bytes()[: end + -end % 512])
    lost = repaired(out, capsys)
    assert set(lost) == {"5", "6", "7"} and "another image_id" in lost["5"]


def test_an_empty_shard(out, capsys):
    (out / "train-000002.tar").write_bytes(b"")
    assert set(repaired(out, capsys)) == {str(row) for row in range(16, 24)}
    assert keys(out) == [str(row) for row in [*range(16), *range(24, 30)]]


def test_a_missing_shard(out, capsys):
    (out / "train-000001.tar").unlink()
    lost = repaired(out, capsys)
    assert set(lost.values()) == {"the shard is missing"} and set(lost) == {str(row) for row in range(8, 16)}
    names = [shard.name for shard in load_dataset(out).split("train").shards]
    assert names == ["train-000000.tar", "train-000002.tar", "train-000003.tar"]
    assert np.bincount(opened(out).shard).tolist() == [8, 8, 6]
    assert json.loads((out / "_info.json").read_text())["splits"]["train"]["filenames"] == names
    assert json.loads((out / "sizes.json").read_text())["train-000003.tar"] == 6


def test_a_shard_replaced_by_a_longer_one(out, capsys):
    """It is another shard now, so the tar is right and the index was old: nothing is lost."""
    faults.append_samples(out, 1, 3)
    assert repaired(out, capsys) == {}
    order = [*range(8), "new0", "new1", "new2", *range(8, 30)]
    assert keys(out) == list(map(str, order))
    assert opened(out).fold[8:11].tolist() == [-1, -1, -1]


def test_an_index_older_than_its_shard(out, capsys):
    faults.swap_samples(out, 2)
    assert repaired(out, capsys) == {}
    assert keys(out)[:5] == ["0", "1", "3", "2", "4"]


def test_a_replaced_shard_is_decoded(out, capsys):
    """Nobody has looked at its images: a header that is right does not do."""

    def half(content):
        return [("new.jpg", content[0][1][:-200]), ("new.json", content[1][1]), *content]

    faults.change_members(out / "train-000000.tar", half)
    lost = repaired(out, capsys)
    assert list(lost) == ["new"] and "does not decode" in lost["new"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: b"", "the image is empty"),
        (lambda: b"not a picture", "not a picture of a known format"),
        (faults.jpeg_bomb, "decompression bombs"),
        (faults.png_bomb, "decompression bombs"),
    ],
)
def test_images_that_a_foreign_tar_came_with(foreign, capsys, data, reason):
    """Their checksums are right, for they were taken from the damage."""
    faults.change_members(foreign / "train-000000.tar", lambda content: faults.with_image(content, "3", data()))
    lost = repaired(index_tars(foreign), capsys)
    assert list(lost) == ["3"] and reason in lost["3"]


def test_an_image_that_only_decoding_finds(foreign, capsys):
    path = foreign / "train-000000.tar"
    faults.change_members(path, lambda content: faults.with_image(content, "3", dict(content)["3.jpg"][:-200]))
    assert problems(index_tars(foreign), capsys) == []
    assert list(repaired(foreign, capsys, "--decode")) == ["3"]


def test_keys_that_come_twice_or_apart(out, capsys):
    """A shard was replaced, and `mlc index`, which would have refused it, was not asked."""

    def tangled(content):
        again = [("9.jpg", faults.picture(1)), ("9.json", b'{"labels": []}')]
        return [*content[3:], *again, *content[:3], ("8.jpg", faults.picture(2))]

    faults.change_members(out / "train-000001.tar", tangled)
    lost = repaired(out, capsys)
    assert set(lost) == {"8", "9"}
    assert "8.jpg is there twice" in lost["8"] and "not next to each other" in lost["9"]
    assert keys(out)[8:15] == ["10", "11", "12", "13", "14", "15", "16"]


def test_a_key_in_two_shards(out, capsys):
    faults.change_members(out / "train-000002.tar", lambda content: [*content, ("3.jpg", faults.picture(1))])
    found = {(p["shard"], p["key"]): p["problem"] for p in problems(out, capsys)}
    assert "not in the index" in found["train-000002.tar", "3"]
    assert repaired(out, capsys)["3"]
    assert keys(out) == list(map(str, range(30)))
    assert opened(out).shard[3] == 0


def test_the_same_rows_twice_in_the_index(out, capsys):
    columns = opened(out).batch.to_pydict()
    write_index(out / "train.arrow", {name: [*values[:4], values[3], *values[5:]] for name, values in columns.items()})
    found = {(p["key"], p["problem"]) for p in problems(out, capsys)}
    assert ("3", "an earlier row of the index has the key as well") in found
    assert ("4", "in the tar, but not in the index") in found
    assert repaired(out, capsys) == {}
    assert keys(out) == list(map(str, range(30)))


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", 10**12), ("offset", 1024), ("labels", [4]), ("key", "other"), ("crc32", 5), ("shard", 2)],
)
def test_a_wrong_cell_in_the_index(out, capsys, column, value):
    """The tar is as it was packed, so it is right."""
    right = opened(out).batch.to_pydict()
    wrong = {name: list(values) for name, values in right.items()}
    wrong[column][3] = value
    write_index(out / "train.arrow", wrong)
    assert problems(out, capsys, "--repair")
    assert problems(out, capsys) == []
    if column == "key":
        right["fold"][3] = -1  # it was known by the key
    assert opened(out).batch.to_pydict() == right


def test_a_damaged_index(out, capsys):
    right = opened(out).batch.to_pydict()
    (out / "train.arrow").write_bytes(b"ARROW1 but not really")
    faults.truncate(load_with_index(out, right), 29)
    capsys.readouterr()
    assert run(verify.main, [str(out), "--repair", "-j", "1"]) == 0
    assert "fold -1 and weight 1" in capsys.readouterr().err
    assert problems(out, capsys) == []
    now = opened(out).batch.to_pydict()
    assert set(now["fold"]) == {-1}
    assert {**now, "fold": right["fold"][:29]} == {name: values[:29] for name, values in right.items()}


def load_with_index(out, columns):
    """A copy of the folder with a good index, whose tars are the same files."""
    copy = out.with_name("copy")
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).hardlink_to(path) if path.suffix == ".tar" else shutil.copy(path, copy)
    write_index(copy / "train.arrow", columns)
    return copy


def test_more_shards_than_dataset_json_has(out, capsys):
    dataset = load_dataset(out)
    object.__setattr__(dataset.splits["train"], "shards", dataset.splits["train"].shards[:3])
    write_dataset(dataset)
    assert set(repaired(out, capsys).values()) == {"its shard is not in dataset.json"}


def test_repair_after_repair(out, capsys):
    """The list grows; what is on it stays out."""
    faults.flip_image(out, 3)
    repaired(out, capsys)
    assert opened(out).path.name == "train.r1.arrow" and not (out / "train.arrow").exists()
    faults.flip_image(out, 3)  # row 3 is key 4 now
    (out / "test-000000.tar").unlink()
    assert set(repaired(out, capsys)) == {"3", "4", "t0", "t1", "t2", "t3", "t4"}
    assert opened(out).path.name == "train.r2.arrow"
    assert load_dataset(out).split("test").num_samples == 0


def test_a_killed_repair_leaves_the_old_data_set(out, capsys, monkeypatch):
    """dataset.json is written last; until then the damage is found as before."""
    faults.flip_image(out, 3)
    before = problems(out, capsys)
    monkeypatch.setattr(repair, "write_dataset", lambda dataset: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(verify.main, [str(out), "--repair", "-j", "1"]) == 130
    monkeypatch.undo()
    assert problems(out, capsys) == before
    assert list(repaired(out, capsys)) == ["3"]


def test_samples_come_back_when_the_tar_does(out, packed, capsys):
    faults.flip_image(out, 3)
    repaired(out, capsys)
    shutil.copy(packed / "train-000000.tar", out)
    (out / "quarantine.csv").unlink()
    assert repaired(out, capsys) == {}
    assert keys(out) == list(map(str, range(30)))


def test_pack_does_not_take_a_repaired_data_set_for_its_own(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=10)
    pack_raw(raw, tmp_path / "out")
    faults.flip_image(tmp_path / "out", 3)
    repaired(tmp_path / "out", capsys)
    assert pack_raw(raw, tmp_path / "out") == 2
    assert "holds another pack" in capsys.readouterr().err


def test_a_foreign_quarantine_and_a_folder_that_cannot_be_written(out, capsys, monkeypatch):
    (out / "quarantine.csv").write_text("a,b\n")
    assert run(verify.main, [str(out)]) == 2
    assert "quarantine.csv: expected the columns split,shard,key,image_id,reason" in capsys.readouterr().err
    (out / "quarantine.csv").unlink()
    faults.flip_image(out, 3)

    def full(*_):
        raise OSError(28, "No space left on device", "train.r1.arrow")

    monkeypatch.setattr(repair, "write_index", full)
    assert run(verify.main, [str(out), "--repair", "-j", "1"]) == 2
    assert "cannot be repaired: No space left on device" in capsys.readouterr().err
