"""Truth and what files say of it meet by name: against dictionaries, in any order, with any rows left over."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from mlc.data.prediction_files import class_columns, is_submission, places, write_probabilities, write_submission
from mlc.data.prediction_stack import Stack, target_of_split, target_of_table
from mlc.data.truth import labels_of, probabilities_of, read_labels, truth_of_split, truth_of_table
from shards.console import UserError
from shards.dataset import load_dataset, open_index
from shards.table import Columns

CLASSES = ("cat", "dog", "owl")
IDS = [f"{number}.jpg" for number in range(9)]


@pytest.fixture
def world(tmp_path):
    """({image: its labels}, {image: probabilities}) of truth.csv and of the two parts p0.csv and p1.arrow."""
    rng = np.random.default_rng(0)
    true = {name: tuple(c for c in CLASSES if rng.random() < 0.5) for name in IDS}
    said = {name: rng.random(3).astype(np.float32) for name in IDS}
    lines = [f"{name},{';'.join(true[name])}" for name in rng.permutation(IDS)]
    (tmp_path / "truth.csv").write_text("\n".join(["Image,Tags", *lines]))
    for file, names in (("p0.csv", IDS[5::-1]), ("p1.arrow", [*IDS[6:], "more.jpg"])):
        scores = np.stack([said.get(name, np.ones(3, np.float32)) for name in names])
        write_probabilities(tmp_path / file, names, CLASSES[::-1], scores[:, ::-1])
    return true, said


COLUMNS = Columns("Image", "Tags", separator=";")


def test_a_table_and_parts_that_together_have_all_its_images(world, tmp_path, capsys):
    true, said = world
    truth = truth_of_table(tmp_path / "truth.csv", COLUMNS, CLASSES, {"pets": ("dog", "cat")})
    assert sorted(truth.ids.to_pylist()) == IDS and truth.groups == {"pets": [1, 0]}
    found = probabilities_of([tmp_path / "p0.csv", tmp_path / "p1.arrow"], truth)
    for row, name in enumerate(truth.ids.to_pylist()):
        assert tuple(c for c, yes in zip(CLASSES, truth.target[row], strict=True) if yes) == true[name]
        np.testing.assert_array_equal(found[row], said[name])
    assert "1 of 4 images of" in capsys.readouterr().err  # more.jpg
    with pytest.raises(
        UserError, match=r"p0.csv: no row for 3 of the 9 images of .*truth.csv, such as [678].jpg; pred"
    ):
        probabilities_of([tmp_path / "p0.csv"], truth)
    with pytest.raises(UserError, match=r"p0.csv: image .*jpg is also in .*p0.csv; give parts without"):
        probabilities_of([tmp_path / "p0.csv"] * 2, truth)


def test_a_submission_in_any_order_with_images_that_nobody_asked_about(world, tmp_path, capsys):
    truth = truth_of_table(tmp_path / "truth.csv", COLUMNS, CLASSES)
    sets = np.random.default_rng(1).random((9, 3)) < 0.5
    write_submission(tmp_path / "s.csv", IDS[::-1], CLASSES, sets[::-1])
    with (tmp_path / "s.csv").open("a") as file:
        file.write("new.jpg,no-class-of-ours\n")
    order = [IDS.index(name) for name in truth.ids.to_pylist()]
    np.testing.assert_array_equal(labels_of(tmp_path / "s.csv", truth), sets[order])
    assert "1 of 10 images of" in capsys.readouterr().err
    assert is_submission(tmp_path / "s.csv") and not is_submission(tmp_path / "p0.csv")
    write_submission(tmp_path / "s.csv", IDS[1:], CLASSES, sets[1:])
    with pytest.raises(UserError, match=r"s.csv: no row for 1 of the 9 images of .*truth.csv, such as 0.jpg"):
        labels_of(tmp_path / "s.csv", truth)
    write_submission(tmp_path / "s.csv", IDS, ("cat", "dgo", "owl"), np.ones((9, 3), bool))
    with pytest.raises(
        UserError, match=r"s.csv line \d: label 'dgo' is none of the 3 classes of .*; did you mean dog\?"
    ):
        labels_of(tmp_path / "s.csv", truth)


def test_a_split_whole_or_in_part(shards):
    dataset = load_dataset(shards)
    index = open_index(dataset, "train")
    truth = truth_of_split(str(shards), "train")
    assert truth.ids.to_pylist() == index.batch.column("image_id").to_pylist()
    assert truth.classes == dataset.classes and truth.groups == dataset.group_columns
    np.testing.assert_array_equal(truth.target, index.targets(np.arange(len(index))))
    part = truth_of_split(str(shards), "train", where=f'"{dataset.classes[0]}" in labels')
    rows = np.flatnonzero(truth.target[:, 0])
    assert 0 < len(rows) < len(index)
    assert part.ids.to_pylist() == [index.image_id(row) for row in rows]
    np.testing.assert_array_equal(part.target, truth.target[rows])
    with pytest.raises(UserError, match="--fold 1: no row is in it"):
        truth_of_split(str(shards), "train", fold=1)
    with pytest.raises(UserError, match="the split 'test' has no labels; name one that has"):
        truth_of_split(str(shards), "test")


def test_the_truth_of_an_ensemble_may_know_more(world, shards, tmp_path):
    """Its images and classes are those of the files; labels of other images matter to nobody."""
    (tmp_path / "more.csv").write_text("ImageID,Labels\nx.jpg,cow\nb.jpg,owl\na.jpg,dog cat\n")
    stack = Stack(pa.array(["a.jpg", "b.jpg"], pa.large_string()), ("dog", "owl", "cat"), np.empty((1, 2, 3)))
    found = target_of_table(stack, tmp_path / "more.csv")
    np.testing.assert_array_equal(found, [[True, False, True], [False, True, False]])
    truth = truth_of_split(str(shards), "train")
    order, columns = np.arange(7)[::-1], np.arange(len(truth.classes))[::-1]
    stack = Stack(truth.ids.take(pa.array(order)), [truth.classes[c] for c in columns], np.empty(0))
    np.testing.assert_array_equal(target_of_split(stack, str(shards), "train"), truth.target[order][:, columns])


def test_all_bad_rows_of_a_table_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("ImageID,Labels\na,x\n,x\nb,x x\na,y\n")
    with pytest.raises(UserError) as error:
        read_labels(tmp_path / "t.csv")
    lines = str(error.value).splitlines()
    assert lines[0].endswith("t.csv: 3 bad rows:") and len(lines) == 4
    assert lines[3].endswith("t.csv line 5: image a comes more than once, first in line 2")


def test_an_index_column_of_pandas_is_no_class(tmp_path):
    (tmp_path / "p.csv").write_text(",ImageID,cat\n0,a,0.5\n")
    assert class_columns(tmp_path / "p.csv") == ("cat",)
    (tmp_path / "p.csv").write_text("ImageID\na\n")
    with pytest.raises(UserError, match="no predictions; they have a column ImageID and one of probabilities"):
        class_columns(tmp_path / "p.csv")


def test_places_are_those_of_a_dictionary():
    rng = np.random.default_rng(0)
    ids, wanted = rng.permutation(50)[:40].astype(str), rng.integers(0, 60, 30).astype(str)
    known = {name: place for place, name in enumerate(ids)}
    found = places(pa.array(wanted, pa.large_string()), pa.array(ids, pa.large_string()))
    assert found.tolist() == [known.get(name, -1) for name in wanted]


def test_verbs_on_files_import_no_torch():
    """It takes seconds, which nobody should wait for who has a table scored."""
    verbs = ("tune", "scores", "ensemble", "post.noise", "post.stack", "post.pseudo", "report.page", "report.compare")
    code = f"import sys, {', '.join(f'mlc.{verb}' for verb in verbs)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
