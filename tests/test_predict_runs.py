"""`mlc predict --run A --run B`: the same numbers as each by itself, and every image decoded once for all that see it
alike."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlc import predict, train
from mlc.data.prediction_files import class_columns
from mlc.data.prediction_sources import note, of_images, refuse_others
from mlc.data.prediction_stack import read_stack
from mlc.data.reader import TarReader
from mlc.metrics import thresholds
from mlc.models.build import build_model
from mlc.models.export import export
from mlc.predict import run_names
from shards.console import UserError
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index

SMALL = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


def untrained(run: Path, classes, seed: int, size: int = 32, mean: float = 0.5, threshold: float = 0.5) -> str:
    """`best/` of a run whose weights are chance, but for their seed."""
    torch.manual_seed(seed)
    name = "swinv2_tiny_window8_256"
    model = build_model(name=name, num_classes=len(classes), img_size=size, model_kwargs=SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    told = {"architecture": name, "model_args": {**SMALL, "img_size": size}, "num_classes": len(classes)}
    told |= {"label_names": list(classes), "img_size": size, "mean": [mean] * 3, "std": [0.25] * 3, "extra": {}}
    export(model, run / "best", **told)
    thresholds.save(run / "best" / "thresholds.json", metric="f1_samples", threshold=threshold, value=0.5)
    return str(run)


@pytest.fixture
def classes(shards):
    return load_dataset(shards).classes


def flags(shards, out: Path, *runs: str) -> list[str]:
    named = [word for run in runs for word in ("--run", run)]
    return [*named, "--data", str(shards), "--split", "val", "-j", "0", "-b", "7", "--out", str(out)]


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Rows in the order in which they are read from the disk."""
    seen, read = [], TarReader.read
    monkeypatch.setattr(TarReader, "read", lambda self, row: (seen.append(int(row)), read(self, row))[1])
    return seen


def test_runs_alike_share_one_pass_and_the_mean_is_theirs(shards, classes, tmp_path, reads, capsys):
    a = untrained(tmp_path / "a", classes, 1, threshold=0.2)
    b = untrained(tmp_path / "b", classes[::-1], 2, threshold=0.6)  # the same classes in another order
    alone = {}
    for run in (a, b):
        assert run_verb(predict.main, flags(shards, tmp_path / "alone" / Path(run).name, run)) == 0
        alone[run] = tmp_path / "alone" / Path(run).name / "val.csv"
    del reads[:]
    capsys.readouterr()
    out = tmp_path / "out"
    assert run_verb(predict.main, flags(shards, out, a, b)) == 0
    assert sorted(reads) == list(range(len(open_index(load_dataset(shards), "val"))))
    assert "2 runs in 1 pass over the data" in capsys.readouterr().err
    assert (out / "val-a.csv").read_bytes() == alone[a].read_bytes()
    stack = read_stack([out / "val.csv", out / "val-a.csv", out / "val-b.csv", alone[b]])
    assert class_columns(out / "val-b.csv") == tuple(classes)
    np.testing.assert_array_equal(stack.values[2], stack.values[3])
    assert np.abs(stack.values[1] - stack.values[2]).max() > 0.05
    np.testing.assert_allclose(stack.values[0], stack.values[1:3].mean(0), atol=1e-7)
    with (out / "val-submission.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [[name for name, p in zip(classes, row, strict=True) if p > np.float32(0.4)] for row in stack.values[0]]
    assert [row["Labels"].split() for row in rows] == expected  # the mean of the two thresholds


def test_another_size_and_captions_alone_have_passes_of_their_own(shards, classes, tmp_path, reads, capsys):
    a, big = untrained(tmp_path / "a", classes, 1), untrained(tmp_path / "big", classes, 2, size=48)
    text = ["--text-model", "bigru", "--text-kwargs", "hidden=4", "dim=6", "--fusion", "none"]
    text += ["--data", str(shards), "--output", str(tmp_path), "--experiment", "text", "-b", "8", "-j", "0"]
    train.main([*text, "--max-steps", "1"])
    text = str(tmp_path / "text")
    alone = []
    for run in (a, big, text):
        predict.main(flags(shards, tmp_path / "alone" / Path(run).name, run))
        alone.append(tmp_path / "alone" / Path(run).name / "val.csv")
    del reads[:]
    out = tmp_path / "out"
    predict.main([*flags(shards, out, a, big, text), "--threshold", "0.5"])
    assert "3 runs in 3 passes over the data, since they see the samples in 3 ways" in capsys.readouterr().err
    assert len(reads) == 2 * len(open_index(load_dataset(shards), "val"))
    for name, file in zip(("a", "big", "text"), alone, strict=True):
        assert (out / f"val-{name}.csv").read_bytes() == file.read_bytes()
    stack = read_stack([out / "val.csv", *alone]).values
    np.testing.assert_allclose(stack[0], stack[1:].mean(0), atol=1e-7)


def test_names_tell_runs_apart():
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert run_names(["x/demo", "y/demo"]) == ["x-demo", "y-demo"]
    assert run_names(["x/demo/best", "y/demo/best"]) == ["x-demo-best", "y-demo-best"]
    with pytest.raises(UserError, match="is named twice"):
        run_names(["runs/a", "runs/../runs/a"])


def test_mistakes_are_one_line(shards, classes, tmp_path, capsys):
    a, b = untrained(tmp_path / "a", classes, 1), untrained(tmp_path / "b", ["sea", *classes[1:]], 2)
    odd = sorted({"sea", classes[0]})[0]
    both = flags(shards, tmp_path / "out", a, b)
    for argv, words in (
        (both[:-2], "--run comes 2 times: give --out DIR, where their mean goes"),
        (both, f"--run {b} has other classes than {a}, such as {odd!r}; predict each by itself"),
        (flags(shards, tmp_path / "out", a, a), "is named twice"),
    ):
        assert run_verb(predict.main, argv) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", [1, 2])
def test_unreadable_images_are_counted_and_have_rows(classes, tmp_path, capsys, broken):
    run = untrained(tmp_path / "run", classes, 1)
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    for number in range(broken):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    argv = ["--run", run, "--images", str(tmp_path / "images"), "-j", "0", "--out", str(tmp_path)]
    assert run_verb(predict.main, argv) == 0
    assert f"{broken} bad image{'s'[: broken - 1]}: probability 0" in capsys.readouterr().err
    scores = read_stack([tmp_path / "images.csv"]).values[0]
    assert (scores[:broken] == 0).all() and (scores[broken:] > 0).all()


def pictures(folder: Path, *names: str) -> str:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / name)
    return str(folder)


def test_nothing_takes_the_place_of_other_predictions(shards, classes, tmp_path, capsys):
    run = untrained(tmp_path / "run", classes, 1)
    file = Path(run) / "best" / "config.json"
    info = json.loads(file.read_text())
    columns = {"image_id": "id", "labels": "tags", "separator": "|"}
    file.write_text(json.dumps(info | {"mlc": info["mlc"] | {"columns": columns}}))
    out, base = tmp_path / "out", ["--run", run, "-j", "0", "--threshold", "0", "--out", str(tmp_path / "out")]
    split = [*base, "--data", str(shards), "--split", "test"]
    folders = {name: pictures(tmp_path / name, "0.png") for name in ("val", "test", "other/val")}
    # The split val and the folder test come first; each may be predicted again, and nothing else in its place.
    assert run_verb(predict.main, flags(shards, out, run)) == 0
    assert run_verb(predict.main, [*base, "--images", folders["test"]]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == [
        "sources.json",
        *sorted(f"{a}{b}.csv" for a in ("test", "val") for b in ("", "-submission")),
    ]
    assert before["test-submission.csv"].decode() == f"id,tags\n0.png,{'|'.join(classes)}\n"
    assert run_verb(predict.main, [*base, "--images", folders["test"]]) == 0
    capsys.readouterr()
    for argv, there in (
        ([*base, "--images", folders["val"]], "val.csv has the predictions of the split 'val' of"),
        ([*base, "--images", folders["other/val"]], "val.csv has the predictions of the split 'val'"),
        (split, f"test.csv has the predictions of the folder {folders['test']}, these are of the split 'test'"),
    ):
        assert run_verb(predict.main, argv) == 2
        said = capsys.readouterr().err
        assert there in said and "by --out of `mlc predict`" in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_predictions_from_before_there_was_a_note(tmp_path):
    (tmp_path / "val.csv").touch()
    refuse_others(tmp_path, ["val.csv"], {"of": "the split 'val'", "data": "1/val"})
    with pytest.raises(UserError, match=r"val.csv has the predictions of a split, these are of the folder"):
        refuse_others(tmp_path, ["val.csv"], of_images(tmp_path))
    note(tmp_path, ["val.csv"], {"of": "the split 'val' of here", "data": "1/val"})
    refuse_others(tmp_path, ["val.csv"], {"of": "the split 'val' of there", "data": "1/val"})
    refuse_others(tmp_path, ["val.csv"], {"of": "the split 'val' of here", "data": "2/val"})
    other = {"of": "the split 'val' of there", "data": "2/val"}
    refuse_others(tmp_path, ["val.csv"], other, splits=False)
    with pytest.raises(UserError, match="of the split 'val' of here, these are of the split 'val' of there"):
        refuse_others(tmp_path, ["val.csv"], other)


def test_a_run_that_is_called_like_the_submission(shards, classes, tmp_path, capsys):
    runs = [untrained(tmp_path / name, classes, 1) for name in ("a", "submission")]
    assert run_verb(predict.main, flags(shards, tmp_path / "out", *runs)) == 2
    assert "val-submission.csv is taken; rename the run" in capsys.readouterr().err
