"""Word vectors: gensim's files in all formats back to the same numbers, the same file from another process, damage."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment
from gensim.models import FastText, KeyedVectors, fasttext

from mlc import embed
from mlc.data.sources import open_sources
from mlc.data.text import Words
from mlc.flags import read_config
from shards.console import UserError, run

SENTENCES = [["a", "red", "dog"], ["a", "blue", "cat"], ["the", "red", "cat"], []] * 5
SETTINGS = {"dim": 6, "epochs": 2, "window": 3, "min_count": 1, "seed": 1}


@pytest.fixture(scope="module")
def vectors():
    return embed.train_embeddings(SENTENCES, "word2vec-skipgram", **SETTINGS)


@pytest.mark.parametrize("kind", embed.KINDS)
def test_kinds_differ_and_repeat(kind):
    first, again = (embed.train_embeddings(SENTENCES, kind, **SETTINGS) for _ in range(2))
    assert set(first.key_to_index) == {"a", "red", "dog", "blue", "cat", "the"}
    assert first.vectors.shape == (6, 6)
    assert (first.vectors == again.vectors).all()
    others = (embed.train_embeddings(SENTENCES, other, **SETTINGS) for other in embed.KINDS if other != kind)
    assert all((first["dog"] != other["dog"]).any() for other in others)


@pytest.mark.parametrize("kind", embed.KINDS)
def test_words_in_the_same_places_are_alike(kind):
    """Colours and digits: each nearer to its like than to the others."""
    rng = np.random.default_rng(0)
    groups = (("red", "blue", "white", "green"), ("seven", "zero", "eight", "three"))
    sentences = [["a", *(group[rng.integers(4)] for group in groups), "somewhere"] for _ in range(400)]
    vectors = embed.train_embeddings(sentences, kind, **SETTINGS | {"dim": 16, "epochs": 15, "window": 1})
    like, unlike = (
        np.mean([vectors.similarity(a, b) for a in one for b in other if a != b])
        for one, other in ((groups[0], groups[0]), groups)
    )
    assert like > unlike + 0.2


def test_the_same_file_from_any_process(shards, tmp_path):
    """Python hashes texts differently in each process; nothing may depend on it."""
    files = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.vec"
        flags = [
            "--data",
            str(shards),
            "--dim",
            "4",
            "--epochs",
            "1",
            "--clean",
            "lower,punctuation",
            "--out",
            str(out),
        ]
        code = f"import sys; from mlc.embed import main; main({flags!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment() | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert b"\nflower " in files[0]


@pytest.mark.parametrize("name", ["w.vec", "w.bin", "glove.txt", "facebook.bin"])
def test_formats(vectors, tmp_path, name):
    path = tmp_path / name
    if name == "facebook.bin":
        model = FastText(SENTENCES, vector_size=6, min_count=1, bucket=50, workers=1, epochs=1)
        fasttext.save_facebook_model(model, str(path))
        vectors = model.wv
    else:
        vectors.save_word2vec_format(str(path), binary=name == "w.bin")
    if name == "glove.txt":
        path.write_text(path.read_text().split("\n", 1)[1])
    vocabulary = Words(["dog", "CAT", "red", "a"])
    matrix, share = embed.read_embeddings(path, vocabulary)
    assert share == 1 and matrix.shape == (6, 6) and matrix.dtype == np.float32
    expected = [vectors[word] for word in ("dog", "cat", "red", "a")]
    expected[1] = vectors["CAT"] if name == "facebook.bin" else expected[1]  # fastText makes one of its pieces
    np.testing.assert_allclose(matrix[2:], expected, rtol=1e-5, atol=1e-8)
    assert not matrix[0].any() and matrix[1].any()


@pytest.mark.parametrize("kind", embed.KINDS)
def test_trained_when_a_run_begins(shards, tmp_path, kind):
    """The same as by way of a file: of the training split's captions, cleaned as the run cleans them."""
    clean, out = ("punctuation", "lower"), tmp_path / "w.bin"
    flags = ["--data", str(shards), "--kind", kind, "--dim", "5", "--clean", ",".join(clean), "--out", str(out)]
    embed.main(flags)
    parts = open_sources(read_config(["--data", str(shards)])).sampler.sources
    vocabulary = Words(["flower", "seven", "nowhere"])
    matrix, share = embed.read_embeddings(kind, vocabulary, parts=parts, clean=clean, dim=5)
    expected, found = embed.read_embeddings(out, vocabulary)
    np.testing.assert_array_equal(matrix[2:4], expected[2:4])
    assert matrix.shape == (5, 5) and found == 2 / 3 and share == (1 if kind == "fasttext" else 2 / 3)
    with pytest.raises(UserError, match=r"--embeddings fastext: expected .vec.*did you mean fasttext"):
        embed.read_embeddings("fastext", vocabulary)


def test_words_that_are_missing(vectors, tmp_path):
    vectors.save_word2vec_format(str(tmp_path / "w.vec"))
    names = ["dog", *(f"w{i}" for i in range(400)), "red"]
    matrix, share = embed.read_embeddings(tmp_path / "w.vec", Words(names))
    assert share == 2 / 402
    known = np.stack([vectors["dog"], vectors["red"]])
    assert abs(matrix[3:403].std() - known.std()) < 0.1 * known.std()
    assert (matrix == embed.read_embeddings(tmp_path / "w.vec", Words(names))[0]).all()
    with pytest.raises(UserError, match="has none of the 1 words"):
        embed.read_embeddings(tmp_path / "w.vec", Words(["zebra"]))


@pytest.mark.parametrize("name", ["w.vec", "w.bin", "facebook.bin"])
def test_damaged_files(vectors, tmp_path, name):
    path, damaged = tmp_path / name, tmp_path / f"x{name}"
    if name == "facebook.bin":
        fasttext.save_facebook_model(FastText(SENTENCES, vector_size=6, min_count=1, bucket=50, workers=1), str(path))
    else:
        vectors.save_word2vec_format(str(path), binary=name == "w.bin")
    data = path.read_bytes()
    for content in (b"", data[: len(data) // 2], b"9999999999 300\n" + data, b"\x00" * 50, b"a b c\n" * 3):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="--embeddings") as error:
            embed.read_embeddings(damaged, Words(["dog", "a"]))
        assert "\n" not in str(error.value)


def test_other_mistakes(tmp_path, shards, capsys):
    for path, words in ((tmp_path / "gone.vec", "No such file"), (tmp_path / "w.npy", "expected .vec")):
        with pytest.raises(UserError, match=words):
            embed.read_embeddings(path, Words(["dog"]))
    for flags, words in (
        (["--out", str(tmp_path / "w.npy")], "expected .vec"),
        (["--out", str(tmp_path / "w.vec"), "--clean", "lowr"], "did you mean lower?"),
        (["--out", str(tmp_path / "w.vec"), "--min-count", "1000"], "--min-count 1000"),
    ):
        assert run(embed.main, ["--data", str(shards), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(UserError, match="no word in the captions"):
        embed.train_embeddings([[], []], "fasttext", **SETTINGS)


def test_a_verb_writes_what_gensim_reads(shards, tmp_path, capsys):
    out = tmp_path / "w.bin"
    flags = ["--data", str(shards), "--kind", "word2vec-cbow", "--dim", "4", "--out", str(out)]
    assert run(embed.main, flags) == 0
    assert "word2vec-cbow, from" in capsys.readouterr().err
    assert KeyedVectors.load_word2vec_format(str(out), binary=True).vector_size == 4
