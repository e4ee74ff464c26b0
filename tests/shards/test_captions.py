"""Each switch against examples by hand and, where a library does the work, against the library."""

import json
import random
import string
import sys

import ftfy
import numpy as np
import pytest
from packing import opened, pack_raw, write_raw, write_table
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from shards import captions, stats
from shards.captions import SWITCHES, caption_texts, clean, split_captions, switches, words
from shards.console import UserError, run


@pytest.mark.parametrize(
    "switch, before, after",
    [
        ("symbols", "caf&eacute; donâ€™t “go”", 'café don\'t "go"'),
        ("symbols", "a < b", "a < b"),
        ("mentions", "@bob and a@b.de see https://x.y/z?a=1 www.x.y", "and a@b.de see"),
        ("punctuation", "A red-brick house, 'old'; the man's (3.5 $)!", "A red brick house old the man's 3 5"),
        ("punctuation", "snake_case — rock 'n' roll… dogs’", "snake case rock n roll dogs"),
        ("punctuation", "हिन्दी शब्द, 「日本」।", "हिन्दी शब्द 日本"),
        ("lower", "A Zoo", "a zoo"),
        ("stopwords", "The cat, is it HERE? I can't see; nor hear twelve", "cat, ? ; hear"),
        ("lemmas", "Men's cars ate, dogs", "man car eat, dog"),
    ],
)
def test_switches(switch, before, after):
    assert clean(before, [switch]) == after
    assert clean(after, [switch]) == after or switch == "lemmas"


def test_nothing_but_blanks_without_switches():
    assert clean("  A\t b  \n", ()) == "A b"
    assert [clean(" ", [switch]) for switch in SWITCHES] == [""] * len(SWITCHES)


def test_symbols_leave_to_ftfy_what_is_not_plain():
    """The short cut for plain text must say what ftfy says."""
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(string.printable + "&;é") for _ in range(rng.randrange(40)))
        assert clean(text, ["symbols"]) == " ".join(ftfy.fix_text(text).split())


def test_stop_words_are_scikit_learns():
    assert clean(" ".join(sorted(ENGLISH_STOP_WORDS)), ["stopwords"]) == ""
    assert clean("a cat and one dog", ["stopwords"]) == "cat dog"


def test_order_is_fixed():
    chosen = switches(["lemmas,lower", " stopwords", "symbols"])
    assert chosen == ("symbols", "lower", "stopwords", "lemmas")
    assert clean("The &quot;Cars&quot;", chosen) == '"car"'


def test_words():
    assert words("A red-brick man's 3.") == ["A", "red", "brick", "man's", "3"]
    assert words(" ... ") == []


def test_captions_are_lines():
    assert split_captions("a\n\n b \r\nc") == ["a", "b", "c"]
    assert split_captions(" \n") == split_captions("") == []


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match=r"--clean lemma: no such switch; did you mean lemmas\?"):
        switches(["lower,lemma"])
    for name, package, cached in (("symbols", "ftfy", captions._ftfy), ("lemmas", "simplemma", captions._lemmatizer)):
        cached.cache_clear()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"--clean {name} needs a package: pip install \"mlc\[text\]\""):
            switches([name])


# ---- the preview -----------------------------------------------------------------------------------------------------

TEXTS = ["A dog, a Cat!", "", "the\nCars\n", "A dog, a Cat!", "the", "a [Red] one"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    raw = write_raw(tmp_path_factory.mktemp("captions") / "raw", samples=len(TEXTS), test=2)
    rows = [[f"{i}.jpg", str(i % 5), text] for i, text in enumerate(TEXTS)]
    write_table(raw / "train.csv", ["ImageID", "Labels", "Caption"], rows)
    assert pack_raw(raw, raw.parent / "out", "--test-csv", raw / "test.csv") == 0
    return raw.parent / "out"


def test_texts_of_rows(data):
    index = opened(data)
    assert list(caption_texts(index)) == [index.caption(row) for row in range(len(index))]
    assert list(caption_texts(index, np.array([4, 0]))) == [index.caption(4), index.caption(0)]


def test_preview_counts(data, capsys):
    flags = ["--split", "train", "--captions", "--json", "--clean", "lower,punctuation", "--clean", "stopwords"]
    assert run(stats.main, [str(data), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clean"] == ["punctuation", "lower", "stopwords"]
    train = found["splits"]["train"]
    assert {what: train[what] for what in ("samples", "without", "several", "captions")} == {
        "samples": 6,
        "without": 1,
        "several": 1,
        "captions": 6,
    }
    assert train["before"] == {
        "empty": 0,
        "words": 14,
        "median": 2.0,
        "longest": 4,
        "vocabulary": 8,
        "duplicates": 2,
    }
    assert train["after"] == {"empty": 2, "words": 6, "median": 1.0, "longest": 2, "vocabulary": 4, "duplicates": 2}
    assert dict(train["removed"])["a"] == 3
    assert ["A dog, a Cat!", "dog cat"] in train["examples"]


def test_preview_for_people(data, capsys):
    assert run(stats.main, [str(data), "--captions", "--clean", "lower"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "captions cleaned: lower",
        "words a caption, median",
        "a [Red] one",
        "taken away or changed most often",
    ):
        assert text in shown
    assert run(stats.main, [str(data), "--captions"]) == 0
    assert "not cleaned" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--clean", "lower"], "--clean goes with --captions"),
        (["--captions", "--clean", "stop"], "did you mean stopwords?"),
        (["--captions", "--html", "x.html"], "--captions prints tables"),
    ],
)
def test_preview_mistakes(data, capsys, flags, words):
    try:
        code = run(stats.main, [str(data), *flags])
    except SystemExit as left:
        code = left.code
    assert code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_no_captions_at_all(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", samples=3)
    write_table(raw / "train.csv", ["ImageID", "Labels"], [[f"{i}.jpg", "0"] for i in range(3)])
    assert pack_raw(raw, tmp_path / "out") == 0
    capsys.readouterr()
    assert run(stats.main, [str(tmp_path / "out"), "--captions"]) == 2
    assert "no captions in train" in capsys.readouterr().err
