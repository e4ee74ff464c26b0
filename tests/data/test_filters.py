"""Row filters against a loop over the rows in Python, and everything that must be refused."""

import csv

import numpy as np
import pytest
from indexes import CLASSES, make_index

from mlc.data import filters
from mlc.data.filters import matches, named, read_names, select_rows
from shards.console import UserError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("a"), 700, seed=0)


@pytest.fixture(params=[1 << 20, 64])
def chunks(request, monkeypatch):
    monkeypatch.setattr(filters, "CHUNK", request.param)


def row_values(index, row: int) -> dict:
    names = [CLASSES[column] for column in index.labels(row)]
    return {
        "key": index.key(row),
        "image_id": index.image_id(row),
        "shard": int(index.shard[row]),
        "size": int(index.size[row]),
        "ext": index.ext(row),
        "caption": index.caption(row),
        "fold": int(index.fold[row]),
        "weight": float(index.weight[row]),
        "labels": names,
        "n_labels": len(names),
    }


@pytest.mark.parametrize(
    "where",
    [
        "fold != 0 and n_labels > 1",
        "fold == 2 or fold == 3",
        "not (fold == 2 or size < 500)",
        "100 < size <= 400",
        "200 < size",
        "fold in (1, 4) and ext not in ['png']",
        "caption == 'caption 3'",
        "ext == \"jpg\" and caption != 'caption 3'",
        "key >= 'k00350'",
        "weight > 0.5",
        "weight == 0",
        "fold > -1",
        '"cat" in labels',
        '"cat" in labels and "tag::a=b" not in labels and "dog" in labels',
        '"nothing" in labels or n_labels == 0',
    ],
)
def test_conditions_mean_what_python_means(index, chunks, where):
    expected = [bool(eval(where, {}, row_values(index, row))) for row in range(len(index))]
    assert (matches(index, CLASSES, where).tolist() == expected and any(expected) and not all(expected[:-1])) or (
        where == "fold > -1"
    )


@pytest.mark.parametrize(
    "where, words",
    [
        ("fold =! 2", "not a condition; write it like"),
        ("", "not a condition"),
        ("__import__('os').system('true')", "cannot be used here"),
        ("fold", "'fold' cannot be used here"),
        ("fold == size.real", "'size.real' cannot be used here"),
        ("fold + 1 == 2", "cannot be used here"),
        ("fold is 2", "cannot be used here"),
        ("[x for x in key] == 2", "cannot be used here"),
        ("fold == True", "'True' cannot be used here"),
        ("n_label > 1", "unknown column 'n_label'; did you mean n_labels"),
        ("labels == 3", "unknown column 'labels'"),
        ('"cta" in labels', "no class 'cta'; did you mean cat"),
        ("fold == 'two'", "--where fold == 'two': "),
        ("(" * 1000 + "fold == 1" + ")" * 1000, "not a condition"),
    ],
)
def test_conditions_that_are_refused(index, where, words):
    with pytest.raises(UserError) as error:
        matches(index, CLASSES, where)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_folds(index):
    train, val = select_rows(index, CLASSES, without_fold=2), select_rows(index, CLASSES, fold=2)
    assert val.tolist() == [row for row in range(700) if row % 5 == 2] and val.dtype == np.int64
    assert sorted([*train, *val]) == list(range(700))
    with pytest.raises(UserError, match="--fold 7: no row is in it; train has folds 0, 1, 2, 3, 4"):
        select_rows(index, CLASSES, without_fold=7)


def test_no_filter_means_all_rows_without_a_list(index):
    assert select_rows(index, CLASSES) is None


@pytest.mark.parametrize(
    "content",
    [
        "3.jpg\n5.jpg\n\nk00007\nnot there.jpg\n",
        "ImageID,Labels\n3.jpg,1 2\n5.jpg,\n7.jpg,4\n",
        "\ufeffimage_id\n3.jpg\n5.jpg\n7.jpg\n",
        'split,shard,key,image_id,reason\ntrain,s,k3,3.jpg,"a, b"\ntrain,s,k5,5.jpg,x\ntrain,s,k7,7.jpg,x\n',
        "key,reason\nk00003,\nk00005,\nk00007,\n",
    ],
)
def test_lists_of_rows_to_drop(index, chunks, tmp_path, content):
    (tmp_path / "drop.csv").write_text(content, encoding="utf-8")
    drop = named(index, read_names(tmp_path / "drop.csv"))
    kept = select_rows(index, CLASSES, drop=drop, where="n_labels >= 0")
    assert sorted(set(range(700)) - set(kept.tolist())) == [3, 5, 7]


def test_an_empty_list_drops_nothing_and_no_list_is_a_mistake(index, tmp_path):
    (tmp_path / "drop.txt").write_text("ImageID\n")
    assert not named(index, read_names(tmp_path / "drop.txt")).any()
    with pytest.raises(UserError, match=r"--drop-rows .*other.txt cannot be read: No such file"):
        read_names(tmp_path / "other.txt")


def test_names_with_commas_and_quotes(tmp_path):
    names = ['a,"b".jpg', "c d.jpg"]
    with open(tmp_path / "drop.csv", "w", newline="") as file:
        csv.writer(file).writerows([["ImageID"], *([name] for name in names)])
    assert read_names(tmp_path / "drop.csv") == names


def test_filters_that_leave_nothing_are_named(index):
    with pytest.raises(UserError, match=r"--fold 2 --where fold != 2: none of the 700 rows of train is left"):
        select_rows(index, CLASSES, fold=2, where="fold != 2")
