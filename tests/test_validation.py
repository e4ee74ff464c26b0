"""The metric that chooses the best weights: which there are, and what is done where it has no value."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from mlc import train, validation
from mlc.config import Config
from mlc.inference import non_finite
from mlc.metrics import multilabel
from mlc.validation import Evaluation, Standing, evaluate, goodness, notes, refuse_unknown_metric, score_names
from shards.console import UserError

sys.path.insert(0, str(Path(__file__).parent / "shards"))
from packing import pack_raw, write_raw, write_table

DATASET = SimpleNamespace(classes=("a", "b", "c"), group_columns={"tag": [0, 2], "ink": [1]})


def test_every_score_can_be_chosen_and_the_threshold_is_none():
    scores = np.random.default_rng(0).random((5, 3), np.float32)
    named = dict(multilabel.evaluate(scores, scores > 0.5, groups=DATASET.group_columns))
    assert score_names(DATASET) == ["loss", *(name for name in named if name != "threshold")]
    for name in score_names(DATASET):
        refuse_unknown_metric(name, DATASET)
    with pytest.raises(UserError, match="--eval-metric threshold is a setting and no score; choose one of loss, map,"):
        refuse_unknown_metric("threshold", DATASET)
    with pytest.raises(UserError, match="metric: map/tags is not measured; did you mean map/tag"):
        refuse_unknown_metric("map/tags", DATASET, "metric:")


def test_goodness_puts_no_value_below_all_values_and_above_no_evaluation():
    best, worst, none = {"map": 0.5}, {"map": 0.0}, {"map": math.nan}
    order = [none, best, None, worst]
    assert sorted(order, key=lambda found: goodness(found, "map")) == [None, none, worst, best]
    assert goodness({"map": None}, "map") == goodness({"map": math.nan}, "map")  # null, once it was in a file
    found = {"val": {"loss": math.nan}, "val_ema": {"loss": 0.7}}  # NaN first: max() itself would keep it
    assert max(found, key=lambda name: goodness(found[name], "loss")) == "val_ema"
    assert (
        goodness({"loss": math.inf}, "loss") == goodness({"loss": math.nan}, "loss") < goodness({"loss": 9.0}, "loss")
    )


def test_a_metric_that_says_nothing_is_known_at_the_start():
    first = SimpleNamespace(labels_of=lambda rows: (np.ones(1, int), np.zeros(1, int)))  # row 0 has class 1
    none = SimpleNamespace(labels_of=lambda rows: (np.zeros(0, int), np.zeros(0, int)))

    def said(metric: str, index, rows: int, **more) -> list[str]:
        return notes(Config(data=["x"], eval_metric=metric, **more), DATASET, index, np.arange(rows))

    for metric in ("map", "f1_samples", "map/ink", "loss"):
        assert said(metric, first, 1) == []
    (line,) = said("f1_samples", first, 3)
    assert line.startswith("2 of 3 samples have no true label: each counts 0")
    (line,) = said("f1_samples", first, 3, zero_division=1)
    assert line.startswith("2 of 3 samples have no true label: each counts 1")
    (line,) = said("map/tag", first, 3)
    assert line.startswith("--eval-metric map/tag: no validation sample has a label of the group tag")
    (line,) = said("f1_samples", none, 3)
    assert "no validation sample has a label, so it says nothing" in line and "--eval-metric loss" in line


def test_a_run_is_told_how_it_stands_to_what_needs_no_model():
    def index(*labels: list[int]):
        columns = np.array([column for row in labels for column in row])
        owner = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
        return SimpleNamespace(
            labels_of=lambda rows: (columns, owner), labels_per_row=lambda: np.array([*map(len, labels)])
        )

    # F1 on the three samples of always class 0: 1, 2/3, 0; with class 1 too: 2/3, 1, 0; of all: 1/2, 4/5, 1/2.
    val = index([0], [0, 1], [2])
    rows = [SimpleNamespace(index=index([0], [], [1]), rows=np.array([0, 2]))]  # the bare sample takes no part
    sources = SimpleNamespace(natural=np.array([0.5, 0.3, 0.2]), sampler=SimpleNamespace(sources=rows))
    standing = Standing.of(Config(data=["x"]), sources, val, np.arange(3))
    assert standing.f1 == pytest.approx(0.6) and standing.labels == 3 and standing.chance == pytest.approx(4 / 9)

    good = {"f1_samples@tuned": 0.7, "map": 0.5, "threshold": 0.4}
    scores = np.array([[0.9, 0.1, 0.1], [0.3, 0.4, 0.1], [0.1, 0.1, 0.5]], np.float32)
    assert standing.lines(good) == [
        "without a model: F1 samples 0.6000 of always the 3 commonest labels, mAP 0.4444 by chance; with it: 0.7000 "
        "tuned, 0.5000"
    ]
    standing.keep(Evaluation(good, np.arange(3), scores), {"global": 0.4})
    assert standing.lines(good)[1:] == [
        "warning: the threshold 0.4000 leaves 1 of 3 samples without a label, and in truth every training sample has "
        "one; `mlc tune --rule expected` chooses the labels of each sample by itself"
    ]
    (warning,) = standing.lines(good | {"map": 0.4, "threshold": 0.4})[1:2]
    assert warning.startswith("warning: mAP not above what needs no model; if it stays so, try another --lr")
    rows[0].rows = None  # now some training samples are bare too
    standing = Standing.of(Config(data=["x"]), sources, val, np.arange(3))
    standing.keep(Evaluation(good, np.arange(3), scores), {"global": 0.4})
    assert len(standing.lines(good)) == 1 and len(standing.lines(good | {"map": None})) == 1  # null in a file


def test_logits_that_are_no_numbers_leave_a_model_without_values(monkeypatch, capsys):
    logits = np.zeros((2, 4, 1, 3), np.float32)  # [models, rows, views, classes]
    logits[0, 2, 0, 1] = np.nan
    batches = [(np.arange(4), logits.swapaxes(0, 1))]
    monkeypatch.setattr(validation, "logits_of_rows", lambda *args, **more: batches)
    index = SimpleNamespace(targets=lambda rows: np.eye(4, 3, dtype=np.float32))
    reader = SimpleNamespace(index=index, name=lambda row: f"sample {row}")
    rank = SimpleNamespace(is_main_process=True)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    config = Config(data=["x"], zero_division=1)
    told = (config, DATASET, rank, lambda x, t: bce(x, t, reduction="none"), (0,) * 3, (1,) * 3, None)
    found = evaluate({"val": None, "val_ema": None}, reader, np.arange(4), *told, step=7)
    bad, good = found["val"].metrics, found["val_ema"].metrics
    assert set(bad) == set(good) and bad.pop("threshold") == 0.5 and np.isnan(list(bad.values())).all()
    assert good["loss"] == pytest.approx(math.log(2)) and np.isfinite(list(good.values())).all()
    assert good["f1_samples"] == 0.25  # row 3 has no label, and none is predicted: --zero-division 1
    assert (
        "step 7, evaluation of val: sample 2, class b: the model's output is nan (1 image of 4)"
        in capsys.readouterr().err
    )


def test_the_first_of_several_images_is_named():
    reader, values = SimpleNamespace(name=lambda row: f"sample {row}"), np.zeros((6, 3))
    assert non_finite(values, np.arange(6), reader, DATASET.classes) == ""
    values[1, 2] = values[3, 0] = np.nan
    found = non_finite(values, np.arange(6), reader, DATASET.classes)
    assert found.startswith("sample 1, class c: ") and "(2 images of 6)" in found


def test_a_run_whose_metric_has_no_value_says_so_and_has_its_best_weights(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw")
    write_table(raw / "val.csv", ["ImageID", "Labels"], [[f"{number}.jpg", ""] for number in (10, 11)])
    lines = (raw / "train.csv").read_text().splitlines()
    (raw / "train.csv").write_text("\n".join(lines[:11]) + "\n")
    assert pack_raw(raw, tmp_path / "data", "--val-csv", raw / "val.csv") == 0
    flags = ["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--experiment", "run", "-b", "4", "-j", "0"]
    assert train.main([*TINY, *flags, "--max-steps", "2", "--eval-every", "1st", "--eval-metric", "map"]) == 0
    said = capsys.readouterr().err
    assert said.count("--eval-metric map: no validation sample has a label") == 1 and "mAP -  F1" in said
    assert "best map - at step 1" in said and said.count("without a model: ") == 2  # first evaluation, and end

    def refuse(constant):
        raise AssertionError(constant)

    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    values = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["val/map"] for line in values if "val/map" in line] == [None, None]
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
