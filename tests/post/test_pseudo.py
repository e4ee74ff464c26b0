"""Pseudo-labels: the surest images, as labels of an overlay that a run trains on and resumes with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from mlc import train
from mlc.data.overlay import open_overlay, write_overlay
from mlc.data.prediction_files import write_csv
from mlc.metrics import thresholds
from mlc.post import pseudo, selftrain
from mlc.post.pseudo import most_confident
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index


@pytest.fixture(scope="module")
def predicted(shards, tmp_path_factory):
    """(file, probabilities) for the test split, its rows backwards."""
    dataset, index = load_dataset(shards), open_index(load_dataset(shards), "test")
    p = np.random.default_rng(0).beta(0.4, 0.8, (len(index), len(dataset.classes))).astype(np.float32)
    path = tmp_path_factory.mktemp("predicted") / "test.csv"
    rows = ([index.image_id(row), *(f"{x:.9g}" for x in p[row])] for row in range(len(index))[::-1])
    write_csv(path, ["ImageID", *dataset.classes], rows)
    return path, p


def call(predicted, shards, *more) -> int:
    return run_verb(pseudo.main, [str(predicted[0]), "--data", str(shards), *more])


def opened(path: Path, shards):
    return open_overlay(f"pseudo:{path}", [load_dataset(shards)])


def never_seen(shards) -> np.ndarray:
    return open_index(load_dataset(shards), "train").class_counts() == 0


# ---- which images ----------------------------------------------------------------------------------------------------


def test_the_surest_images_are_taken():
    p = np.array([[0.5, 0.6], [0.9, 0.1], [0.0, 1.0], [0.3, 0.8], [0.9, 0.1]])
    labels = p > 0.5
    assert most_confident(p, labels, most=2).tolist() == [1, 2]  # 1 and 4 are equal: the first
    assert most_confident(p, labels, most=9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("per_class", [1, 3, 10])
def test_a_quota_passes_over_images_whose_labels_are_all_full(per_class):
    rng = np.random.default_rng(1)
    p = rng.beta(0.3, 0.9, (80, 6))
    p[:, 0] = rng.uniform(0.6, 1, 80)  # everybody has the first class
    labels = p > 0.5
    chosen = most_confident(p, labels, most=40, per_class=per_class)
    sure = np.abs(p - 0.5).mean(1)
    given, expected = dict.fromkeys([*range(6), "none"], 0), []
    for row in sorted(range(80), key=lambda row: -sure[row]):
        mine = np.flatnonzero(labels[row]).tolist() or ["none"]
        if len(expected) < 40 and min(given[c] for c in mine) < per_class:
            expected.append(row)
            for c in mine:
                given[c] += 1
    assert chosen.tolist() == sorted(expected)
    assert per_class > 3 or len(chosen) < 40


# ---- the overlay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_an_overlay_is_an_index_of_the_same_images_with_other_labels(shards, predicted, tmp_path, soft, capsys):
    out = tmp_path / "p.arrow"
    more = ["--soft"] if soft else []
    assert call(predicted, shards, "--share", "0.4", "--threshold", "0.6", "--out", str(out), "--json", *more) == 0
    said = json.loads(capsys.readouterr().out)
    overlay, index = opened(out, shards), open_index(load_dataset(shards), "test")
    never, p = never_seen(shards), predicted[1].copy()
    order = np.argsort(-np.abs(p[:, ~never].astype(float) - 0.5).mean(1), kind="stable")
    rows = np.sort(order[: round(0.4 * len(index))])
    assert len(overlay) == said["images"] == len(rows)
    p[:, never] = 0
    for place, row in enumerate(rows):
        assert overlay.key(place) == index.key(row) and overlay.caption(place) == index.caption(row)
        assert overlay.labels(place).tolist() == np.flatnonzero(p[row] > np.float32(0.6)).tolist()
        assert (overlay.offset[place], overlay.crc32[place]) == (index.offset[row], index.crc32[row])
    expected = p[rows] if soft else p[rows] > np.float32(0.6)
    assert np.array_equal(overlay.targets(np.arange(len(rows))), expected.astype(np.float32))
    assert (overlay.fold == -1).all() and overlay.has_labels
    counts = (p[rows] > np.float32(0.6)).sum(0)
    assert list(said["classes"].values()) == counts.tolist() == overlay.class_counts().tolist()


def test_a_class_never_seen_in_training_is_told_and_not_given(shards, predicted, tmp_path, capsys):
    """Of the packed data, a copy whose train split has lost a class."""
    shutil.copytree(shards, tmp_path / "data")
    dataset, index = load_dataset(tmp_path / "data"), open_index(load_dataset(tmp_path / "data"), "train")
    common = int(index.class_counts().argmax())
    labels = index.targets(np.arange(len(index))) > 0.5
    labels[:, common] = False
    write_overlay(tmp_path / "train.arrow", dataset, "train", np.arange(len(index)), labels)
    (tmp_path / "train.arrow").replace(tmp_path / "data" / "train.arrow")
    out = tmp_path / "p.arrow"
    assert call(predicted, tmp_path / "data", "--soft", "--out", str(out)) == 0
    assert f"never seen in train, so never given here: {dataset.classes[common]}" in capsys.readouterr().err
    overlay = opened(out, tmp_path / "data")
    assert not overlay.targets(np.arange(len(overlay)))[:, common].any()


def test_the_data_may_move_but_not_change(shards, predicted, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "a" / "data")
    out = tmp_path / "a" / "p.arrow"
    assert call(predicted, tmp_path / "a" / "data", "--out", str(out)) == 0
    (tmp_path / "a").rename(tmp_path / "b")
    there = open_overlay(f"pseudo:{tmp_path / 'b' / 'p.arrow'}", [])
    assert there.dataset.root == tmp_path / "b" / "data"
    assert opened(tmp_path / "b" / "p.arrow", shards).fingerprint == there.fingerprint
    meta = json.loads((tmp_path / "b" / "data" / "dataset.json").read_text())
    meta["splits"]["test"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "b" / "data" / "dataset.json").write_text(json.dumps(meta))
    argv = ["--data", str(tmp_path / "b" / "data"), "--data", f"pseudo:{tmp_path / 'b' / 'p.arrow'}"]
    assert run_verb(train.main, [*TINY, *argv, "--output", str(tmp_path / "runs")]) == 2
    assert "was made for the data set" in capsys.readouterr().err


# ---- training --------------------------------------------------------------------------------------------------------


def arguments(shards, overlay, folder: Path, *more: str) -> list[str]:
    data = ["--data", str(shards), "--data", f"pseudo:{overlay}:0.4", "--val-split", "", "-b", "8", "-j", "0"]
    where = ["--output", str(folder), "--experiment", "run", "--log-samples", str(folder / "samples.jsonl")]
    return [*TINY, *data, *where, "--log-interval", "1", *more]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_trains_on_it_and_resumes_exactly(shards, predicted, tmp_path, capsys):
    overlay = tmp_path / "p.arrow"
    assert call(predicted, shards, "--share", "0.3", "--soft", "--out", str(overlay)) == 0
    assert train.main(arguments(shards, overlay, tmp_path / "whole", "--max-steps", "6")) == 0
    assert f"data pseudo:{overlay}: " in capsys.readouterr().err
    assert train.main(arguments(shards, overlay, tmp_path / "cut", "--max-steps", "3")) == 0
    more = ["--resume", "auto", "--max-steps", "6"]
    assert train.main(arguments(shards, overlay, tmp_path / "cut", *more)) == 0
    lines = samples(tmp_path / "whole")
    assert samples(tmp_path / "cut") == lines
    own = [k for line in lines for k, number in zip(line["keys"], line["data"], strict=True) if number == 1]
    index = opened(overlay, shards)
    assert own and set(own) <= {index.key(row) for row in range(len(index))}
    capsys.readouterr()
    assert call(predicted, shards, "--share", "0.3", "--out", str(overlay)) == 0  # hard now: other labels
    more = ["--resume", "auto", "--max-steps", "8"]
    assert run_verb(train.main, arguments(shards, overlay, tmp_path / "cut", *more)) == 2
    assert "was made with another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data, words",
    [
        (["pseudo:nowhere.arrow"], "pseudo-labels come after the data set with the true ones"),
        (["DATA", "pseudo:nowhere.arrow"], "--data pseudo:nowhere.arrow: cannot be read"),
        (["DATA", "pseudo:DATA/train.arrow"], "it is no overlay"),
    ],
)
def test_mistakes_of_data_are_one_line(shards, tmp_path, capsys, data, words):
    argv = [flag for text in data for flag in ("--data", text.replace("DATA", str(shards)))]
    assert run_verb(train.main, [*TINY, *argv, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(
    "more, words",
    [
        (["--split", "tset"], "did you mean test"),
        (["--split", "train"], "no row for"),
        (["--threshold", "nowhere.json"], "cannot read thresholds from nowhere.json"),
        (["--share", "0.001"], "is less than one"),
    ],
)
def test_mistakes_of_the_verb_are_one_line(shards, predicted, capsys, more, words):
    assert call(predicted, shards, *more) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_go_on_where_they_were_stopped(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "self"
    argv = ["--out", str(out), "--rounds", "1", "--share", "0.5", *TINY, "--data", str(shards), "-b", "8", "-j", "0"]
    argv += ["--max-steps", "2", "--eval-every", "2st"]
    assert run_verb(selftrain.main, argv) == 0
    said = capfd.readouterr()
    assert "round-0: pseudo-labels for" in said.err and "best f1_samples@tuned of each round" in said.out
    overlay = opened(out / "round-0" / "pseudo.arrow", shards)
    rule = thresholds.load(out / "round-0" / "best" / "thresholds.json")
    assert rule["global"] > 0 and len(overlay) == round(0.5 * len(open_index(load_dataset(shards), "test")))
    settings = (out / "round-1" / "args.yaml").read_text()
    assert f"pseudo:{out / 'round-0' / 'pseudo.arrow'}" in settings
    assert not (out / "round-1" / "pseudo.arrow").exists()

    (out / "round-0" / "predictions" / "test.csv").unlink()  # no longer needed
    assert run_verb(selftrain.main, argv) == 0
    said = capfd.readouterr().err
    assert "round-0: trained already" in said and "pseudo-labels there already" in said
    assert [len((out / f"round-{n}" / "seconds").read_text().split()) for n in (0, 1)] == [1, 1]
    assert run_verb(selftrain.main, [*argv, "--lr", "0.3"]) == 2
    assert "round-0 was trained with --lr auto, and now it is 0.3" in capfd.readouterr().err
    assert run_verb(selftrain.main, [*argv, "--split", "val"]) == 2
    assert "--split val: that is trained or evaluated on" in capfd.readouterr().err
