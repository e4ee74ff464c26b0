"""Tokens against Hugging Face's own call and against counts by hand, for every architecture in its layout on disk."""

import json
import multiprocessing
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from tiny_tokenizers import MAKERS, TEXTS, word_pieces
from transformers import AutoTokenizer

from mlc.data.text import VOCABULARY, Pieces, Words, load_tokenizer, pretrained_tokenizer
from shards.console import UserError

CAPTIONS = ["a blue zero", "", "Something red, and a palace", "日本 xylophone"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_are_hugging_faces(folders, name, tmp_path):
    made = pretrained_tokenizer(str(folders[name]), max_tokens=12)
    tokens, mask = made(CAPTIONS)
    theirs = AutoTokenizer.from_pretrained(folders[name])(CAPTIONS, padding=True, truncation=True, max_length=12)
    assert tokens.tolist() == theirs["input_ids"]
    assert mask.tolist() == np.array(theirs["attention_mask"], bool).tolist()
    assert tokens.dtype == np.int64 and mask.dtype == bool
    assert (tokens[~mask] == made.pad).all()
    assert mask[1].sum() == 2  # CLS and SEP
    assert made.starts and len(made) > tokens.max()
    assert made(TEXTS)[0].shape[1] <= 12
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Pieces) and (again.max_tokens, len(again)) == (12, len(made))
    assert again(CAPTIONS)[0].tolist() == tokens.tolist()


def test_case(folders):
    for name, same in (("bert-uncased", True), ("bert-cased", False)):
        made = pretrained_tokenizer(str(folders[name]))
        assert (made(["Five"])[0].tolist() == made(["five"])[0].tolist()) is same


def _in_worker(tokenizer, queue):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queue.put(tokenizer(CAPTIONS)[0].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_in_workers(folders, method, kind):
    made = pretrained_tokenizer(str(folders["bert-uncased"])) if kind == "pieces" else Words.of(TEXTS)
    expected = made(CAPTIONS)[0].tolist()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_in_worker, args=(made, queue))
    worker.start()
    assert queue.get(timeout=600) == expected
    worker.join()


def test_no_warning_after_a_fork(folders):
    """The library, by version, warns on stderr when its threads were used before a fork."""
    code = (
        "import os; from mlc.data.text import pretrained_tokenizer as p;"
        f"t = p({str(folders['bert-uncased'])!r}); t(['a blue zero'] * 64); pid = os.fork(); t(['a'] * 64);"
        "pid and os.waitpid(pid, 0) and print(os.environ['TOKENIZERS_PARALLELISM'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "fork" not in done.stderr and "parallelism" not in done.stderr and done.stdout == "false\n"


def test_names_that_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such/model", "./folder", str(tmp_path / "gone")):
        with pytest.raises(UserError, match="give the folder of a model") as error:
            pretrained_tokenizer(name)
        assert f"--text-model {name}" in str(error.value) and "\n" not in str(error.value)


def test_names_in_the_local_cache(tmp_path, monkeypatch):
    """A model whose weights alone were downloaded has no tokenizer there, though transformers would make one up."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("whole", "weights"):
        cached = tmp_path / f"models--mine--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs/main").write_text("0" * 40)
        word_pieces(cached / "snapshots" / ("0" * 40))
    (cached / "snapshots" / ("0" * 40) / "vocab.txt").unlink()
    assert len(pretrained_tokenizer("mine/whole")) > 50
    with pytest.raises(UserError, match="not in the local cache"):
        pretrained_tokenizer("mine/weights")


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "roberta"])
def test_a_folder_without_a_vocabulary(tmp_path, model_type):
    """transformers makes a tokenizer of nothing but special tokens there, without a word."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"no tokenizer.*tokenizer\.json") as error:
        pretrained_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"beside config\.json"):
        pretrained_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "gone")


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words(tmp_path):
    made = Words.of(["b, a b!", "c b a", ""], max_tokens=3)
    assert made.words == ["b", "a", "c"]  # by count, then by name
    tokens, mask = made(["a c", "", "x b a b", "..."])
    assert tokens.tolist() == [[3, 4, 0], [1, 0, 0], [1, 2, 3], [1, 0, 0]]
    assert mask.sum(1).tolist() == [2, 1, 3, 1]
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.words, again.max_tokens, len(again)) == (made.words, 3, 5)
    assert Words.of(["b a b", "c b a"], min_count=2).words == ["b", "a"]
    assert Words.of(["b a b", "c b a"], most=1).words == ["b"]


def test_words_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no word comes 2 times"):
        Words.of(["a b", ""], min_count=2)
    for text in ("", "[]", '{"words": [1], "max_tokens": 3}', '{"words": ["a"]}'):
        (tmp_path / VOCABULARY).write_text(text)
        with pytest.raises(UserError, match="is no vocabulary of words"):
            load_tokenizer(tmp_path)
