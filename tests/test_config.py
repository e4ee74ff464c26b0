import dataclasses

import pytest
import yaml

from mlc.config import Config
from mlc.flags import RECIPES, documented_fields, read_config, write_yaml
from shards.console import UserError


def test_every_field_has_a_text_and_a_flag(capsys):
    documented = {name: text for fields in documented_fields(Config).values() for name, text in fields.items()}
    assert list(documented) == [f.name for f in dataclasses.fields(Config)]
    with pytest.raises(SystemExit):
        read_config(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in documented)


def test_later_files_win_over_earlier_and_flags_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 0.1\nimg-size: 64\nmixup: 1\n")
    (tmp_path / "b.yaml").write_text("lr: 0.2\n")
    config = read_config(["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml"), "--mixup", "0.4"])
    assert (config.lr, config.img_size, config.mixup) == (0.2, 64, 0.4)


def test_dashes_and_underscores_short_names_and_forms():
    config = read_config(
        [
            "--batch_size=8",
            "-j",
            "0",
            "--pretrained",
            "--no-model-ema",
            "--scale",
            "0.4",
            "1",
            "--global_batch_size",
            "16",
            "--model-kwargs",
            "embed_dim=48",
            "depths=[2,2]",
            "--grad-checkpointing",
            "every:2",
        ]
    )
    assert (config.batch_size, config.workers, config.pretrained, config.model_ema, config.global_batch_size) == (
        8,
        0,
        True,
        False,
        16,
    )
    assert (
        config.scale == (0.4, 1.0)
        and config.model_kwargs == {"embed_dim": 48, "depths": [2, 2]}
        and config.grad_checkpointing == "every:2"
    )


@pytest.mark.parametrize(
    "value, expected", [("True", "effective"), ("false", "none"), ("inverse", "inverse"), ("none", "none")]
)
def test_weighted_loss_once_was_a_switch(tmp_path, value, expected):
    (tmp_path / "a.yaml").write_text(f"weighted_loss: {value}\n")
    assert read_config(["-c", str(tmp_path / "a.yaml")]).weighted_loss == expected
    assert read_config(["--weighted_loss", value]).weighted_loss == expected


def test_a_written_configuration_reads_back_equal(tmp_path):
    config = read_config(["-c", "demo", "--data", "somewhere", "--max-steps", "7"])
    write_yaml(config, tmp_path / "args.yaml")
    assert read_config(["-c", str(tmp_path / "args.yaml")]) == config


@pytest.mark.parametrize(
    "line, words",
    [
        ("epoch: 3", ("unknown setting 'epoch'", "did you mean epochs")),
        ("epochs: many", ("epochs", "expected a number", "'many'")),
        ("batch_size: 3.5", ("batch_size", "whole number")),
        ("batch_size: many", ("batch_size", "a whole number, not 'many', and not auto")),
        ("loss: bec", ("expected one of bce, focal, asl", "did you mean bce")),
        ("scale: 0.4", ("scale", "2 numbers")),
        ("pretrained: maybe", ("pretrained", "true or false")),
        ("- a list", ("expected `name: value` lines",)),
        ("a: [", ("not YAML",)),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_field(tmp_path, line, words):
    file = tmp_path / "mine.yaml"
    file.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read_config(["-c", str(file)])
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epoch", "3"], ("unknown argument --epoch", "--epochs")),
        (["--lr", "fast"], ("--lr", "expected a number")),
        (["--lr", "0"], ("--lr must be above 0",)),
        (["--hflip", "1.5"], ("--hflip must be in [0, 1]",)),
        (["--cutout", "1.5"], ("--cutout must be in [0, 1], not 1.5",)),
        (["--layer-decay", "1.5"], ("--layer-decay must be in (0, 1], not 1.5",)),
        (["--patience", "0"], ("--patience must be at least 1, not 0",)),
        (["--momentum", "1"], ("--momentum must be in [0, 1), not 1.0",)),
        (["--lr-mult", "head"], ("expected name=value, not 'head'",)),
        (["--lr-mult", "head=fast"], ("--lr-mult", "head: expected a number, not 'fast'")),
        (["--asl-clip", "1"], ("--asl-clip must be in [0, 1), not 1",)),
        (["--weighted-beta", "1"], ("--weighted-beta must be in (0, 1)",)),
        (["--group-weight", "tag=-1"], ("--group-weight tag=-1.0 must not be negative",)),
        (["--pos-weight", "balanced", "--loss", "zlpr"], ("--pos-weight", "bce, focal, asl", "--pos-weight none")),
        (["--weighted-loss", "inverce"], ("--weighted-loss", "did you mean inverse")),
        (["--scale", "1", "0.4"], ("--scale takes a smaller and a larger",)),
        (["-b", "0"], ("--batch-size must be at least 1",)),
        (["--pretrained", "--pretrained-path", "x.pth"], ("exclude each other",)),
        (["--kd-alpha", "0.9"], ("--kd-teacher",)),
        (["-c", "dmo"], ("neither a file nor a recipe", "did you mean demo")),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argv, words, capsys):
    try:
        read_config(argv)
        raise AssertionError("accepted")
    except UserError as error:
        message = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        message = capsys.readouterr().err
    assert message.strip().count("\n") == 0 and all(word in message for word in words), message


def test_recipes_are_valid_and_described():

    for recipe in RECIPES.glob("*.yaml"):
        read_config(["-c", recipe.stem])
        assert recipe.read_text().startswith("# ") and isinstance(yaml.safe_load(recipe.read_text()), dict)
