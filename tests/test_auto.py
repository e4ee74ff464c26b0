"""The rules behind `auto`: rates and averages that suit the network, the batch and the length of the run."""

from dataclasses import replace

import pytest
from conftest import TINY, log_of

from mlc import auto, train
from mlc.config import Config
from mlc.stages import lay_out
from shards.console import UserError


def rate(model: str, batch: int, **more) -> float:
    return auto.rates(Config(model=model, **({"pretrained": True} | more)), batch)[0]["lr"]


def test_the_rate_grows_with_the_root_of_the_batch_up_to_a_limit():
    assert [rate("tf_efficientnet_lite0", batch) for batch in (4, 16, 64, 4096)] == [1e-3, 2e-3, 4e-3, 5e-3]
    assert rate("resnet50.a1_in1k", 16, opt="sgd") == 2e-2 and rate("resnet50", 16, opt="lion") == 4e-4
    assert rate("swinv2_tiny_window8_256", 64) == 5e-4 and rate("vit_base_patch16_224", 16) == 2.5e-4
    assert rate("convnext_tiny", 16, pretrained=False) == 2e-3
    with pytest.raises(UserError, match="--lr auto knows no rate for --opt adan, only for adamw"):
        rate("resnet50", 16, opt="adan")


@pytest.mark.parametrize(
    "model, norm",
    [("swinv2_cr_tiny_224", "layer norm"), ("deit3_small_patch16_224", "layer norm"), ("regnety_002", "batch norm")],
)
def test_families(model, norm):
    assert auto.norm_of(model) == norm


def test_the_average_looks_back_on_a_tenth_of_the_run():
    assert [auto.ema_decay(steps) for steps in (1, 20, 1000, 10**6)] == [0.5, 0.5, 0.99, 0.9998]


def test_each_stage_has_numbers_of_its_own():
    config = Config(model="resnet18", lr="auto", stages=[{"for": "1ep", "opt": "sgd"}, {"lr": 0.5}], epochs=2)
    parts = lay_out(config, epoch_samples=160, global_batch=16)
    found, said = zip(*(auto.with_numbers(part, 16) for part in parts), strict=True)
    assert [part.config.lr for part in found] == [2e-2, 0.5] and config.lr == "auto"
    average = "decay of the average auto: 0.5"
    rate = "learning rate auto: 0.02 (sgd, batch norm, new weights, 16 samples a step)"
    assert said == ([rate, average], [average])


def test_early_layers_learn_slower_and_a_new_classifier_faster():
    config = Config(model="resnet18", pretrained=True, epochs=2)
    assert auto.rates(config, 16)[0] == {"lr": 2e-3, "layer_decay": 0.8, "head_lr_mult": 3}
    assert auto.rates(replace(config, init_head="runs/head"), 16)[0]["head_lr_mult"] == 1
    assert auto.rates(replace(config, pretrained=False), 16)[0] == {"lr": 2e-3}

    def numbers(**given):
        (stage,) = lay_out(replace(config, **given), epoch_samples=160, global_batch=16)
        found = auto.with_numbers(stage, 16)[0].config
        return found.lr, found.layer_decay, found.head_lr_mult

    assert numbers() == (2e-3, 0.8, 3)
    assert numbers(layer_decay=0.5, head_lr_mult=7.0) == (2e-3, 0.5, 7)
    assert numbers(lr=1e-3) == (1e-3, 1, 1)  # one rate for all, unless others are asked for
    assert numbers(lr=1e-3, layer_decay=0.9) == (1e-3, 0.9, 1)


def test_without_a_backbone():
    head = Config(features=["f.arrow"], experiment="head")
    assert auto.rates(head, 64)[0] == {"lr": 1.4e-3}
    bert = Config(text_model="bert-base-uncased")
    assert auto.rates(bert, 16)[0] == {"lr": 5e-5} and auto.rates(replace(bert, text_model="bigru"), 16)[0] == {
        "lr": 1e-3
    }
    both, text = auto.rates(replace(bert, model="resnet18", pretrained=True, fusion="concat"), 16)
    assert both == {"lr": 2e-3, "text_lr_mult": 0.025} and "of the captions 5e-05" in text


def test_trained_weights_ask_for_a_number():
    with pytest.raises(UserError, match="--resume-weights-only trains on what a run has learned; give the --lr"):
        Config(resume="runs/a", resume_weights_only=True)


def test_a_run_says_what_it_took(shards, tmp_path, capsys):
    flags = ["--data", str(shards), "--output", str(tmp_path), "--experiment", "run", "-b", "8", "-j", "0"]
    flags += ["--lr", "auto", "--model-ema-decay", "auto", "--max-steps", "2", "--warmup", "50%", "--log-interval", "1"]
    assert train.main([*TINY, *flags]) == 0
    said = capsys.readouterr().err
    assert "learning rate auto: 0.0014 (adamw, layer norm, new weights, 8 samples a step)" in said
    assert "decay of the average auto: 0.5" in said
    assert [line["train/lr"] for line in log_of(tmp_path / "run") if "train/lr" in line] == [0, 0.0014]
    assert "lr: auto" in (tmp_path / "run" / "args.yaml").read_text()
