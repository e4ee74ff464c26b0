"""Evaluation while training: what a broken model answers is named, and no score is made of it."""

import numpy as np
import pytest
from indexes import CLASSES, make_index

from mlc import validation
from mlc.config import Config
from mlc.data.reader import TarReader
from mlc.inference import non_finite
from shards.console import UserError
from shards.dataset import load_dataset

ROWS = np.arange(4, 10)


@pytest.fixture
def reader(tmp_path):
    return TarReader(make_index(tmp_path, 12, seed=0))


def answers(value: float):
    """In place of `logits_of_rows`: two models, of which the second says `value` of the third row."""
    logits = np.zeros((len(ROWS), 2, 1, len(CLASSES)), np.float32)
    logits[2, 1, 0, 3] = value
    return lambda *args, **how: iter([(ROWS, logits)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_training_stops_at_what_is_no_score(reader, monkeypatch, value):
    monkeypatch.setattr(validation, "logits_of_rows", answers(value))
    dataset = load_dataset(reader.index.path.parent)
    with pytest.raises(UserError) as refused:
        given = (Config(), dataset, None, lambda logits, target: logits * 0 + 1, [0.5] * 3, [0.5] * 3, None)
        validation.evaluate({"val": None, "val_ema": None}, reader, ROWS, *given, step=7)
    said = f"step 7, evaluation of val_ema: {reader.name(6)}, class {CLASSES[3]}: the model's output is {value}"
    assert str(refused.value).startswith(f"{said} (1 image of 6)")


def test_the_first_of_several_is_named(reader):
    values = np.zeros((6, len(CLASSES)))
    assert non_finite(values, ROWS, reader, CLASSES) == ""
    values[1, 2] = values[3, 0] = np.nan
    assert non_finite(values, ROWS, reader, CLASSES).startswith(f"{reader.name(5)}, class {CLASSES[2]}: ")
    assert "(2 images of 6)" in non_finite(values, ROWS, reader, CLASSES)
