"""`mlc kfold`: real trainings of two folds, of which one fails at first; what is joined is what each model says about
the samples it has not seen."""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from mlc import jobs, kfold, predict, slurm
from mlc.data.prediction_files import read_predictions, write_probabilities
from mlc.data.prediction_stack import read_stack
from mlc.data.sources import open_sources
from mlc.flags import read_config
from mlc.metrics import multilabel
from shards import pack
from shards.console import UserError
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index


def packed(demo_csv: Path, out: Path, *more: str) -> Path:
    argv = ["--csv", str(demo_csv / "train.csv"), "--images", str(demo_csv / "images")]
    argv += ["--test-csv", str(demo_csv / "test.csv"), "--shard-size", "40", "-j", "1"]
    pack.main([*argv, "--out", str(out), *more])
    return out


@pytest.fixture(scope="module")
def folded(demo_csv, tmp_path_factory) -> Path:
    return packed(demo_csv, tmp_path_factory.mktemp("folded") / "shards", "--folds", "2")


def argv(data: Path, out: Path, *more: str) -> list[str]:
    short = ["--data", str(data), "--output", str(out), "--experiment", "demo", "-b", "8", "-j", "0", "--lr", "3e-3"]
    return [*more, *TINY, *short, "--max-steps", "2", "--eval-every", "2st"]


class Counted:
    """Predictions that were made: the flags of each."""

    def __init__(self, monkeypatch):
        self.calls, main = [], predict.main
        monkeypatch.setattr(predict, "main", lambda argv: (self.calls.append(argv), main(argv))[1])


def processes_of(folder: Path) -> int:
    return len((folder / "seconds").read_text().split())


@pytest.fixture(scope="module")
def finished(folded, tmp_path_factory) -> Path:
    """Called twice: fold 1 dies the first time."""
    out, command = tmp_path_factory.mktemp("runs"), jobs.command
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        die = [sys.executable, "-c", "raise SystemExit('the disk is full')"]
        patch.setattr(
            jobs, "command", lambda folder, launch: die if "fold1" in folder.name else command(folder, launch)
        )
        assert run_verb(kfold.main, argv(folded, out, "--folds", "2", "--predict", "test")) == 1
        assert not (out / "demo-kfold").exists() and jobs.last_words(out / "demo-fold1") == "the disk is full"
        patch.setattr(jobs, "command", command)
        assert run_verb(kfold.main, argv(folded, out, "--predict", "test")) == 0
    return out


def test_only_the_fold_that_failed_runs_again(finished):
    assert [processes_of(finished / f"demo-fold{fold}") for fold in (0, 1)] == [1, 2]


def test_each_sample_once_by_the_model_that_has_not_seen_it(finished, folded, tmp_path):
    dataset = load_dataset(folded)
    index = open_index(dataset, "train")
    ids, scores = read_predictions(finished / "demo-kfold" / "oof.csv", dataset.classes)
    assert ids.to_pylist() == index.batch.column("image_id").to_pylist()
    for fold in (0, 1):
        run = finished / f"demo-fold{fold}"
        seen = open_sources(read_config(["-c", str(run / "args.yaml")])).sampler.sources[0].rows
        own = np.flatnonzero(index.fold == fold)
        assert not set(own) & set(seen) and len(own) + len(seen) == len(index)
        for name, out in ((run, tmp_path / "right"), (finished / f"demo-fold{1 - fold}", tmp_path / "wrong")):
            flags = ["--run", str(name), "--data", str(folded), "--split", "train", "--fold", str(fold), "-j", "0"]
            predict.main([*flags, "-b", "8", "--out", str(out)])
        found, answers = read_predictions(tmp_path / "right" / "train.csv", dataset.classes)
        assert found.to_pylist() == [index.image_id(row) for row in own]
        np.testing.assert_array_equal(scores[own], answers)
        assert np.abs(scores[own] - read_predictions(tmp_path / "wrong" / "train.csv", dataset.classes)[1]).max() > 1e-4


def test_the_sidecar_says_what_the_file_is_made_of(finished, folded):
    folder, dataset = finished / "demo-kfold", load_dataset(folded)
    made = json.loads((folder / "oof.json").read_text())
    index = open_index(dataset, "train")
    assert made["data"] == dataset.fingerprint and made["split"] == "train" and made["samples"] == len(index)
    assert made["sha256"] == hashlib.sha256((folder / "oof.csv").read_bytes()).hexdigest()
    for fold, run in enumerate(made["runs"]):
        weights = (finished / f"demo-fold{fold}" / "best" / "model.safetensors").read_bytes()
        assert run["fold"] == fold and run["sha256"] == hashlib.sha256(weights).hexdigest()
        assert run["samples"] == (index.fold == fold).sum()
    _, scores = read_predictions(folder / "oof.csv", dataset.classes)
    target = index.targets(np.arange(len(index))) > 0.5
    assert made["scores"]["map"] == pytest.approx(multilabel.mean_average_precision(scores, target))
    threshold = json.loads((folder / "thresholds.json").read_text())
    f1 = multilabel.f1_samples(scores > np.float32(threshold["global"]), target)
    assert f1 == pytest.approx(threshold["value"]) == made["scores"]["f1_samples@tuned"]


def test_the_test_split_is_the_mean_of_the_folds_by_the_threshold_of_the_joined_file(finished):
    folder = finished / "demo-kfold"
    stack = read_stack([folder / name for name in ("test.csv", "test-demo-fold0.csv", "test-demo-fold1.csv")])
    np.testing.assert_allclose(stack.values[0], stack.values[1:].mean(0), atol=1e-7)
    assert np.abs(stack.values[1] - stack.values[2]).max() > 1e-4
    threshold = json.loads((folder / "thresholds.json").read_text())["global"]
    with (folder / "test-submission.csv").open() as file:
        labels = [row["Labels"].split() for row in csv.DictReader(file)]
    chosen = stack.values[0] > np.float32(threshold)
    assert labels == [[stack.classes[c] for c in np.flatnonzero(row)] for row in chosen]


def test_a_second_call_trains_and_predicts_only_what_is_missing(finished, folded, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    made = [json.loads((finished / "demo-kfold" / "oof.json").read_text())]
    monkeypatch.setattr(jobs, "_Process", None)  # nothing may be started
    counted = Counted(monkeypatch)
    shutil.rmtree(runs / "demo-kfold" / "fold1")
    record = runs / "demo-kfold" / "fold0" / kfold.RECORD
    record.write_text(record.read_text().replace(str(finished), str(runs)))  # the runs' new place
    assert run_verb(kfold.main, argv(folded, runs)) == 0
    assert [call[call.index("--fold") + 1] for call in counted.calls] == ["1"]
    assert "out of fold" in capsys.readouterr().out
    made.append(json.loads((runs / "demo-kfold" / "oof.json").read_text()))
    assert made[0]["sha256"] == made[1]["sha256"] and made[0]["scores"] == made[1]["scores"]
    assert run_verb(kfold.main, argv(folded, runs)) == 0 and len(counted.calls) == 1
    weights = runs / "demo-fold0" / "best" / "model.safetensors"
    shutil.copy(runs / "demo-fold1" / "best" / "model.safetensors", weights)  # the run was trained anew, say
    assert run_verb(kfold.main, argv(folded, runs)) == 0
    assert [call[call.index("--fold") + 1] for call in counted.calls] == ["1", "0"]


def test_runs_of_other_folds_settings_or_data_are_refused(finished, folded, demo_csv, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    assert run_verb(kfold.main, argv(folded, runs, "--seed", "7")) == 2
    assert "was trained with seed 42, and now it is 7; delete that folder" in capsys.readouterr().err
    (runs / "demo-fold0").rename(runs / "other")
    (runs / "demo-fold1").rename(runs / "demo-fold0")
    (runs / "other").rename(runs / "demo-fold1")
    assert run_verb(kfold.main, argv(folded, runs)) == 2
    assert "demo-fold0 was trained with fold 1, and now it is 0" in capsys.readouterr().err
    shutil.rmtree(runs)
    shutil.copytree(finished, runs)
    config = runs / "demo-fold1" / "best" / "config.json"
    config.write_text(config.read_text().replace(load_dataset(folded).fingerprint, "0123456789abcdef"))
    assert run_verb(kfold.main, argv(folded, runs)) == 2
    assert "demo-fold1 was trained on other data (0123456789abcdef, now" in capsys.readouterr().err


def test_parts_that_are_not_the_folds_are_not_joined(finished, folded, tmp_path):
    dataset = load_dataset(folded)
    index = open_index(dataset, "train")
    parts = [finished / "demo-kfold" / f"fold{fold}" / "train.csv" for fold in (0, 1)]
    assert kfold.join(parts, index, dataset.classes).shape == (len(index), len(dataset.classes))
    with pytest.raises(UserError, match=r"has not the .* samples of fold 0, each once"):
        kfold.join(parts[::-1], index, dataset.classes)
    ids, scores = read_predictions(parts[1], dataset.classes)
    write_probabilities(tmp_path / "short.csv", ids.to_pylist()[1:], dataset.classes, scores[1:])
    with pytest.raises(UserError, match=r"short.csv has not the .* samples of fold 1"):
        kfold.join([parts[0], tmp_path / "short.csv"], index, dataset.classes)


def test_an_image_that_another_data_set_shows_is_a_leak(folded, demo_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "work", lambda given, **how: {job.folder: "not now" for job in given})
    plain, other = (
        packed(demo_csv, tmp_path / "plain"),
        packed(demo_csv, tmp_path / "other", "--folds", "2", "--seed", "1"),
    )
    short = argv(folded, tmp_path)
    for data, code in ((plain, 2), (other, 2), (folded, 1)):
        assert run_verb(kfold.main, [*short, "--data", str(data)]) == code
        said = capsys.readouterr().err
        assert (f"--data {data} has" in said and "would have seen them" in said) == (code == 2)


def test_each_fold_may_begin_from_its_own_earlier_model(finished, folded, tmp_path, monkeypatch, capsys):
    """`{fold}`: the model of the same fold has not seen the samples that are held out, so there is nothing to note."""
    monkeypatch.setattr(jobs, "work", lambda given, **how: {job.folder: "not now" for job in given})
    own = ["--pretrained-path", str(finished / "demo-fold{fold}" / "best")]
    own += ["--kd-teacher", str(finished / "demo-fold{fold}"), "--kd-alpha", "0.5"]
    assert run_verb(kfold.main, argv(folded, tmp_path, *own)) == 1
    assert "may have seen" not in capsys.readouterr().err
    for fold in (0, 1):
        settings = read_config(["-c", str(tmp_path / f"demo-fold{fold}" / jobs.SETTINGS)])
        assert settings.pretrained_path == str(finished / f"demo-fold{fold}" / "best")
        assert settings.kd_teacher == [str(finished / f"demo-fold{fold}")] and settings.fold == fold
    other = ["--kd-teacher", str(finished / "demo-fold0")]
    assert run_verb(kfold.main, argv(folded, tmp_path / "other", *other)) == 1
    assert "demo-fold0 may have seen the samples that are held out" in capsys.readouterr().err


def test_the_array_has_a_task_for_each_unfinished_fold(finished, folded, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    (runs / "demo-fold1" / "output.log").write_text("killed\n")
    assert run_verb(kfold.main, argv(folded, runs, "--slurm=--gpus 2 --dry-run")) == 0
    said = capsys.readouterr()
    assert "#SBATCH --array=0-0\n" in said.out and "#SBATCH --gpus-per-node=2" in said.out
    assert f"set -- {runs / 'demo-fold1'}" in said.out and "joins the folds" in said.err


def test_an_array_that_has_finished_is_joined(finished, folded, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "demo-kfold")
    monkeypatch.setattr(slurm, "submit_array", None)  # nothing is left to submit
    assert run_verb(kfold.main, argv(folded, tmp_path / "runs", "--slurm=--gpus 2")) == 0
    made = [json.loads((runs / "demo-kfold" / "oof.json").read_text()) for runs in (finished, tmp_path / "runs")]
    assert made[0]["scores"] == made[1]["scores"] and "out of fold" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [
        (["--folds", "5"], "--folds 5: FOLDED was packed with 2"),
        (["--fold", "1"], "--fold is set by `mlc kfold` itself"),
        (["--predict", "train"], "--predict train: that is what oof.csv holds"),
        (["--predict", "tset"], "no split 'tset'"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--epoch", "3"], "did you mean --epochs?"),
    ],
)
def test_mistakes_are_one_line(folded, tmp_path, capsys, more, words):
    try:
        assert run_verb(kfold.main, argv(folded, tmp_path, *more)) == 2
    except SystemExit as stop:  # a flag that there is not
        assert stop.code == 2
    said = capsys.readouterr().err
    assert words.replace("FOLDED", str(folded)) in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_data_without_folds_says_how_to_make_them(shards, tmp_path, capsys):
    assert run_verb(kfold.main, argv(shards, tmp_path)) == 2
    assert "has no folds, `mlc pack --folds 5` makes them" in capsys.readouterr().err
