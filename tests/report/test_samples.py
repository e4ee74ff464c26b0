"""The table of predictions: the same samples each time, with what is true and what was said."""

import numpy as np
import pytest

from mlc.data.reader import TarReader
from mlc.report.samples import PIXELS, sample_table
from mlc.validation import Evaluation
from shards.dataset import load_dataset, open_index


@pytest.fixture
def split(shards):
    dataset = load_dataset(shards)
    reader = TarReader(open_index(dataset, "val"))
    rows = np.arange(len(reader))
    return dataset.classes, reader, rows


def test_a_perfect_model_predicts_the_labels(split):
    classes, reader, rows = split
    scores = reader.index.targets(rows) * np.float32(0.8)
    table = sample_table(reader, Evaluation({"threshold": 0.5}, rows, scores), classes, 4)
    assert [line["key"] for line in table] == [reader.index.key(row) for row in (0, 8, 16, 24)]
    for line in table:
        assert line["predicted"] == line["labels"] != "" and f"{line['labels'].split()[0]} 0.80" in line["scores"]
        assert max(line["image"].size) <= PIXELS


def test_none_are_asked_for_and_none_can_be_read(split, monkeypatch):
    classes, reader, rows = split
    evaluation = Evaluation({"threshold": 0.5}, rows[:2], np.zeros((2, len(classes)), np.float32))
    assert sample_table(reader, evaluation, classes, 0) is None
    assert len(sample_table(reader, evaluation, classes, 16)) == 2
    reader.index.crc32.flags.writeable or setattr(reader.index, "crc32", reader.index.crc32.copy())
    reader.index.crc32[:] ^= 1
    assert sample_table(reader, evaluation, classes, 16) is None
