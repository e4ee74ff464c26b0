"""Every recipe trains for a few steps with its own settings; the model is a small one of the same architecture."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from caption_runs import hub_folder
from conftest import log_of
from timm.models import pnasnet

from mlc import recipes, train
from mlc.data.features import write_features
from mlc.flags import RECIPES, read_config, read_yaml
from mlc.models.build import resolve_name
from shards import demo, pack
from shards.console import UserError
from shards.dataset import load_dataset, open_index

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
SHALLOW = {"layers": [1, 1, 1, 1]}

# What stands for the architecture: (timm's name, its arguments, pixels).
SMALL = {
    "resnet18": ("test_resnet", {}, 32),
    "resnext50_32x4d": ("resnext50_32x4d", {"layers": [1, 1, 1, 1]}, 32),
    "vit_small_r26_s32_224": ("vit_tiny_r_s16_p8_224", VIT, 32),
    "deit_small_patch16_224": ("deit_small_patch16_224", VIT, 32),
    "swin_base_patch4_window7_224": ("swin_base_patch4_window7_224", SWIN, 32),
    "swin_large_patch4_window7_224": ("swin_large_patch4_window7_224", SWIN, 32),
    "swinv2_large_window12to16_192to256": ("swinv2_large_window12to16_192to256", SWIN, 32),
    "efficientnet_b0": ("test_efficientnet", {}, 32),
    "efficientnet_b3": ("test_efficientnet", {}, 32),
    "tf_efficientnet_lite0": ("test_efficientnet", {}, 32),
    "tresnet_l": ("tresnet_l", {**SHALLOW, "width_factor": 0.25}, 32),
    "legacy_senet154": ("legacy_seresnet18", {}, 32),
    "legacy_seresnext50_32x4d": ("legacy_seresnext50_32x4d", SHALLOW, 32),
    "legacy_seresnext101_32x4d": ("legacy_seresnext50_32x4d", SHALLOW, 32),
    "densenet161": ("densenet161", {"growth_rate": 8, "block_config": [1, 1, 1, 1]}, 32),
    "pnasnet5large": ("pnasnet5large", {}, 32),  # narrow: see `narrow`
    "inception_resnet_v2": ("inception_resnet_v2", {}, 96),
    "swinv2_tiny_window8_256": ("swinv2_tiny_window8_256", SWIN, 32),
}

# What stands for the text model: a tiny one of its kind, with a tokenizer of its kind, both in a folder.
TEXTS = {
    "bert-base-uncased": "bert-uncased",
    "bert-base-cased": "bert-cased",
    "albert-base-v2": "albert",
    "microsoft/deberta-v3-small": "deberta-v3",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """{name of a text model: the folder to load in its place}"""
    return {name: hub_folder(kind, tmp_path_factory.mktemp("hub")) for name, kind in TEXTS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty images with the labels of iMet in their two groups, each in a fold of its own."""
    root = tmp_path_factory.mktemp("recipes")
    demo.main([str(root / "raw"), "--samples", "60", "--size", "40", "--shape", "imet", "--workers", "1"])
    flags = ["--csv", "train.csv", "--images", "images", "--val-csv", "val.csv", "--folds", "40", "--workers", "1"]
    paths = [
        str(root / "raw" / flag) if flag.endswith(("csv", "images")) and flag[0] != "-" else flag for flag in flags
    ]
    pack.main([*paths, "--out", str(root / "shards")])
    return root / "shards"


@pytest.fixture
def narrow(monkeypatch):
    """PNASNet with a 27th of its channels, Inception-ResNet without most of its repeats: neither takes arguments."""

    def thin(cell, **widths):
        return cell(**{key: w // 27 if "chs" in key and w % 27 == 0 else w for key, w in widths.items()})

    classifier = pnasnet.create_classifier
    for name in ("CellStem0", "Cell"):
        monkeypatch.setattr(pnasnet, name, partial(thin, getattr(pnasnet, name)))
    monkeypatch.setattr(pnasnet, "create_classifier", lambda width, *a, **k: classifier(width // 27, *a, **k))
    inception = sys.modules["timm.models.inception_resnet_v2"]
    for name in ("Block35", "Block17", "Block8"):
        monkeypatch.setattr(inception, name, lambda **_: torch.nn.Identity())


def shortened(name: str, hub: dict) -> list[str]:
    """Flags that make a recipe small, and leave alone what it is about."""
    config = read_config(["-c", name])
    few = ["-b", "2", "--global-batch-size", "4", "--validation-batch-size", "4", "-j", "0", "--amp-dtype", "none"]
    few += ["--log-interval", "1", "--no-checkpoint-async", "--eval-every", "1000ep"]
    if config.features:
        return ["-c", name, "--max-steps", "3", *few]
    small, kwargs, size = SMALL[resolve_name(config.model)[0].partition(".")[0]]
    stages = [{**stage, "for": "1st"} for stage in config.stages]
    stages = [{**stage, "warmup": "0ep"} if "warmup" in stage else stage for stage in stages]
    argv = [
        "-c",
        name,
        "--no-pretrained",
        "--pretrained-path",
        "",
        "--model",
        small,
        "--img-size",
        str(size),
        "--max-steps",
        "3",
    ]
    argv += ["--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())] if kwargs else []
    argv += ["--stages", yaml.safe_dump(stages, default_flow_style=True)] if stages else []
    argv += ["--text-model", str(hub[config.text_model])] if config.text_model in hub else []
    return [*argv, *few]


def random_features(data: Path, file: Path) -> list[str]:
    """In the place of CLIP's."""
    dataset, random = load_dataset(data), np.random.default_rng(0)
    splits = {name: open_index(dataset, name) for name in ("train", "val")}
    made = {
        name: (index, random.standard_normal((len(index), 24), np.float32), np.ones(len(index), bool))
        for name, index in splits.items()
    }
    encoders = [{"name": "a", "features": 16}, {"name": "b", "features": 8}]
    write_features(file, made, data=dataset.fingerprint, encoders=encoders)
    return ["--features", str(file)]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name, data, hub, tmp_path, narrow):
    argv = [*shortened(name, hub), "--data", str(data), "--output", str(tmp_path), "--experiment", "run"]
    config = read_config(argv)
    argv += random_features(data, tmp_path / "features.arrow") if config.features else []
    argv += ["--max-steps", str(max(3, len(config.stages)))]
    assert train.main(argv) == 0
    lines = log_of(tmp_path / "run")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) >= 3 and all(0 < loss < 1e3 for loss in losses)
    assert any(f"val/{config.eval_metric}" in line for line in lines)
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "last" / "text").is_dir() == bool(config.text_model)


@pytest.mark.parametrize("name", NAMES)
def test_its_model_is_timms_and_its_header_complete(name):
    config, recipe = read_config(["-c", name]), recipes.read_header(RECIPES / f"{name}.yaml")
    assert resolve_name(config.model, "linear")
    assert recipe.what
    if not recipe.name.startswith("demo") and "model" in read_yaml(name):
        assert (
            recipe.source
            and recipe.score
            and recipe.hours
            and recipe.memory.endswith(f"GiB at batch {config.batch_size} (computed)")
        )
        begins = config.pretrained or config.features or config.text_model in TEXTS
        assert begins, "a published system starts from published weights"
        assert config.text_model in (*TEXTS, "bigru", "")
    assert set(read_yaml(name)) <= set(vars(config))


def test_the_list_fits_a_terminal_and_names_all(capsys):
    recipes.main([])
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in NAMES) and max(map(len, shown.splitlines())) <= 120
    assert "90.79 sample-F1" in shown and "5 on one A4000 (published)" in shown
    recipes.main(["--json"])
    facts = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    assert sorted(facts) == NAMES and facts["comp5329-swin-l"]["score"].startswith("90.07 sample-F1")


def test_one_recipe_is_shown_as_it_is(capsys):
    recipes.main(["comp5329-swinv2-l"])
    assert capsys.readouterr().out == (RECIPES / "comp5329-swinv2-l.yaml").read_text()
    with pytest.raises(UserError, match="did you mean comp5329-swinv2-l"):
        recipes.main(["comp5329-swin2-l"])


def test_a_header_ends_where_the_settings_begin(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# A model: mine\n# score: 1 %\n# a note\nlr: 1\n# source: not of the header\n")
    assert recipes.read_header(file) == recipes.Recipe("mine", "A model: mine", score="1 %")
    assert timm.is_model(read_config(["-c", "demo"]).model)
