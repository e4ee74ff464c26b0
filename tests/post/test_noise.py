"""`mlc noise` on a small index: what it lists, what it drops, how it is scored, what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
from indexes import CLASSES, make_index
from PIL import Image
from sklearn.metrics import average_precision_score

from mlc.data.filters import named, read_names
from mlc.data.prediction_files import write_csv, write_probabilities
from mlc.data.truth import labelled_index
from mlc.post import noise
from mlc.post.label_errors import METHODS, errors, suspects
from shards.console import run
from shards.dataset import load_dataset

WRONG = {
    5: "dog",
    17: "owl",
    40: "cat",
    93: "tag::a=b",
    100: "cat",
    101: "cat",
}  # row -> the label that is there or not by mistake


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, index, given, probabilities of a model that knows the truth): predictions and the recorded truth."""
    folder = tmp_path_factory.mktemp("noise")
    index = make_index(folder / "data", 200, seed=3)
    given = index.targets(np.arange(200)) > 0.5
    true = given.copy()
    for row, name in WRONG.items():
        true[row, CLASSES.index(name)] ^= True
    p = np.clip(true * 0.7 + np.random.default_rng(0).uniform(0.05, 0.25, true.shape), 0, 1)
    write_predictions(folder / "oof.csv", index, p)

    def names(row):
        return " ".join(CLASSES[c] for c in np.flatnonzero(row))

    rows = [(index.image_id(r), names(given[r]), names(true[r])) for r in WRONG]
    rows.append(("of another split.jpg", "cat", "dog"))
    write_csv(folder / "wrong.csv", ["ImageID", "Labels", "TrueLabels"], rows)
    return folder, index, given, p


def write_predictions(path, index, p, rows=None):
    """The rows backwards, the classes too: both are found by name."""
    rows = np.arange(len(p))[::-1] if rows is None else rows
    lines = ([index.image_id(row), *p[row, ::-1]] for row in rows)
    write_csv(path, ["ImageID", *CLASSES[::-1]], lines)


def call(folder, *more) -> int:
    return run(noise.main, [str(folder / "oof.csv"), "--data", str(folder / "data"), *more])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_flipped_labels_come_first_and_their_images_are_dropped(setting, tmp_path, capsys, method):
    folder, index, given, p = setting
    more = ["--against", str(folder / "wrong.csv"), "--out", str(tmp_path), "--method", method, "--json"]
    assert call(folder, *more, "--most", "30") == 0
    found = json.loads(capsys.readouterr().out)
    for name, side in noise.SIDES.items():
        wrong = {(r, label) for r, label in WRONG.items() if given[r, CLASSES.index(label)] == side}
        rows = read(tmp_path / f"{name}.csv")
        assert len(rows) == 30
        assert {(row["key"], row["label"]) for row in rows[: len(wrong)]} == {
            (index.key(r), label) for r, label in wrong
        }
        assert all(given[int(row["ImageID"][:-4]), CLASSES.index(row["label"])] == side for row in rows)
        scores = [float(row["score"]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        assert found["against"].get(f"{name}_ap", 1) == pytest.approx(1)
        assert found["against"].get(f"{name}_first_24", 0) == len(wrong)
    assert found["suspicious_labels"] == suspects(errors(p, given), given)[:, :4].sum()
    assert found["not_judged"] == ["nothing"]  # no image has that class
    assert found["against"]["images_ap"] == pytest.approx(1)
    drop = named(index, read_names(tmp_path / "drop.csv"))
    assert set(WRONG) <= set(np.flatnonzero(drop)) and drop.sum() == found["dropped"] == 10
    assert (tmp_path / "against.png").read_bytes()[:4] == b"\x89PNG"


def test_the_curve_is_scikit_learns_over_the_worst_label_of_an_image(setting, tmp_path, capsys):
    folder, index, given, p = setting
    worse = np.clip(p + np.random.default_rng(1).normal(0, 0.3, p.shape), 0, 1)
    write_predictions(folder / "worse.csv", index, worse)
    argv = [str(folder / "worse.csv"), "--data", str(folder / "data"), "--against", str(folder / "wrong.csv")]
    assert run(noise.main, [*argv, "--out", str(tmp_path), "--method", "error", "--drop", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against"]
    error = np.where(given, 1 - worse.astype(np.float32), worse.astype(np.float32))[:, :4]
    wrong = np.isin(np.arange(len(p)), list(WRONG))
    assert found["images_ap"] == pytest.approx(average_precision_score(wrong, error.max(1)), abs=1e-6)
    worst = np.argsort(-error.max(1), kind="stable")[:20]
    assert found["dropped_precision"] == pytest.approx(wrong[worst].mean())
    assert found["dropped_recall"] == pytest.approx(wrong[worst].sum() / len(WRONG))
    assert len(read(tmp_path / "drop.csv")) == 20


def test_the_table_is_for_people(setting, tmp_path, capsys):
    folder = setting[0]
    assert call(folder, "--out", str(tmp_path), "--against", str(folder / "wrong.csv")) == 0
    said = capsys.readouterr()
    assert "suspicious labels on" in said.out and "not judged" in said.out and "recall 1.000" in said.out
    assert "--drop-rows" in said.err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--split", "val"], "has no split 'val'"),
        (["--group", "tags"], "--group tags: the data set has the groups none"),
        (["--against", "nowhere.csv"], "cannot read nowhere.csv"),
    ],
)
def test_mistakes_are_one_line(setting, tmp_path, capsys, more, words):
    assert call(setting[0], "--out", str(tmp_path), *more) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_other_files_are_refused_by_name(setting, tmp_path, capsys):
    folder, index, _, p = setting
    write_predictions(tmp_path / "few.csv", index, p, rows=range(150))
    argv = ["--data", str(folder / "data"), "--out", str(tmp_path)]
    assert run(noise.main, [str(tmp_path / "few.csv"), *argv]) == 2
    assert "no row for 50 of the 200 images of train, such as 150.jpg" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text("ImageID,Labels,TrueLabels\n999.jpg,dog,cat\n")
    assert call(folder, "--out", str(tmp_path), "--against", str(tmp_path / "wrong.csv")) == 2
    assert "none of its 1 images with wrong labels is in the split 'train'" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text("ImageID,Labels,TrueLabels\n5.jpg,unicorn,cat\n")
    assert call(folder, "--out", str(tmp_path), "--against", str(tmp_path / "wrong.csv")) == 2
    assert "line 2: label 'unicorn' is none of the 5 classes of" in capsys.readouterr().err
    (tmp_path / "wrong.csv").write_text("ImageID,Labels,TrueLabels\n5.jpg,cat dog owl,cat\n")
    assert call(folder, "--out", str(tmp_path), "--against", str(tmp_path / "wrong.csv")) == 2
    assert "5.jpg has other labels in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        noise.main(["oof.csv", "--data", "x", "--drop", "4"])
    assert "between 0 and 1" in capsys.readouterr().err


def test_the_rare_images_of_a_class_that_no_model_can_tell_are_not_dropped(tmp_path, capsys):
    """They are all improbable, and `error` takes nothing else for wrong."""
    index = make_index(tmp_path / "data", 400, seed=3)
    given = index.targets(np.arange(400)) > 0.5
    rng = np.random.default_rng(0)
    p = np.clip(given * 0.6 + rng.uniform(0.1, 0.3, given.shape), 0, 1)
    owl = CLASSES.index("owl")
    p[:, owl] = rng.uniform(0.01, 0.04, 400)
    wrong = np.flatnonzero(given[:, 0])[:8]
    p[wrong, 0] = rng.uniform(0.06, 0.1, 8)
    write_predictions(tmp_path / "oof.csv", index, p)
    dropped = {}
    for method in ("relative", "error"):
        more = ["--method", method, "--drop", "0.02", "--out", str(tmp_path / method)]
        assert call(tmp_path, *more) == 0
        dropped[method] = set(np.flatnonzero(named(index, read_names(tmp_path / method / "drop.csv"))))
    rare = set(np.flatnonzero(given[:, owl]))
    assert dropped["relative"] == set(wrong) and rare <= dropped["error"] and not rare & dropped["relative"]


def test_a_list_is_drawn_too_and_a_picture_that_is_gone_says_so(shards, tmp_path, capsys):
    index = labelled_index(load_dataset(shards), "train")
    p = np.clip(index.targets(np.arange(len(index))) + np.random.default_rng(0).normal(0, 0.3, (len(index), 18)), 0, 1)
    ids = [index.image_id(row) for row in range(len(index))]
    write_probabilities(tmp_path / "oof.csv", ids, load_dataset(shards).classes, p.astype(np.float32))
    gone = tmp_path / "shards"
    shutil.copytree(shards, gone)
    next(gone.glob("train-*.tar")).unlink()
    for data in (shards, gone):
        assert run(noise.main, [str(tmp_path / "oof.csv"), "--data", str(data), "--out", str(tmp_path)]) == 0
        for name in noise.SIDES:
            assert Image.open(tmp_path / f"{name}.png").size == (1320, 1100)
