"""The data flags of a run, from the command line to the samples that it logs."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from server import Server

from mlc import evaluate, predict, train
from shards import pack
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index


@pytest.fixture(scope="module")
def folded(demo_csv, tmp_path_factory) -> Path:
    """The demo data in three folds."""
    out = tmp_path_factory.mktemp("folded") / "shards"
    table = ["--csv", str(demo_csv / "train.csv"), "--images", str(demo_csv / "images")]
    pack.main([*table, "--folds", "3", "--shard-size", "40", "--out", str(out), "-j", "1"])
    return out


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def arguments(data, folder: Path, *more: str) -> list[str]:
    short = ["--data", str(data), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    samples = ["--log-samples", str(folder / "samples.jsonl")]
    return [*TINY, *short, *samples, "--max-steps", "3", "--log-interval", "1", "--val-split", "", *more]


def trained(data, folder: Path, *more: str) -> list[dict]:
    """What `--log-samples` says about a run."""
    assert train.main(arguments(data, folder, *more)) == 0
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def keys(lines: list[dict]) -> list[str]:
    return [key for line in lines for key in line["keys"]]


def index_of(folder: Path, split: str = "train"):
    return open_index(load_dataset(folder), split)


# ---- where the bytes are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
def test_training_from_a_url_is_training_from_a_disk(shards, tmp_path, cached):
    near = trained(shards, tmp_path / "near")
    cache = ["--cache-dir", str(tmp_path / "cache")] if cached else []
    with Server(shards) as server:
        server.faults = ["503", "", "drop in the middle"]
        far = trained(server.url, tmp_path / "far", *cache)
        asked = [name for name, _ in server.log if name.endswith(".tar")]
        server.shutdown()
    assert far == near
    if cached:
        assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == len(set(asked))
    else:
        assert len(asked) >= 24  # one request an image, none read twice but for the faults
        assert len(asked) <= 24 + 3


def test_a_run_resumes_where_its_data_has_moved_to(shards, tmp_path):
    whole = trained(shards, tmp_path / "whole", "--max-steps", "5")
    assert len(trained(shards, tmp_path / "cut")) == 3
    with Server(shards) as server:
        rest = trained(server.url, tmp_path / "cut", "--max-steps", "5", "--resume", "auto")
        server.shutdown()
    assert rest == whole


def test_secrets_never_reach_a_run(tmp_path, capsys):
    for url in ("http://me:hunter2@127.0.0.1/x", "https://127.0.0.1/x?token=hunter2"):
        assert run_verb(train.main, arguments(url, tmp_path)) == 2
        assert run_verb(predict.main, ["--run", str(tmp_path), "--data", url]) == 2
    said = capsys.readouterr()
    assert "hunter2" not in said.err + said.out and "credentials come from the environment" in said.err
    assert not (tmp_path / "run").exists()


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_a_fold_is_validated_on_and_not_trained_on(folded, tmp_path, capsys):
    lines = trained(folded, tmp_path, "--fold", "1", "--max-steps", "15", "--eval-every", "15st")
    index = index_of(folded)
    of = {index.key(row): int(index.fold[row]) for row in range(len(index))}
    assert {of[key] for key in keys(lines)} == {0, 2}
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    run = ["--run", str(tmp_path / "run"), "--data", str(folded), "-j", "0"]
    assert run_verb(evaluate.main, [*run, "--split", "train", "--fold", "1", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    values = [line for line in logged if "val/map" in line][-1]
    assert scored["map"] in (pytest.approx(values["val/map"]), pytest.approx(values["val_ema/map"]))
    assert run_verb(predict.main, [*run, "--split", "train", "--fold", "1"]) == 0
    with open(tmp_path / "run" / "predictions" / "train.csv", newline="") as file:
        predicted = [line["ImageID"] for line in csv.DictReader(file)]
    assert predicted == [index.image_id(row) for row in np.flatnonzero(index.fold == 1)]


def test_rows_are_chosen_by_a_condition_and_a_list(shards, tmp_path):
    index = index_of(shards)
    dropped = [index.key(row) for row in range(0, len(index), 3)]
    (tmp_path / "drop.txt").write_text("\n".join(dropped))
    more = ["--where", "n_labels > 1", "--drop-rows", str(tmp_path / "drop.txt"), "--max-steps", "20"]
    seen = set(keys(trained(shards, tmp_path, *more)))
    count = index.labels_per_row()
    expected = {index.key(row) for row in range(len(index)) if count[row] > 1} - set(dropped)
    assert seen == expected


# ---- how often -------------------------------------------------------------------------------------------------------


def test_two_data_sets_and_their_shares(shards, folded, tmp_path, capsys):
    lines = trained(shards, tmp_path, "--data", f"{folded}:0.25", "--max-steps", "16")
    share = Counter(number for line in lines for number in line["data"])
    assert share[1] / (share[0] + share[1]) == pytest.approx(0.25, abs=0.08)
    said = capsys.readouterr().err
    assert "75.0% of the stream" in said and "25.0% of the stream" in said


def test_oversampling_is_announced_and_done(shards, tmp_path, capsys):
    dataset, index = load_dataset(shards), index_of(shards)
    rare = int(np.argmin(np.where(index.class_counts() > 0, index.class_counts(), 1 << 30)))
    name = dataset.classes[rare]
    trained(shards, tmp_path, "--oversample", f"{name}=5", "--max-steps", "30")
    rows = {index.key(row) for row in range(len(index)) if rare in index.labels(row)}
    every = keys([json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()])
    epoch = every[: len(index) + 4 * len(rows)]
    assert len(every) >= len(epoch)
    assert Counter(epoch) == {index.key(row): 5 if index.key(row) in rows else 1 for row in range(len(index))}
    said = capsys.readouterr().err
    expected = 100 * 5 * len(rows) / len(epoch)
    assert f"{name} {expected:.3g} % (data {100 * len(rows) / len(index):.3g} %)" in said


def test_block_shuffle_stays_inside_few_shards(shards, tmp_path):
    index = index_of(shards)
    place = {index.key(row): row for row in range(len(index))}
    lines = trained(shards, tmp_path, "--shuffle", "block:2", "--max-steps", "2", "-b", "8")
    rows = {place[key] for key in keys(lines)}  # a window: eight blocks of two neighbours
    assert len(rows) == 16 and all({(row + 1) % len(index), (row - 1) % len(index)} & rows for row in rows)
    assert keys(lines) != keys(trained(shards, tmp_path / "global", "--max-steps", "2"))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--fold", "7"], "--fold 7: no row is in it"),
        (["--where", "n_lables > 1"], "did you mean n_labels"),
        (["--where", "n_labels > 99"], "none of the"),
        (["--drop-rows", "nowhere.csv"], "--drop-rows nowhere.csv cannot be read"),
        (["--sampler", "log_freq"], "did you mean log-freq"),
        (["--oversample", "unicorn=3"], "no class 'unicorn'"),
        (["--shuffle", "block:0"], "use global, or block:N"),
        (["--crop", "if-needed"], "use one of rrc, squish, center, pad, if-needed:K"),
        (["--val-crop", "rrc"], "--val-crop rrc is random"),
        (["--cache-gb", "0"], "--cache-gb must be above 0"),
    ],
)
def test_mistakes_are_one_line(shards, tmp_path, capsys, more, words):
    assert run_verb(train.main, arguments(shards, tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_list_that_names_nothing_is_a_mistake(shards, tmp_path, capsys):
    (tmp_path / "drop.txt").write_text("a.jpg\n")
    assert run_verb(train.main, arguments(shards, tmp_path, "--drop-rows", str(tmp_path / "drop.txt"))) == 2
    assert "none of its 1 names, such as 'a.jpg', is an image id or a key" in capsys.readouterr().err


def test_other_classes_are_refused(shards, demo_csv, tmp_path, capsys):
    rows = (demo_csv / "train.csv").read_text().splitlines()[:5]
    (tmp_path / "few.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "few"
    table = ["--csv", str(tmp_path / "few.csv"), "--images", str(demo_csv / "images")]
    pack.main([*table, "--out", str(out), "-j", "1"])
    assert run_verb(train.main, arguments(shards, tmp_path, "--data", str(out))) == 2
    assert "has other classes than" in capsys.readouterr().err


def test_a_resume_with_another_stream_is_refused(shards, tmp_path, capsys):
    trained(shards, tmp_path)
    for more in (["--sampler", "sqrt-freq"], ["--shuffle", "block:4"], ["--where", "n_labels > 1"]):
        args = arguments(shards, tmp_path, "--resume", "auto", "--max-steps", "5", *more)
        assert run_verb(train.main, args) == 2
        assert "was made with another samples" in capsys.readouterr().err
