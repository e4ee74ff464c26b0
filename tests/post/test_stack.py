"""`mlc stack` as a user runs it: files in, honest scores and files out; what it refuses."""

import json
from argparse import Namespace

import numpy as np
import pyarrow as pa
import pytest
from indexes import CLASSES, make_index
from pyarrow import parquet
from scipy.special import expit

from mlc.data.prediction_files import aligned, write_csv
from mlc.metrics.multilabel import mean_average_precision
from mlc.post import stack
from mlc.post.second_level import Inputs
from mlc.post.tables import by_image
from shards.console import UserError, few, run

ROWS = 240


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, index, target): two models' predictions of the split, vectors and numbers in every kind of file."""
    folder = tmp_path_factory.mktemp("stack")
    index = make_index(folder / "data", ROWS, seed=2)
    target = index.targets(np.arange(ROWS)) > 0.5
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        p = expit(rng.normal(0, 1.2, target.shape) + 2 * target - 1)
        write(folder / f"{name}.csv", index, p)
    vectors = rng.normal(0, 0.2, (ROWS, 3)).astype(np.float32) + target[:, :3]
    ids, keys = ([getattr(index, what)(row) for row in range(ROWS)][::-1] for what in ("image_id", "key"))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors[::-1].reshape(-1)), 3)
    table = pa.table({"key": keys, "image_id": ids, "split": ["train"] * ROWS, "features": lists})
    with pa.OSFile(str(folder / "f.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table.drop_columns("image_id"), folder / "f.parquet")
    np.savez(folder / "f.npz", key=np.array(keys), vector=vectors[::-1])
    write_csv(folder / "f.csv", ["ImageID", "x", "y", "z"], ([i, *v] for i, v in zip(ids, vectors[::-1], strict=True)))
    return folder, index, target, vectors


def write(path, index, p):
    write_csv(path, ["ImageID", *CLASSES], ([index.image_id(row), *p[row]] for row in range(len(p))[::-1]))


def call(folder, out, *more) -> int:
    files = [str(folder / "a.csv"), str(folder / "b.csv")]
    return run(stack.main, [*files, "--data", str(folder / "data"), "--out", str(out), "--folds", "3", *more])


def test_scores_are_of_the_file_that_is_written(setting, tmp_path, capsys):
    folder, index, target, _ = setting
    test = ["--test", str(folder / "a.csv"), str(folder / "b.csv"), "--test-split", "train"]
    more = ["--features", str(folder / "f.arrow"), *test, "--json"]
    assert call(folder, tmp_path, *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "stack.json").read_text())
    held_out, refit = (aligned(tmp_path / f"{name}.csv", index, CLASSES) for name in ("oof", "train"))
    learnt = [0, 1, 2, 3]
    assert result["not_learnt"] == ["nothing"]
    expected = mean_average_precision(held_out[:, learnt].astype(float), target[:, learnt])
    assert result["parts"]["stack"]["map"] == pytest.approx(expected, abs=1e-6)
    assert set(result["weights"]) == {"mean", "boosting", "ridge", "neighbours"}
    assert sum(result["weights"].values()) == pytest.approx(1, abs=1e-3)
    mean = np.mean([aligned(folder / f"{name}.csv", index, CLASSES) for name in "ab"], 0)
    for table in (held_out, refit):  # the class that nobody has keeps what the models said
        np.testing.assert_allclose(table[:, 4], mean[:, 4], atol=1e-6)
    # What saw the labels is better than what did not: the score is not of that.
    assert mean_average_precision(refit[:, learnt].astype(float), target[:, learnt]) > expected + 0.02
    assert result["f1_gain"]["mean"] == pytest.approx(np.mean(result["f1_gain"]["folds"]), abs=1e-4)


def test_labels_without_any_sense_give_no_honest_gain(setting, tmp_path, capsys):
    """Predictions that have nothing to do with the labels: who looked at held-out labels would score above chance."""
    folder, index, target, _ = setting
    for name in "ab":
        noise = np.random.default_rng(ord(name)).random(target.shape)
        write(tmp_path / f"{name}.csv", index, noise)
    (tmp_path / "data").symlink_to(folder / "data")
    assert call(tmp_path, tmp_path / "out", "--json") == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    chance = target[:, :4].mean(0).mean()
    assert all(abs(parts[name]["map"] - chance) < 0.1 for name in ("mean", "boosting", "ridge", "stack"))


@pytest.mark.parametrize("kind", ["arrow", "parquet", "npz", "csv"])
def test_numbers_are_read_from_every_kind_of_file(setting, kind):
    folder, index, _, vectors = setting
    found = by_image([folder / f"f.{kind}"], index, "--extra")
    np.testing.assert_allclose(found, vectors, atol=1e-6)
    twice = by_image([folder / f"f.{kind}", folder / "f.csv"], index, "--extra")
    assert twice.shape == (ROWS, 6)


def test_the_table_is_for_people(setting, tmp_path, capsys):
    assert call(setting[0], tmp_path, "--extra", str(setting[0] / "f.csv"), "--candidates", "2") == 0
    said = capsys.readouterr()
    assert "stack: their weighted mean" in said.out and "not learnt" in said.out and "oof.csv, stack.json" in said.err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--test", "a.csv"], "--test names 1 files and there are 2 out-of-fold files"),
        (["--features", "nowhere.npz"], "--features nowhere.npz cannot be read"),
        (["--extra", "FOLDER/a.csv"], None),
        (["--extra", "FOLDER/few.csv"], "few.csv: no row for 239 of the 240 images of train, such as 0.jpg"),
        (["--extra", "FOLDER/bare.csv"], "no numbers in it"),
        (["--extra", "FOLDER/nan.csv"], "image 5.jpg, number 1: nan (1 values are not finite)"),
        (["--split", "test"], "has no split 'test'"),
    ],
)
def test_mistakes_are_one_line(setting, tmp_path, capsys, more, words):
    folder = setting[0]
    (folder / "few.csv").write_text("ImageID,x\n5.jpg,1\n")
    (folder / "bare.csv").write_text("ImageID\n5.jpg\n")
    numbers = "".join(f"{row}.jpg,{'nan' if row == 5 else row}\n" for row in range(ROWS))
    (folder / "nan.csv").write_text("ImageID,x\n" + numbers)
    more = [text.replace("FOLDER", str(folder)) for text in more]
    assert call(folder, tmp_path, *more) == (2 if words else 0)
    said = capsys.readouterr().err
    assert (words or "") in said and "Traceback" not in said


def test_lightgbm_that_is_not_there_is_named(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(setting[0], tmp_path, "--model", "lightgbm") == 2
    assert 'pip install "mlc[stack]"' in capsys.readouterr().err


def test_many_classes_are_not_all_named():
    assert few(["a", "b"]) == "a, b" and few(list("abcd"), 2) == "a, b and 2 more"


@pytest.mark.parametrize("shape", ["one class", "one image of one class", "no class"])
def test_few_classes_that_can_be_learnt(shape):
    """Of a single column scikit-learn's answer has one axis less; and a part of the folds may have no class left."""
    rng = np.random.default_rng(0)
    target = rng.random((60, 1 if shape != "no class" else 0)) < 0.4
    if shape == "one image of one class":
        target[:] = np.arange(60)[:, None] == 0
    models = Inputs(rng.random((2, *target.shape)), np.zeros(target.shape[1], np.int64))
    settings = {"kind": "hist", "most": 64, "k": 20, "seed": 0}
    held_out, weights = stack._nested(models, target, 3, settings)
    assert all(table.shape == target.shape and np.isfinite(table).all() for table in held_out.values())
    assert all(sum(found.values()) == pytest.approx(1) for found in weights)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (np.ones((60, 2), bool), "no class is on some images and not on others"),
        (np.eye(2, dtype=bool), "has 2 images, and --folds 3 needs 6"),
    ],
)
def test_what_cannot_be_learnt_is_one_line(target, words):
    with pytest.raises(UserError, match=words):
        stack._check_learnable(Namespace(split="train", folds=3), target)
