"""`mlc ensemble` on files: matched by name, the numbers of pandas-like arithmetic, mistakes in one line."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import fbeta_score

from mlc import ensemble
from mlc.data.prediction_files import write_probabilities, write_submission
from mlc.data.prediction_stack import read_stack
from mlc.metrics import combine, multilabel
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index

CLASSES = ["cat", "dog", "10", "9"]
IDS = [f"{number}.jpg" for number in range(40)]


@pytest.fixture
def world(tmp_path) -> dict[str, np.ndarray]:
    """a.csv, b.csv (its rows and columns in another order) and c.arrow, truth.csv; the tables by name."""
    rng = np.random.default_rng(0)
    target = rng.random((40, 4)) < 0.4
    tables = {
        name: (rng.random((40, 4)) * 0.6 + 0.4 * target * skill).astype(np.float32)
        for name, skill in (("a", 1.0), ("b", 0.6), ("c", 0.8))
    }
    write_probabilities(tmp_path / "a.csv", IDS, CLASSES, tables["a"])
    rows, columns = rng.permutation(40), [2, 0, 3, 1]
    shuffled = tables["b"][rows][:, columns]
    write_probabilities(tmp_path / "b.csv", [IDS[r] for r in rows], [CLASSES[c] for c in columns], shuffled)
    write_probabilities(tmp_path / "c.arrow", IDS, CLASSES, tables["c"])
    write_submission(tmp_path / "truth.csv", IDS[::-1], CLASSES, target[::-1])
    return tables | {"truth": target}


def call(tmp_path: Path, *argv: str) -> int:
    return run_verb(
        ensemble.main, [str(tmp_path / arg) if "." in arg and (tmp_path / arg).exists() else arg for arg in argv]
    )


def out(tmp_path: Path, *argv: str) -> list[str]:
    return [*argv, "--out", str(tmp_path / "out.csv")]


def table(path: Path) -> np.ndarray:
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header == ["ImageID", *CLASSES] and [row[0] for row in rows] == IDS
    return np.array([[float(p) for p in row[1:]] for row in rows], np.float32)


def labels(path: Path) -> np.ndarray:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["ImageID"] for row in rows] == IDS
    return np.array([[name in row["Labels"].split() for name in CLASSES] for row in rows])


# ---- means -----------------------------------------------------------------------------------------------------------


def test_a_weighted_mean_by_name_and_its_submission(world, tmp_path, capsys):
    argv = ["a.csv", "b.csv", "c.arrow", "--weights", "0.901,0.885,0.5", "--threshold", "0.45"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    expected = np.average([world["a"], world["b"], world["c"]], axis=0, weights=[0.901, 0.885, 0.5])
    found = table(tmp_path / "out.csv")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(labels(tmp_path / "out-submission.csv"), found > np.float32(0.45))
    assert capsys.readouterr().out == "" and not (tmp_path / "out-weights.json").exists()


def test_arrow_out_is_the_same_table(world, tmp_path):
    assert call(tmp_path, "a.csv", "b.csv", "--out", str(tmp_path / "mean.arrow")) == 0
    assert call(tmp_path, *out(tmp_path, "a.csv", "b.csv")) == 0
    found = read_stack([tmp_path / "mean.arrow", tmp_path / "out.csv"])
    np.testing.assert_array_equal(found.values[0], found.values[1])
    with pa.ipc.open_file(tmp_path / "mean.arrow") as reader:
        assert reader.schema.names == ["ImageID", *CLASSES]


def test_an_index_that_pandas_left_is_no_class(world, tmp_path):
    with (tmp_path / "a.csv").open() as file:
        lines = file.read().splitlines()
    (tmp_path / "d.csv").write_text("\n".join(f"{row - 1 if row else ''},{line}" for row, line in enumerate(lines)))
    assert call(tmp_path, *out(tmp_path, "d.csv", "b.csv")) == 0
    np.testing.assert_allclose(table(tmp_path / "out.csv"), (world["a"] + world["b"]) / 2, atol=1e-6)


def test_geometric_and_rank(world, tmp_path):
    stack = np.stack([world["a"], world["b"]])
    for method, expected in (("geometric", np.sqrt(stack[0] * stack[1])), ("rank", combine.ranks(stack).mean(0))):
        assert call(tmp_path, *out(tmp_path, "a.csv", "b.csv", "--weights", method)) == 0
        np.testing.assert_allclose(table(tmp_path / "out.csv"), expected, atol=1e-6)


# ---- tuning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tuned", "tuned-per-class", "greedy"])
def test_weights_tuned_on_one_set_of_files_serve_another(world, tmp_path, capsys, method):
    argv = ["a.csv", "b.csv", "--weights", method, "--truth", "truth.csv", "--threshold", "tuned"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    shown = capsys.readouterr().out
    assert "honest" in shown and "a.csv" in shown and "equal" in shown and method in shown
    written = json.loads((tmp_path / "out-weights.json").read_text())
    weights = written["weights"]
    weights = np.array([weights[name] for name in CLASSES]).T if isinstance(weights, dict) else np.array(weights)
    np.testing.assert_allclose(weights.sum(0), 1)
    scores, truth = table(tmp_path / "out.csv"), world["truth"]
    np.testing.assert_allclose(scores, combine.mean(np.stack([world["a"], world["b"]]), weights), atol=1e-6)
    assert written["value"]["f1_samples"] == pytest.approx(combine.value(scores, truth, "f1_samples"))
    chosen = labels(tmp_path / "out-submission.csv")
    assert multilabel.f1_samples(chosen, truth) == pytest.approx(written["value"]["f1_samples"])

    write_probabilities(tmp_path / "t1.csv", IDS, CLASSES[::-1], world["a"][:, ::-1])  # "test" files of the two models
    write_probabilities(tmp_path / "t2.csv", IDS, CLASSES[::-1], world["b"][:, ::-1])
    files = [str(tmp_path / name) for name in ("t1.csv", "t2.csv")]
    given = ["--weights", str(tmp_path / "out-weights.json"), "--threshold", str(tmp_path / "out-thresholds.json")]
    assert run_verb(ensemble.main, [*files, *given, "--out", str(tmp_path / "test.csv")]) == 0
    found = read_stack([tmp_path / "out.csv", tmp_path / "test.csv"]).values
    np.testing.assert_array_equal(found[0], found[1])
    assert run_verb(ensemble.main, [*files, files[0], *given, "--out", str(tmp_path / "no.csv")]) == 2
    assert "is named twice" in capsys.readouterr().err
    third = [*files, str(tmp_path / "c.arrow"), *given[:2], "--out", str(tmp_path / "no.csv")]
    assert run_verb(ensemble.main, third) == 2
    assert "is for 2 files" in capsys.readouterr().err and not (tmp_path / "no.csv").exists()


def test_compare_shows_all_kinds_and_the_honest_best(world, tmp_path, capsys):
    argv = ["a.csv", "b.csv", "c.arrow", "--truth", "truth.csv", "--compare", "--metric", "f1_micro"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*ensemble.METHODS, "a.csv", "b.csv", "c.arrow", "best honest f1_micro"))
    np.testing.assert_allclose(
        table(tmp_path / "out.csv"), np.mean([world[n] for n in "abc"], axis=0), atol=1e-6
    )  # what was asked for: equal


# ---- label sets ------------------------------------------------------------------------------------------------------


def test_votes_of_submissions_and_of_probabilities(world, tmp_path, capsys):
    sets = {name: world[name] > 0.5 for name in "abc"}
    write_submission(tmp_path / "s1.csv", IDS, CLASSES, sets["a"])
    write_submission(tmp_path / "s2.csv", IDS[::-1], CLASSES, sets["b"][::-1])
    argv = ["--vote", "s1.csv", "s2.csv", "c.arrow", "--weights", "2,1,2", "--threshold", "0.5", "--truth", "truth.csv"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    expected = 2 * sets["a"] + sets["b"] + 2 * sets["c"] > 2.5
    np.testing.assert_array_equal(labels(tmp_path / "out.csv"), expected)
    f1 = multilabel.f1_samples(expected, world["truth"])
    assert f"together: f1_samples {f1:.4f}" in capsys.readouterr().out
    assert call(tmp_path, *out(tmp_path, "--vote", "s1.csv", "s2.csv", "--weights", "0.90125,0.9009")) == 0
    assert "s1.csv has 0.500 of the weight and decides alone" in capsys.readouterr().err
    np.testing.assert_array_equal(labels(tmp_path / "out.csv"), sets["a"])
    assert call(tmp_path, *out(tmp_path, "--vote", "s1.csv", "s2.csv", "--share", "0.4")) == 0
    np.testing.assert_array_equal(labels(tmp_path / "out.csv"), sets["a"] | sets["b"])


def test_a_union_with_a_threshold_each(world, tmp_path):
    (tmp_path / "t.json").write_text('{"metric": "f1_samples", "global": 0.3, "value": 0.5}')
    argv = ["--union", "a.csv", "b.csv", "--threshold", f"0.8,{tmp_path / 't.json'}"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    expected = (world["a"] > np.float32(0.8)) | (world["b"] > np.float32(0.3))
    np.testing.assert_array_equal(labels(tmp_path / "out.csv"), expected)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def drop_row(tables, tmp_path):
    write_probabilities(tmp_path / "b.csv", IDS[1:], CLASSES, tables["b"][1:])


def extra_row(tables, tmp_path):
    write_probabilities(tmp_path / "b.csv", [*IDS, "new.jpg"], CLASSES, np.vstack([tables["b"], tables["b"][:1]]))


def drop_class(tables, tmp_path):
    write_probabilities(tmp_path / "b.csv", IDS, CLASSES[1:], tables["b"][:, 1:])


def extra_class(tables, tmp_path):
    write_probabilities(tmp_path / "b.csv", IDS, [*CLASSES, "cow"], np.hstack([tables["b"], tables["b"][:, :1]]))


def not_a_number(tables, tmp_path):
    tables["b"][3, 2] = np.nan
    write_probabilities(tmp_path / "b.csv", IDS, CLASSES, tables["b"])


def submission(tables, tmp_path):
    write_submission(tmp_path / "b.csv", IDS, CLASSES, tables["b"] > 0.5)


def other_truth(tables, tmp_path):
    write_submission(tmp_path / "truth.csv", IDS, [*CLASSES[:3], "dogg"], tables["truth"])


def short_truth(tables, tmp_path):
    write_submission(tmp_path / "truth.csv", IDS[2:], CLASSES, tables["truth"][2:])


def empty_truth(tables, tmp_path):
    write_submission(tmp_path / "truth.csv", IDS, CLASSES, tables["truth"] & False)


def negative(tables, tmp_path):
    (tmp_path / "w.json").write_text('{"files": ["a", "b"], "weights": [2, -1]}')


def other_classes(tables, tmp_path):
    (tmp_path / "w.json").write_text('{"files": ["a", "b"], "weights": {"cow": [0.5, 0.5]}}')


@pytest.mark.parametrize(
    "change, argv, words",
    [
        (drop_row, [], "a.csv has image '0.jpg', PATH/b.csv has not"),
        (extra_row, [], "b.csv has image 'new.jpg', PATH/a.csv has not"),
        (drop_class, [], "a.csv has class 'cat', PATH/b.csv has not"),
        (extra_class, [], "b.csv has class 'cow', PATH/a.csv has not"),
        (not_a_number, [], "b.csv: image 3.jpg, class 10: nan is no probability"),
        (
            submission,
            [],
            "b.csv is a submission, label sets without probabilities; `mlc ensemble --vote` combines",
        ),
        (None, ["--weights", "0.5"], "--weights 0.5: 1 weights for 2 files"),
        (None, ["--weights", "1,-1"], "weights are numbers from 0 on"),
        (None, ["--weights", "0,0"], "not all of them 0"),
        (None, ["--weights", "tunde"], "did you mean tuned?"),
        (None, ["--weights", "tuned"], "--weights tuned needs the truth: --data DIR --split S, or --truth CSV"),
        (None, ["--weights", "none.json"], "none.json cannot be read"),
        (negative, ["--weights", "PATH/w.json"], "w.json: weights are numbers from 0 on"),
        (other_classes, ["--weights", "PATH/w.json"], "it or the predictions have no class '10'"),
        (None, ["--threshold", "high"], "--threshold high: expected a number"),
        (None, ["--threshold", "nan"], "--threshold nan: expected a number"),
        (None, ["--threshold", "tuned"], "--threshold tuned needs the truth"),
        (None, ["--compare"], "--compare needs the truth"),
        (None, ["--vote", "--union"], "give --vote or --union, not both"),
        (None, ["--vote", "--share", "1"], "--share 1: expected a part of the weight"),
        (None, ["--union"], "a.csv has probabilities: give --threshold"),
        (None, ["--vote", "--threshold", "0.1,0.2,0.3"], "3 for 2 files"),
        (None, ["--vote", "--weights", "rank"], "--weights rank is for probabilities"),
        (
            other_truth,
            ["--truth", "truth.csv"],
            "'dogg' is none of the 4 classes of the predictions; did you mean dog?",
        ),
        (short_truth, ["--truth", "truth.csv"], "truth.csv: no row for 2 of the 40 predicted images, such as 0.jpg"),
        (empty_truth, ["--truth", "truth.csv"], "0 labels are too few"),
        (None, ["--truth", "truth.csv", "--metric", "f3"], "'f3' is no metric"),
        (None, ["--wieghts", "equal"], "did you mean --weights?"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(world, tmp_path, capsys, change, argv, words):
    if change:
        change(world, tmp_path)
    try:
        argv = [arg.replace("PATH", str(tmp_path)) for arg in argv]
        assert call(tmp_path, *out(tmp_path, "a.csv", "b.csv", *argv)) == 2
    except SystemExit as stop:  # a flag that there is not
        assert stop.code == 2
    said = capsys.readouterr().err
    assert words.replace("PATH", str(tmp_path)) in said and len(said.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


def test_one_file_and_the_output_among_the_files_are_refused(world, tmp_path, capsys):
    assert call(tmp_path, *out(tmp_path, "a.csv")) == 2
    said = capsys.readouterr().err
    assert "one file is no ensemble; give two, or --vote --threshold T for its labels alone" in said
    before = (tmp_path / "a.csv").read_bytes()
    assert call(tmp_path, "a.csv", "b.csv", "--out", "a.csv") == 2
    assert "is one of the files" in capsys.readouterr().err and (tmp_path / "a.csv").read_bytes() == before


def test_the_vote_of_one_file_is_its_submission(world, tmp_path, capsys):
    assert call(tmp_path, *out(tmp_path, "--vote", "a.csv", "--threshold", "0.45")) == 0
    np.testing.assert_array_equal(labels(tmp_path / "out.csv"), world["a"] > np.float32(0.45))
    assert "decides alone" not in capsys.readouterr().err


def test_any_fbeta_scores_an_ensemble(world, tmp_path, capsys):
    argv = ["a.csv", "b.csv", "--truth", "truth.csv", "--weights", "greedy", "--threshold", "tuned"]
    assert call(tmp_path, *out(tmp_path, *argv, "--metric", "f2_samples")) == 0
    assert "best honest f2_samples" in capsys.readouterr().out
    scores = table(tmp_path / "out.csv")
    tuned = json.loads((tmp_path / "out-thresholds.json").read_text())
    every = [fbeta_score(world["truth"], scores > t, beta=2, average="samples") for t in np.unique(scores)]
    assert tuned["metric"] == "f2_samples" and tuned["value"] == pytest.approx(max(every))


def test_a_group_of_a_packed_data_set_has_weights_of_its_own(shards, tmp_path, capsys):
    """As where one model was trained for the tags alone: on the split with labels, then on the one without."""
    dataset = load_dataset(shards)
    ids = open_index(dataset, "val").batch.column("image_id").to_pylist()
    first, other = dataset.groups
    classes = dataset.classes[::-1]
    mine = np.array([name in dataset.groups[other] for name in classes])
    a, b = np.random.default_rng(0).random((2, len(ids), len(classes))).astype(np.float32)
    write_probabilities(tmp_path / "a.csv", ids, classes, a)
    write_probabilities(tmp_path / "b.csv", ids, classes, b)
    argv = ["a.csv", "b.csv", "--data", str(shards), "--weights"]
    for text, expected in (
        (f"1,0;{other}=0,1", np.where(mine, b, a)),
        (f"{other}=1,3;3,1", np.where(mine, (a + 3 * b) / 4, (3 * a + b) / 4)),
        (f"{first}=0,1", np.where(mine, (a + b) / 2, b)),
    ):
        assert call(tmp_path, *out(tmp_path, *argv, text)) == 0
        np.testing.assert_allclose(read_stack([tmp_path / "out.csv"]).values[0], expected, atol=1e-6)
        shutil.copy(tmp_path / "out-weights.json", tmp_path / "w.json")
        assert call(tmp_path, *out(tmp_path, "a.csv", "b.csv", "--weights", str(tmp_path / "w.json"))) == 0
        np.testing.assert_allclose(read_stack([tmp_path / "out.csv"]).values[0], expected, atol=1e-6)
    for text, words in (("1,0;digits=0,1", "has no group 'digits'"), (f"{other}=1", "1 weights for 2 files")):
        assert call(tmp_path, *out(tmp_path, *argv, text)) == 2 and words in capsys.readouterr().err
    assert call(tmp_path, *out(tmp_path, "a.csv", "b.csv", "--weights", f"{other}=0,1")) == 2
    assert "--data DIR says which classes are in a group" in capsys.readouterr().err


def test_the_truth_of_a_packed_data_set(shards, tmp_path, capsys):
    dataset = load_dataset(shards)
    index = open_index(dataset, "val")
    rows = np.arange(len(index))
    target = index.targets(rows) > 0.5
    noise = np.random.default_rng(0).random((2, *target.shape))
    ids = [index.image_id(row) for row in rows[::-1]]
    for name, own in zip(("a", "b"), noise, strict=True):
        scores = (0.5 * own + 0.5 * target)[::-1].astype(np.float32)
        write_probabilities(tmp_path / f"{name}.csv", ids, dataset.classes, scores)
    argv = ["a.csv", "b.csv", "--data", str(shards), "--weights", "tuned"]
    assert call(tmp_path, *out(tmp_path, *argv)) == 0
    value = json.loads((tmp_path / "out-weights.json").read_text())["value"]
    assert value["map"] == pytest.approx(1.0)  # only if each row has its own truth
    capsys.readouterr()
    assert call(tmp_path, *out(tmp_path, *argv, "--split", "train")) == 2
    assert f"split train: no row for {len(ids)} of the {len(ids)} predicted images" in capsys.readouterr().err
