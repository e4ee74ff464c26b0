"""The ablations of the ResNeXt-50 + BiGRU work: what each variant is, that it trains, the sizes in its tables."""

import csv
import shlex

import pytest
import torch
from conftest import log_of
from timm import create_model

from mlc import sweep, train
from mlc.flags import read_config, write_yaml
from mlc.models.fusion import Fused
from mlc.models.text import build_text_model
from mlc.sweeps import read
from shards.console import UserError

NAME = "resnext50-bigru-ablations"
PUBLISHED = {  # variant: what the work's tables 1 to 4 say of it
    "base": {"lr": 3e-4, "batch_size": 64, "embeddings": "fasttext", "patience": 10, "fusion": "early"},
    "without-caption": {"text_model": "", "fusion": "none"},
    "word2vec-skipgram": {"embeddings": "word2vec-skipgram"},
    "word2vec-cbow": {"embeddings": "word2vec-cbow"},
    "random-vectors": {"embeddings": ""},
    "without-attention": {"text_kwargs.attention": False},
    "without-batch-norm": {"fusion_kwargs.norm": False},
    **{f"lr={text}": {"lr": float(text)} for text in ("3e-3", "3e-2")},
    **{f"hidden={size}": {"text_kwargs.hidden": size} for size in (32, 64)},
    **{f"dim={size}": {"text_kwargs.dim": size} for size in (50, 100)},
    **{f"width={size}": {"fusion_kwargs.width": size} for size in (64, 128, 512)},
    **{f"batch={size}": {"batch_size": size} for size in (32, 128)},
}
RUNS = {run.variant: run.config for run in read(NAME, given={}, seeds=[1]).runs}
ALIKE = ("lr=3e-3", "lr=3e-2", "batch=32", "batch=128", "hidden=64", "dim=100", "width=64", "width=128")
SMALL = "--no-pretrained --model-kwargs layers=[1,1,1,1] --img-size 32 -j 0 --max-steps 2 --eval-every 2st --data"


def flat(config) -> dict:
    """Settings by name; those of a dict as `name.key`."""
    nested = {
        f"{name}.{key}": value for name, of in vars(config).items() if isinstance(of, dict) for key, value in of.items()
    }
    return {name: value for name, value in vars(config).items() if not isinstance(value, dict)} | nested


@pytest.mark.parametrize("name", [*RUNS])
def test_a_variant_changes_what_the_work_changed_and_nothing_else(name):
    plain, own = flat(RUNS["base"]), flat(RUNS[name])
    changed = {key for key in {*plain, *own} if plain.get(key) != own.get(key)} - {"experiment"}
    assert {key: own[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    if name not in ("base", "without-caption"):
        assert changed == {*PUBLISHED[name]}
    if name == "without-caption":
        without = {"model", "lr", "batch_size", "crop", "vflip", "patience", "img_size", "epochs"}
        assert not changed & without and own["clean"] == []


def test_every_published_variant_is_there():
    assert [*RUNS] == [*PUBLISHED]


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ALIKE])
def test_a_variant_trains(name, shards, tmp_path):
    write_yaml(RUNS[name], tmp_path / "variant.yaml")
    small = ["-c", str(tmp_path / "variant.yaml"), *shlex.split(SMALL), str(shards), "-b", "8"]
    assert train.main([*small, "--output", str(tmp_path), "--experiment", "run"]) == 0
    assert log_of(tmp_path / "run")[-1]["val/f1_samples"] >= 0


def test_one_command_trains_and_prints_the_size(shards, tmp_path, monkeypatch, capfd):
    """As it is written in the issue and README: `mlc sweep -c NAME`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = [*shlex.split(SMALL), str(shards), "-b", "8", "--out", str(tmp_path), "--seeds", "1", "--only", "dim=50"]
    assert sweep.main(["-c", NAME, *flags]) == 0
    with (tmp_path / "results.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["state"] == "finished")
    size = (tmp_path / "dim=50-s1" / "best" / "model.safetensors").stat().st_size
    assert (row["variant"], row["mb"]) == ("dim=50", f"{size / 1e6:.2f}".rstrip("0").rstrip("."))
    said = capfd.readouterr().out
    assert "MB" in said and f"{size / 1e6:.1f}" in said
    with pytest.raises(UserError, match=r"dim=50-s1 was trained with embeddings fasttext, and now it is word2vec-cbow"):
        sweep.main(["-c", NAME, *flags, "--embeddings", "word2vec-cbow"])


# ---- sizes -----------------------------------------------------------------------------------------------------------


WORDS = 6022  # from the published sizes with 50 and 150 numbers a word: (96.36 - 93.77) / 100 * 2**20 / 4 - 2 * 3 * 128


def mebibytes(config) -> float:
    """Of the weights as `best/model.safetensors` has them."""
    fused = {"fusion": config.fusion, "fusion_kwargs": dict(config.fusion_kwargs), "num_classes": 18, "empty": [1]}
    with torch.device("meta"):
        image = create_model(config.model, num_classes=18)
        model = Fused(image, build_text_model("bigru", vocabulary=WORDS, kwargs=config.text_kwargs), **fused)
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 2**20


def test_the_published_sizes():
    """The work's megabytes are of 2**20 bytes; it does not say how wide its attention and its last layers are."""
    sizes = {name: mebibytes(config) for name, config in RUNS.items() if config.text_model}
    assert sizes["base"] == pytest.approx(96.36, rel=0.02) and sizes["base"] * 2**20 < 100e6
    assert sizes["base"] - sizes["dim=100"] == pytest.approx(96.36 - 95.06, abs=0.02)
    bare = {name: sizes[name] - attention(RUNS[name]) for name in ("base", "hidden=32", "hidden=64")}
    assert bare["base"] - bare["hidden=32"] == pytest.approx(96.36 - 95.49, abs=0.02)
    assert bare["base"] - bare["hidden=64"] == pytest.approx(96.36 - 95.73, abs=0.02)
    assert sizes["width=64"] < sizes["width=128"] < sizes["base"] < sizes["width=512"]
    assert read_config(["-c", "comp5329-resnext50-bigru"]).text_kwargs == RUNS["base"].text_kwargs


def attention(config) -> float:
    """MiB of the attention over the words."""
    text = build_text_model("bigru", vocabulary=9, kwargs=config.text_kwargs)
    return sum(value.numel() * value.element_size() for value in text.pool.parameters()) / 2**20
