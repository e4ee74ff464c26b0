"""What a clone without git-lfs, or a download without a login, leaves in place of a file is named as that, wherever
weights and data are opened."""

from pathlib import Path

import numpy as np
import pytest

from mlc.data.features import FeatureFile
from mlc.data.overlay import open_overlay
from mlc.data.prediction_files import class_columns, read_predictions
from mlc.data.reader import _misfit
from mlc.data.text import Words, pretrained_tokenizer
from mlc.models.convert import read_weights
from mlc.models.export import load_exported
from mlc.models.text import files_of
from mlc.models.text_export import load_text
from mlc.post.tables import by_image
from shards.console import UserError
from shards.dataset import load_dataset
from shards.files import download_problem
from shards.image import BadImage, check_image
from shards.table import read_classes
from shards.tar import scan

POINTER = b"version https://git-lfs.example/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!doctype HTML>\n<html><head><title>Sign in</title></head></html>"

OPENED = {
    "w.safetensors": read_weights,
    "w.pth": read_weights,
    "pytorch_model.bin": lambda path: read_weights(path.parent),
    "config.json": lambda path: load_exported(path.parent),
    "model.safetensors": lambda path: (
        (path.parent / "config.json").write_text("{}"),
        files_of(str(path.parent), pretrained=True),
    ),
    "text/config.json": lambda path: load_text(path.parent),
    "tokenizer.json": lambda path: pretrained_tokenizer(str(path.parent)),
    "vocab.txt": lambda path: pretrained_tokenizer(str(path.parent)),
    "words.json": Words.load,
    "p.csv": class_columns,
    "p.arrow": lambda path: read_predictions(path, ["a"]),
    "f.arrow": FeatureFile,
    "o.arrow": lambda path: open_overlay(f"pseudo:{path}", []),
    "x.npz": lambda path: by_image([path], None, "--features"),
    "dataset.json": lambda path: load_dataset(path.parent),
    "classes.yaml": read_classes,
    "train-0.tar": lambda path: list(scan(path)),
}


@pytest.mark.parametrize(
    "content, words", [(POINTER, "git lfs pull"), (PAGE, "is a web page")], ids=["pointer", "page"]
)
@pytest.mark.parametrize("name", OPENED)
def test_every_file_that_is_opened(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        OPENED[name](path)
    assert path.name in str(refused.value) and words in str(refused.value)


def test_images_and_indexed_tars(tmp_path):
    with pytest.raises(BadImage, match="git lfs pull"):
        check_image(POINTER)
    (tmp_path / "train-0.tar").write_bytes(POINTER)
    assert "train-0.tar is a git-lfs pointer" in _misfit(tmp_path / "train-0.tar", 10_000_000)


def test_other_files_are_left_alone(tmp_path):
    for content in (b"version 1\n", b"<svg/>", np.zeros(9).tobytes(), b'<?xml version="1.0"?>\n<svg/>'):
        assert download_problem(content) == ""
    assert "is a web page" in download_problem(b'<?xml version="1.0"?><Error><Code>AccessDenied')
    assert "is empty" in download_problem(b"") and download_problem(Path(tmp_path / "nowhere")) == ""


def test_nobody_is_told_to_run_the_code_of_a_file(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x04c__main__\nEvil\n.")
    with pytest.raises(UserError, match="cannot be read as weights: it holds") as refused:
        read_weights(tmp_path / "w.pth")
    assert "weights_only" not in str(refused.value)
