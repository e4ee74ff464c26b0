"""`mlc fit`: every stage is a verb, goes on where it was stopped, and the best one hands in."""

import csv
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import save_file

from mlc import fit, jobs, submit, train
from mlc.data.prediction_files import PREDICTION_ID, read_predictions
from mlc.models.build import build_model
from shards.console import UserError
from shards.dataset import load_dataset


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("fit") / "resnet.safetensors"
    save_file(build_model(name="test_resnet", num_classes=7).state_dict(), file)
    return file


@pytest.fixture
def flags(demo_csv, weights):
    table = {"--csv": "train.csv", "--images": "images", "--test-csv": "test.csv"}
    data = [part for flag, name in table.items() for part in (flag, str(demo_csv / name))]
    model = ["--model", "test_resnet", "--pretrained-path", str(weights), "--img-size", "32"]
    return [*data, *model, "-j", "0", "-b", "8"]


@pytest.fixture
def in_process(monkeypatch):
    """Trainings run here and not in processes of their own, which take most of the time of such small ones."""

    def run_in_sight(command, *, log, run=None):
        assert command[:2] == ["mlc", "train"]
        train.main(list(command[2:]))

    monkeypatch.setattr(jobs, "run_in_sight", run_in_sight)


def rows(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_from_files_to_a_submission(flags, demo_csv, tmp_path, in_process, capsys):
    out = tmp_path / "fit"
    assert fit.main([*flags, "--epochs", "1", "--out", str(out)]) == 0
    said = capsys.readouterr()
    book = json.loads((out / "fit.json").read_text())
    verbs = [command[0] for stage in book["stages"].values() for command in stage["done"]]
    assert verbs[:4] == ["pack", "stats", "features", "train"] and verbs[-2:] == ["eval", "report"]
    assert all(f"$ mlc {verb} " in said.out for verb in verbs)
    assert {row["ImageID"] for row in rows(out / "submission.csv")} == {
        r["ImageID"] for r in rows(demo_csv / "test.csv")
    }
    values = {
        name: json.loads((out / name / "rule.json").read_text())["honest"] for name in ("head", "finetune", "ensemble")
    }
    best = max(values, key=values.get)
    assert {one["name"]: one["value"] for one in book["results"]} == pytest.approx(values)
    assert all((out / one["predictions"] / "test.csv").is_file() for one in book["results"])
    assert f"best: {best}, F1 samples {values[best]:.4f}" in said.err
    assert (out / "submission.csv").read_bytes() == (out / best / "submission.csv").read_bytes()
    assert (out / "report.html").is_file() and (out / "data.html").is_file()

    fit.main([*flags, "--epochs", "1", "--out", str(out)])  # again: nothing is left to do
    assert "$ mlc" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"begun with other settings \(epochs: 1.0\); give it another --out"):
        fit.main([*flags, "--epochs", "2", "--out", str(out)])


def test_interrupted_at_every_command_it_comes_to_the_same(flags, tmp_path, in_process, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit.main([*flags, "--epochs", "1", "--out", str(whole)])
    run, seen = fit.Book._run, []

    def interrupted(self, command, trains):
        if command not in seen:
            seen.append(command)
            raise KeyboardInterrupt
        run(self, command, trains)

    monkeypatch.setattr(fit.Book, "_run", interrupted)
    for _ in range(40):
        try:
            fit.main([*flags, "--epochs", "1", "--out", str(broken)])
        except KeyboardInterrupt:
            continue
        break
    assert len(seen) == sum(
        len(stage["done"]) for stage in json.loads((whole / "fit.json").read_text())["stages"].values()
    )
    assert (broken / "submission.csv").read_bytes() == (whole / "submission.csv").read_bytes()


def test_quick_is_the_head_alone_and_time_decides_the_length(flags, tmp_path, in_process, capsys, monkeypatch):
    monkeypatch.setattr(fit, "MOST_EPOCHS", 2.0)
    fit.main([*flags, "--preset", "quick", "--out", str(tmp_path / "quick")])
    assert not (tmp_path / "quick" / "finetune").exists() and (tmp_path / "quick" / "submission.csv").is_file()
    fit.main([*flags, "--time", "1s", "--out", str(tmp_path / "short")])
    assert "--time 1s: too little is left to fine-tune" in capsys.readouterr().err
    fit.main([*flags, "--time", "10min", "--preset", "good", "--out", str(tmp_path / "long")])
    assert json.loads((tmp_path / "long" / "fit.json").read_text())["decided"]["epochs"] == fit.MOST_EPOCHS


def test_a_training_that_is_stopped_goes_on(flags, tmp_path):
    """In processes as a user starts them: SIGTERM while it fine-tunes, then the same command."""
    out = tmp_path / "fit"
    command = [sys.executable, "-m", "mlc", "fit", *flags, "--epochs", "12", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step " in line and (out / "finetune" / "log.jsonl").exists():
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=600)
    assert process.returncode == 130
    book = json.loads((out / "fit.json").read_text())
    assert book["stages"]["finetune: train"]["done"] == [] and (out / "finetune" / "checkpoints").is_dir()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "$ mlc features" not in done.stdout


def test_mistakes_are_one_line(flags, tmp_path):
    with pytest.raises(UserError, match="give either --csv and --images, or --data"):
        fit.main(["--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--csv needs --images"):
        fit.main(["--csv", "train.csv", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--test-csv belongs to --csv"):
        fit.main(["--data", "x", "--test-csv", "test.csv", "--out", str(tmp_path / "x")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"full is not empty and not a folder of `mlc fit`"):
        fit.main([*flags, "--out", str(tmp_path / "full")])
    with pytest.raises(SystemExit):
        fit.main([*flags, "--time", "soon", "--out", str(tmp_path / "x")])


def test_labels_of_one_file_of_probabilities(shards, tmp_path):
    classes = load_dataset(str(shards)).classes
    file, rule = tmp_path / "p.csv", tmp_path / "rule.json"
    values = [[0.9 if column == row else 0.2 for column in range(len(classes))] for row in range(2)]
    file.write_text(
        "\n".join(
            [
                ",".join([PREDICTION_ID, *classes]),
                *(f"{row}.jpg," + ",".join(map(str, values[row])) for row in range(2)),
            ]
        )
    )
    read_predictions(file, classes)
    told = [str(file), "--data", str(shards), "--out", str(tmp_path / "out.csv")]
    assert submit.main([*told, "--rule", "0.5"]) == 0
    assert [row["Labels"] for row in rows(tmp_path / "out.csv")] == list(classes[:2])
    rule.write_text(json.dumps({"metric": "f1_samples", "rule": "expected", "global": 0.5, "beta": 1.0}))
    submit.main([*told, "--rule", str(rule)])
    assert all(row["Labels"] for row in rows(tmp_path / "out.csv"))
    with pytest.raises(UserError, match="is the file of probabilities itself"):
        submit.main([str(file), "--data", str(shards), "--rule", "0.5", "--out", str(file)])
