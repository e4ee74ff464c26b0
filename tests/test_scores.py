"""`mlc eval` on files as a user has them: shuffled rows and columns, submissions, comparisons, mistakes in one line."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from mlc import scores
from mlc.data.prediction_files import read_predictions
from shards.console import run

CLASSES = ["cat", "dog", 'a, "b"']


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def world(tmp_path):
    """(folder, scores, target): pred.csv and truth.csv of 60 images, rows and columns of pred.csv in another order."""
    rng = np.random.default_rng(0)
    target = rng.random((60, 3)) < 0.4
    p = np.round(0.6 * rng.random((60, 3)) + 0.4 * target, 4).astype(np.float32)
    order = rng.permutation(60)
    rows = [[f"{i}.jpg", *(f"{p[i, c]:.4f}" for c in (2, 0, 1))] for i in order]
    write(tmp_path / "pred.csv", ["ImageID", *(CLASSES[c] for c in (2, 0, 1))], rows)
    labels = [";".join(CLASSES[c] for c in np.flatnonzero(row)) for row in target]
    write(tmp_path / "truth.csv", ["ImageID", "Labels"], [[f"{i}.jpg", text] for i, text in enumerate(labels)])
    return tmp_path, p, target


def evaluated(capsys, *argv) -> dict:
    assert run(scores.main, [*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv) -> str:
    assert run(scores.main, [*map(str, argv)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and "Traceback" not in found
    return found


def test_rows_and_columns_are_matched_by_name(world, capsys):
    folder, p, target = world
    found = evaluated(capsys, folder / "pred.csv", folder / "truth.csv", "--label-separator", ";")
    assert found["f1_samples"] == pytest.approx(f1_score(target, p > 0.5, average="samples", zero_division=0))
    assert found["images"] == 60
    by_name = {row["name"]: row for row in found["classes"]}
    assert by_name["dog"]["support"] == target[:, 1].sum() and by_name["cat"]["f1"] == pytest.approx(
        f1_score(target[:, 0], p[:, 0] > 0.5)
    )


def test_threshold_is_a_number_or_a_file(world, capsys):
    folder, p, target = world
    (folder / "thresholds.json").write_text('{"metric": "f1_samples", "global": 0.3, "value": 0.5}')
    argv = [folder / "pred.csv", folder / "truth.csv", "--label-separator", ";", "--threshold"]
    number, file = evaluated(capsys, *argv, 0.3), evaluated(capsys, *argv, folder / "thresholds.json")
    assert number == file
    assert number["f1_micro"] == pytest.approx(f1_score(target, p > 0.3, average="micro"))


def test_a_packed_split_is_the_truth(shards, tmp_path, capsys):
    from shards.dataset import load_dataset, open_index

    dataset = load_dataset(shards)
    index = open_index(dataset, "val")
    target = index.targets(range(len(index))) > 0.5
    rows = [[index.image_id(i), *np.where(target[i], 0.9, 0.1)] for i in range(len(index))][::-1]
    file = write(tmp_path / "p.csv", ["ImageID", *dataset.classes], rows)
    found = evaluated(capsys, file, "--data", shards, "--split", "val", "--bootstrap", 20)
    assert found["f1_samples"] == found["map"] == 1 and found["loss"] == pytest.approx(-np.log(0.9), rel=1e-6)
    assert found["intervals"]["f1_micro"] == [1, 1]
    assert {f"map/{group}" for group in dataset.groups} <= set(found)


def test_some_rows_of_a_packed_split_are_the_truth(shards, tmp_path, capsys):
    """The predictions of some rows, as `mlc predict --where` writes them."""
    from shards.dataset import load_dataset, open_index

    dataset = load_dataset(shards)
    index = open_index(dataset, "train")
    target = index.targets(range(len(index))) > 0.5
    own = np.flatnonzero(target[:, 0])
    p = np.random.default_rng(0).random((len(own), len(dataset.classes)))
    rows = [[index.image_id(i), *row] for i, row in zip(own, p, strict=True)][::-1]
    file = write(tmp_path / "p.csv", ["ImageID", *dataset.classes], rows)
    split = ["--data", shards, "--split", "train"]
    found = evaluated(capsys, file, *split, "--where", f'"{dataset.classes[0]}" in labels')
    assert found["images"] == len(own) < len(index)
    assert found["f1_micro"] == pytest.approx(f1_score(target[own], p > 0.5, average="micro"))
    words = f"p.csv: no row for {len(index) - len(own)} of the {len(index)} images of {shards}, split train, such as"
    assert words in refused(capsys, file, *split)
    assert "--fold 1: no row is in it" in refused(capsys, file, *split, "--fold", "1")


def test_submissions_of_label_sets(world, capsys):
    folder, p, target = world
    said = p > 0.5
    names = ["cat", "dog", "rest"]
    for name, sets in (("submission", said), ("plain", target)):
        labels = [" ".join(names[c] for c in np.flatnonzero(row)) for row in sets]
        write(folder / f"{name}.csv", ["ImageID", "Labels"], [[f"{i}.jpg", t] for i, t in enumerate(labels)])
    found = evaluated(capsys, folder / "submission.csv", folder / "plain.csv")
    assert found["f1_macro"] == pytest.approx(f1_score(target, said, average="macro"))
    assert "map" not in found and found["classes"][0]["ap"] is None
    assert "no probabilities" in refused(
        capsys, folder / "submission.csv", folder / "plain.csv", "--calibrate", "isotonic"
    )


def test_another_file_is_compared(world, capsys):
    folder, p, target = world
    best = write(
        folder / "best.csv",
        ["ImageID", *CLASSES],
        [[f"{i}.jpg", *(0.2 * p[i] + 0.8 * target[i])] for i in range(60)],
    )
    found = evaluated(capsys, folder / "pred.csv", folder / "truth.csv", "--label-separator", ";", "--against", best)
    assert found["against"]["f1_samples"]["better"] == found["against"]["loss"]["better"] == "B"
    assert found["against"]["f1_micro"]["value"] == pytest.approx(1 - found["f1_micro"])


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_calibrated_file(world, capsys, kind):
    folder, p, _ = world
    argv = [folder / "pred.csv", folder / "truth.csv", "--label-separator", ";", "--calibrate", kind]
    found = evaluated(capsys, *argv)["calibrated"]
    assert found["file"] == str(folder / f"pred.{kind}.csv")
    ids, made = read_predictions(folder / f"pred.{kind}.csv", CLASSES)
    assert len(ids) == 60 and not np.allclose(made, p)
    assert (found["temperature"] is None) == (kind == "isotonic")


def test_tables_for_people(world, capsys):
    folder, *_ = world
    argv = [folder / "pred.csv", folder / "truth.csv", "--label-separator", ";", "--bootstrap", "20", "--per-class"]
    assert run(scores.main, [*map(str, argv), "--against", str(folder / "pred.csv")]) == 0
    out = capsys.readouterr().out
    assert "weighted" in out and 'a, "b"' in out and "unclear" in out and "…" not in out


def test_mistakes(world, capsys, shards):
    folder, *_ = world
    pred, truth = folder / "pred.csv", folder / "truth.csv"
    split = ["--label-separator", ";"]
    assert "give the truth once" in refused(capsys, pred)
    assert "give the truth once" in refused(capsys, pred, truth, "--data", shards)
    assert "--fold and --where choose rows of --data" in refused(capsys, pred, truth, "--fold", "1")
    assert "nowhere.csv" in refused(capsys, folder / "nowhere.csv", truth)
    assert "give --label-separator ';'" in refused(capsys, pred, truth)
    assert f"none of the 3 classes of {pred}" in refused(capsys, pred, truth, "--label-separator", " ")
    assert "no column" in refused(capsys, pred, "--data", shards)  # other classes
    lines = pred.read_text().splitlines(keepends=True)
    short = folder / "short.csv"
    short.write_text("".join(lines[:-2]))
    assert "no row for 2 of the 60 images" in refused(capsys, short, truth, *split)
    short.write_text("".join([*lines, lines[1]]))
    assert "more than once" in refused(capsys, short, truth, *split)
    short.write_text(lines[0] + lines[1].replace("0.", "7.", 1) + "".join(lines[2:]))
    assert "is no probability" in refused(capsys, short, truth, *split)
    twice = folder / "twice.csv"
    twice.write_text(truth.read_text() + "3.jpg,cat\n")
    assert "line 62: image 3.jpg comes more than once, first in line 5" in refused(capsys, pred, twice, *split)
    assert "cannot read thresholds" in refused(capsys, pred, truth, *split, "--threshold", folder / "no.json")
    calibrate = [*split, "--calibrate", "temperature", "--out"]
    assert "is the file that is read" in refused(capsys, pred, truth, *calibrate, pred)
    with pytest.raises(SystemExit):
        scores.main([str(pred), str(truth), "--bootstrap", "5"])
    assert "20 the least" in capsys.readouterr().err


def test_images_that_nobody_asked_about_are_mentioned(world, capsys):
    folder, *_ = world
    with (folder / "pred.csv").open("a") as file:
        file.write("new.jpg,0.1,0.1,0.1\n")
    assert run(scores.main, [str(folder / "pred.csv"), str(folder / "truth.csv"), "--label-separator", ";"]) == 0
    assert f"1 of 61 images of {folder / 'pred.csv'} are not in" in capsys.readouterr().err
