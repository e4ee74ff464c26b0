"""Prediction and evaluation on several processes: each sample once, the same file, scikit-learn's metrics of it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import worlds
import yaml
from conftest import TINY, log_of, run
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, log_loss

from mlc.data.transforms import EvalTransform

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """30 steps on 2 processes: not a good model, but one whose outputs differ from image to image."""
    folder = tmp_path_factory.mktemp("trained")
    run(
        "train.py",
        *TINY,
        "--data",
        str(shards),
        "--output",
        str(folder),
        "--experiment",
        "run",
        "-b",
        "16",
        "--max-steps",
        "30",
        "-j",
        "1",
        "--lr",
        "3e-3",
        "--eval-every",
        "30st",
        "--head-bias",
        "prior",
        processes=2,
    )
    return folder / "run"


def test_weights_that_are_replaced_while_they_are_read(trained, shards, tmp_path):
    argv = ["predict", "--run", str(trained), "--data", str(shards), "-j", "0", "--out", str(tmp_path / "out")]
    done = worlds.call(2, "mlc", argv, "other_weights")
    assert done.returncode == 2 and "another content of" in done.stderr and not (tmp_path / "out").exists()


def predict(trained: Path, shards: Path, out: Path, processes: int, *more: str) -> tuple[bytes, bytes]:
    run(
        "-m",
        "mlc",
        "predict",
        "--run",
        str(trained),
        "--data",
        str(shards),
        "--tta",
        "hflip,scale",
        "-b",
        "8",
        "-j",
        "1",
        "--out",
        str(out),
        *more,
        processes=processes,
    )
    return (out / "test.csv").read_bytes(), (out / "test-submission.csv").read_bytes()


def table(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    rows = list(csv.reader(path.open()))
    return rows[0][1:], [row[0] for row in rows[1:]], np.array([[float(p) for p in row[1:]] for row in rows[1:]])


def truth(demo_csv: Path, ids: list[str], classes: list[str]) -> np.ndarray:
    """bool [N, C] from the competition's own CSV."""
    labels = {row["ImageID"]: row["Labels"].split() for row in csv.DictReader((demo_csv / "train.csv").open())}
    return np.array([[c in labels[image_id] for c in classes] for image_id in ids])


def test_one_two_and_three_processes_write_the_same_bytes(trained, shards, demo_csv, tmp_path):
    files = [predict(trained, shards, tmp_path / str(n), n) for n in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    _, ids, _ = table(tmp_path / "1" / "test.csv")
    expected = [row["ImageID"] for row in csv.DictReader((demo_csv / "test.csv").open())]
    assert ids == expected and len(ids) % 8  # a ragged last batch


def test_the_submission_is_the_table_above_the_threshold(trained, shards, tmp_path):
    predict(trained, shards, tmp_path, 1, "--threshold", "0.3")
    classes, ids, scores = table(tmp_path / "test.csv")
    rows = list(csv.DictReader((tmp_path / "test-submission.csv").open()))
    assert [row["ImageID"] for row in rows] == ids
    assert [row["Labels"].split() for row in rows] == [
        [c for c, p in zip(classes, row, strict=True) if p > 0.3] for row in scores
    ]


def test_metrics_of_two_processes_are_scikit_learns_on_the_file(trained, shards, demo_csv):
    done = run(
        "-m",
        "mlc",
        "eval",
        "--run",
        str(trained),
        "--data",
        str(shards),
        "--split",
        "val",
        "-b",
        "8",
        "--json",
        processes=2,
    )
    results = json.loads(done.stdout)
    classes, ids, scores = table(trained / "predictions" / "val.csv")
    target = truth(demo_csv, ids, classes)
    scores = scores.astype(np.float32)
    assert len(ids) % 16  # a ragged last batch, also over two processes
    present = target.any(0)
    expected = {"map": average_precision_score(target[:, present], scores[:, present], average="macro")}
    for kind in ("samples", "micro", "macro"):
        expected[f"f1_{kind}"] = f1_score(target, scores > 0.5, average=kind, zero_division=0)
    threshold = json.loads((trained / "best" / "thresholds.json").read_text())["global"]
    expected["f1_samples@run"] = f1_score(target, scores > np.float32(threshold), average="samples", zero_division=0)
    place = np.argsort(np.argsort(-target.mean(0), kind="stable"))  # of each class among the commonest
    always = [np.broadcast_to(place < size, target.shape) for size in range(len(classes) + 1)]
    of_sizes = [f1_score(target, one, average="samples", zero_division=0) for one in always]
    expected |= {"f1_samples@commonest": max(of_sizes), "commonest": np.argmax(of_sizes)}
    expected["map@chance"] = target.mean(0)[present].mean()
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, abs=1e-9), name
    assert (trained / "predictions" / "val.png").stat().st_size > 10_000


def test_the_training_log_has_the_metrics_of_the_exported_weights(trained, shards, demo_csv, tmp_path):
    """What the loop measured on two ranks is what anybody measures with the files it leaves."""
    run(
        "-m",
        "mlc",
        "predict",
        "--run",
        str(trained),
        "--weights",
        "last",
        "--data",
        str(shards),
        "--split",
        "val",
        "-b",
        "16",
        "--out",
        str(tmp_path),
    )
    classes, ids, scores = table(tmp_path / "val.csv")
    target = truth(demo_csv, ids, classes)
    logged = log_of(trained)[-1]
    assert logged["val_ema/f1_samples"] == pytest.approx(
        f1_score(target, scores > 0.5, average="samples", zero_division=0), abs=1e-6
    )
    bce = np.mean([log_loss(target[:, c], scores[:, c], labels=[False, True]) for c in range(len(classes))])
    assert logged["val_ema/loss"] == pytest.approx(bce, rel=1e-5)


def test_a_folder_of_images_nobody_packed(trained, demo_csv, tmp_path):
    folder = tmp_path / "holiday"
    (folder / "deep").mkdir(parents=True)
    for name in ("0.jpg", "1.jpg"):
        shutil.copy(demo_csv / "images" / name, folder / name)
    Image.open(demo_csv / "images" / "2.jpg").save(folder / "deep" / "c.png")
    run("-m", "mlc", "predict", "--run", str(trained), "--images", str(folder), "--out", str(tmp_path / "out"))
    assert table(tmp_path / "out" / "holiday.csv")[1] == ["0.jpg", "1.jpg", "deep/c.png"]


def test_plain_timm_loads_the_best_weights(trained, shards, demo_csv):
    """timm alone, on one image: the probability in our file."""
    import timm
    import torch

    config = json.loads((trained / "best" / "config.json").read_text())
    classes = yaml.safe_load((demo_csv / "classes.yaml").read_text())["classes"]
    assert config["label_names"] == classes
    model = timm.create_model(f"local-dir:{trained / 'best'}", pretrained=True).eval()
    run("-m", "mlc", "predict", "--run", str(trained), "--data", str(shards), "--out", str(trained / "plain"))
    _, ids, scores = table(trained / "plain" / "test.csv")
    pixels = EvalTransform(size=32)((demo_csv / "images" / ids[0]).read_bytes())
    cfg = config["pretrained_cfg"]
    x = ((pixels / 255 - np.array(cfg["mean"])) / np.array(cfg["std"])).transpose(2, 0, 1)
    with torch.no_grad():
        assert model(torch.tensor(x[None], dtype=torch.float32)).sigmoid().numpy() == pytest.approx(
            scores[:1], abs=1e-5
        )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--run", "nowhere", "--data", "SHARDS"], "nowhere: no such folder"),
        (["--run", "RUN"], "give either --data DIR"),
        (["--run", "RUN", "--data", "SHARDS", "--split", "tst"], "no split 'tst'"),
        (["--run", "RUN", "--data", "SHARDS", "--tta", "hflip,spin"], "unknown view 'spin'"),
        (["--run", "RUN", "--images", "missing"], "missing: no such folder"),
        (["--run", "RUN", "--data", "SHARDS", "--thresold", "0.5"], "--threshold"),
    ],
)
def test_mistakes_are_one_line(trained, shards, argv, words):
    argv = [{"RUN": str(trained), "SHARDS": str(shards)}.get(arg, arg) for arg in argv]
    done = run("-m", "mlc", "predict", *argv, check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
