"""The report's printed commands with captions: the settings they are, and from CSVs to submissions by a tiny BERT."""

import json
import shlex
from dataclasses import replace

import pytest
import timm
import torch
from caption_runs import hub_folder, same, weights
from conftest import log_of
from test_published import SWINV2, model_of, submission

from mlc import published
from mlc.flags import read_config
from shards import demo
from shards.console import run as run_verb

# As it is printed, all of it.
PRINTED = """--exp_name training --epochs 20 --data_dir data --batch_size 32 --img_size 224 --lr 1e-5 --step_size 8
--gamma 0.5 --seed 3407 --model swin_large_patch4_window7_224_linear --weighted_loss False --mixup True
--mixup_alpha 0.4 --autoaug False --focal_loss False --freeze_epochs 0 --after_freeze_lr 1e-5 --test swin_large.pth
--load swin_large.pth --load_combine combine.pth --tta True --label_smoothing 0 --kd_alpha 0 --kd_temp 2
--kd_teacher swin_teacher_large.pth --bilinear_text True --concat_text False --threshold 0.5"""


def without(command: str, *names: str) -> str:
    """The command line less these flags, each with its value."""
    words = shlex.split(command)
    pairs = zip(words[::2], words[1::2], strict=True)
    return shlex.join(word for flag, value in pairs if flag not in names for word in (flag, value))


TRAINING = without(PRINTED, "--test", "--load", "--load_combine")


@pytest.mark.parametrize(
    "command, recipe, more",
    [
        (TRAINING, "comp5329-swin-l-bert", {"threshold": 0.5}),  # the recipe has the better one of the table
        (
            TRAINING.replace("bilinear_text True --concat_text False", "bilinear_text False --concat_text True"),
            "comp5329-swin-l-bert",
            {"threshold": 0.5, "fusion": "concat"},
        ),
        (f"{SWINV2} --concat_text True", "comp5329-swinv2-l-bert", {}),
        (f"{SWINV2} --bilinear_text True", "comp5329-swinv2-l-bert", {"fusion": "bilinear"}),
    ],
)
def test_a_printed_training_is_its_recipe(command, recipe, more):
    verb, *ours = published.translate(shlex.split(command))
    ours, theirs = read_config(ours), read_config(["-c", recipe])
    assert verb == "train" and model_of(ours) == model_of(theirs)
    own = {"model": theirs.model, "data": [], "experiment": "", "resume": ""}
    assert replace(ours, **own) == replace(theirs, **more)


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the competition gives out, weights from ImageNet's place, and BERT's folder."""
    root = tmp_path_factory.mktemp("captions")
    demo.main([str(root / "data"), "--samples", "48", "--size", "48", "--shape", "comp5329", "--workers", "1"])
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=1000).state_dict(), root / "resnet10t.pth")
    hub_folder("bert-uncased", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert python_main(f"--exp_name swin_large {SMALL} --bilinear_text True --load resnet10t.pth") == 0
    return root


SMALL = "--model resnet10t_linear --img_size 32 --batch_size 8 --epochs 1 --workers 0 --lr 1e-3"
BERT = ["--text-model", "bert"]


def python_main(flags: str, *more: str) -> int:
    own = [] if "--test" in flags else BERT
    return run_verb(published.run, [*shlex.split(flags), *own, *more])


def test_joined_by_a_bilinear_layer_and_by_concatenation(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert python_main(f"--exp_name both {SMALL} --concat_text True --load resnet10t.pth --mixup False") == 0
    for name, fusion in (("swin_large", "bilinear"), ("both", "concat")):
        described = json.loads((folder / "runs" / name / "best" / "config.json").read_text())
        assert described["mlc"]["fusion"] == fusion
        assert described["mlc"]["clean"] == ["symbols", "mentions", "punctuation"]
        assert log_of(folder / "runs" / name)[-1]["samples_seen"] == 40


def test_a_joined_model_is_started_from(folder, monkeypatch):
    """`--load_combine`: with a learning rate of next to nothing, what was loaded is what is left."""
    monkeypatch.chdir(folder)
    flags = f"--exp_name on {SMALL} --bilinear_text True --load_combine swin_large_best.pth".replace("1e-3", "1e-12")
    assert python_main(flags, "--weight-decay", "0") == 0
    one, other = (weights(folder / "runs" / name / "best") for name in ("swin_large", "on"))
    learnt = [name for name in one if "running" not in name and "num_batches" not in name]
    moved = {name: (one[name] - other[name]).abs().max().item() for name in learnt}
    assert len(learnt) > 50 and max(moved.values()) < 1e-5


def test_the_whole_printed_line_predicts(folder, monkeypatch, capsys):
    """It has every flag that there is, and --test among them."""
    monkeypatch.chdir(folder)
    assert python_main(PRINTED, "--workers", "0") == 0
    assert "8 samples x 2 views, threshold 0.5000" in capsys.readouterr().err
    rows = submission(folder / "submissions" / "swin_large" / "test-submission.csv")
    assert len(rows) == 8 and {*rows[0]} == {"ImageID", "Labels"}


def test_bert_alone(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run_verb(published.bert_test, ["--output", "elsewhere"]) == 2
    assert "run `python bert_train.py` first" in capsys.readouterr().err
    short = ["--epochs", "1", "--batch-size", "8", "--workers", "0"]
    assert run_verb(published.bert_train, [*short, *BERT]) == 0
    config = read_config(["-c", "runs/bert/args.yaml"])
    assert (config.lr, config.fusion, config.seed) == (2e-5, "none", 3407)
    before = weights(folder / "runs" / "bert" / "best")
    assert run_verb(published.bert_train, [*short, *BERT]) == 0  # again, as the report's commands: it is finished
    assert same(before, weights(folder / "runs" / "bert" / "best"))
    assert run_verb(published.bert_test, ["--workers", "0"]) == 0
    assert "threshold 0.4" in capsys.readouterr().err
    assert len(submission(folder / "submissions" / "bert_best" / "test-submission.csv")) == 8
    with pytest.raises(SystemExit):
        run_verb(published.bert_train, ["--epoch", "3"])
    assert "did you mean --epochs" in capsys.readouterr().err
