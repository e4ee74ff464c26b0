"""The report's printed commands: what each flag becomes, and the two steps from a folder of CSVs to a submission."""

import csv
import json
import shlex
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from conftest import log_of
from conftest import run as in_processes

from mlc import published
from mlc.flags import read_config
from mlc.models.build import resolve_name
from shards import demo
from shards.console import UserError
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index

LIST = """--exp_name training --epochs 20 --data_dir data --batch_size 32 --img_size 224 --lr 1e-5 --step_size 8
--gamma 0.5 --seed 3407 --model swin_large_patch4_window7_224_linear --weighted_loss False --mixup True
--mixup_alpha 0.4 --autoaug False --focal_loss False --freeze_epochs 0 --after_freeze_lr 1e-5 --tta True
--label_smoothing 0 --kd_alpha 0 --kd_temp 2 --kd_teacher swin_teacher_large.pth --concat_text False --threshold 0.5"""
SWIN = """--exp_name swin_large_224 --model swin_large_patch4_window7_224_linear --step_size 8 --gamma 0.5 --epochs 20
--lr 0.00001 --mixup True --img_size 224"""
SWINV2 = """--exp_name swinv2_large_256 --model swinv2_large_window12to16_192to256_22kft1k --step_size 8 --gamma 0.5
--epochs 20 --lr 0.00001 --mixup True --img_size 256 --batch_size 8"""


def config_of(command: str):
    argv = shlex.split(command)
    assert published.is_published(argv)
    verb, *ours = published.translate(argv)
    assert verb == "train"
    return read_config(ours)


def model_of(config) -> tuple[str, str, str]:
    """(architecture, published weights, head)"""
    name, head = resolve_name(config.model, config.head)
    weights = timm.get_pretrained_cfg(name)
    return weights.architecture, weights.tag, head


@pytest.mark.parametrize(
    "command, recipe", [(LIST, "comp5329-swin-l"), (SWIN, "comp5329-swin-l"), (SWINV2, "comp5329-swinv2-l")]
)
def test_a_printed_training_is_its_recipe(command, recipe):
    ours, theirs = config_of(command), read_config(["-c", recipe])
    assert model_of(ours) == model_of(theirs)
    own = {"model": theirs.model, "data": [], "experiment": "", "resume": ""}
    assert replace(ours, **own) == theirs


def test_older_names_with_the_reports_suffix():
    name = "swinv2_large_window12to16_192to256"
    assert resolve_name(f"{name}_22kft1k_linear") == (f"{name}.ms_in22k_ft_in1k", "extra_linear")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--exp_name a", {"experiment": "a", "epochs": 20, "seed": 3407, "mixup": 0.4, "resume": "auto"}),
        ("--exp_name=a --epochs=3", {"experiment": "a", "epochs": 3}),
        ("--mixup False", {"mixup": 0}),
        ("--mixup True --mixup_alpha 0.2", {"mixup": 0.2}),
        ("--step_size 5 --gamma 0.1", {"sched": "step", "decay_every": "5ep", "decay_rate": 0.1}),
        ("--autoaug True", {"aa": "original"}),
        ("--autoaug False", {"aa": "rand-m9-mstd0.5-inc1"}),
        ("--focal_loss True", {"loss": "focal"}),
        ("--weighted_loss True", {"weighted_loss": "effective"}),
        ("--weighted_loss False", {"weighted_loss": "none"}),
        ("--label_smoothing 0.1", {"smoothing": 0.1}),
        (
            "--freeze_epochs 2 --after_freeze_lr 1e-5",
            {"stages": [{"for": "2ep", "freeze": "backbone"}, {"lr": 1e-5}]},
        ),
        ("--freeze_epochs 0 --after_freeze_lr 1e-3", {"stages": [], "lr": 1e-5}),
        ("--kd_alpha 0 --gamma 0.5 --kd_teacher nowhere.pth", {"kd_teacher": []}),
        ("--gamma 0.5 --workers 2 --no-compile", {"workers": 2}),
        ("--data_dir somewhere", {"data": ["somewhere/shards"]}),
    ],
)
def test_each_flag_becomes_ours(flags, expected):
    config = config_of(flags)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--help",
        "-c demo --data d --epochs 3 --batch_size 8 --lr 1e-3 --mixup 0.4",
        "--model-kwargs test=1 --weighted-loss effective --kd-alpha 0.5 --threshold 0.4",
        "--text-model bigru --fusion concat --load runs/image --load-combine runs/both",
    ],
)
def test_our_own_command_lines_stay_ours(argv):
    assert not published.is_published(shlex.split(argv))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--bilinear_text True --concat_text True", "keep one"),
        ("--load_combine combine.pth --exp_name a", "needs --bilinear_text True"),
        ("--load_combine combine.pth --concat_text True", "--load_combine combine.pth: no such file"),
        ("--load nowhere.pth", "--load nowhere.pth: no such file"),
        ("--test nowhere_best.pth", "no weights of a run runs/nowhere"),
        ("--kd_alpha 0.5", "needs --kd_teacher"),
        ("--exp_name a --mixup maybe", "expected True or False, not 'maybe'"),
        ("--exp_name a --gamma fast", "expected a number, not 'fast'"),
        ("--exp_name a --epoch 3", "--epochs"),
        ("--exp_name a --data_dir nowhere", "no train.csv"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = run_verb(published.run, shlex.split(flags))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.strip().count("\n") == 0, said


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the competition gives out, where the report unpacked it: data/train.csv, data/test.csv, data/data/*.jpg; and
    weights from ImageNet's place: resnet10t.pth.
    """
    root = tmp_path_factory.mktemp("published")
    demo.main([str(root / "data"), "--samples", "48", "--size", "48", "--shape", "comp5329", "--workers", "1"])
    (root / "data" / "images").rename(root / "data" / "data")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=1000).state_dict(), root / "resnet10t.pth")
    return root


SMALL = "--model resnet10t_linear --img_size 32 --batch_size 8 --epochs 1 --workers 0 --data_dir data"


def submission(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(folder):
    """The folder after step one of the printed procedure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_verb(published.run, shlex.split(f"--exp_name small {SMALL} --load resnet10t.pth --lr 1e-3")) == 0
    return folder


def test_a_folder_of_csvs_is_packed_and_trained_on(trained):
    dataset = load_dataset(trained / "data" / "shards")
    sizes = {name: split.num_samples for name, split in dataset.splits.items()}
    assert sizes == {"train": 36, "val": 4, "test": 8} and not (trained / "data" / "shards.partial").exists()
    assert log_of(trained / "runs" / "small")[-1]["samples_seen"] == 40
    assert (trained / "runs" / "small" / "best" / "model.safetensors").is_file()


def test_the_weights_of_a_run_are_found_by_the_reports_name(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    flags = "--test small_best.pth --model resnet10t_linear --tta True --workers 0"
    assert run_verb(published.main, shlex.split(flags)) == 0
    assert "8 samples x 2 views, threshold 0.5000" in capsys.readouterr().err
    rows = submission(trained / "submissions" / "small_best" / "test-submission.csv")
    index = open_index(load_dataset("data/shards"), "test")
    assert [row["ImageID"] for row in rows] == [index.image_id(i) for i in range(8)]


def test_teachers_and_weights_to_start_from_are_runs_too(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    config = config_of("--kd_alpha 0.3 --kd_temp 4 --kd_teacher small_best.pth --load checkpoint/small_best.pth")
    assert (config.kd_teacher, config.kd_alpha, config.kd_temp) == (["runs/small"], 0.3, 4)
    assert (config.pretrained, config.pretrained_path) == (False, "runs/small/best/model.safetensors")
    assert run_verb(published.run, shlex.split("--kd_alpha 0.3 --kd_teacher resnet10t.pth")) == 2
    assert "does not say of which model" in capsys.readouterr().err


def test_every_training_flag_at_once(trained, monkeypatch):
    monkeypatch.chdir(trained)
    flags = """--weighted_loss True --mixup True --mixup_alpha 0.4 --autoaug True --focal_loss True --freeze_epochs 1
    --after_freeze_lr 1e-4 --lr 1e-2 --label_smoothing 0.1 --kd_alpha 0.3 --kd_temp 2 --kd_teacher small_best.pth
    --load small_best.pth --threshold 0.4 --step_size 1 --gamma 0.5"""
    small = SMALL.replace("--epochs 1", "--epochs 2") + " --log-interval 1"
    assert run_verb(published.run, shlex.split(f"--exp_name all {small} {flags}")) == 0
    rates = [line["train/lr"] for line in log_of(trained / "runs" / "all") if "train/lr" in line]
    assert rates[0] == 1e-2 and rates[-1] <= 1e-4 and len(rates) == 9


def test_a_file_of_weights_predicts_like_the_run_it_came_from(trained, monkeypatch):
    monkeypatch.chdir(trained)
    model = timm.create_model(f"local-dir:{trained / 'runs' / 'small' / 'best'}", pretrained=True)
    torch.save({"state_dict": model.state_dict()}, "mine.pth")
    for name in ("small_best.pth", "mine.pth"):
        flags = f"--test {name} --model resnet10t_linear --img_size 32 --tta False --workers 0 --threshold 0.3"
        assert run_verb(published.run, shlex.split(flags)) == 0
    ours, theirs = (trained / "submissions" / name / "test.csv" for name in ("small_best", "mine"))
    assert ours.read_text() == theirs.read_text()


def test_a_file_without_the_classes_is_refused(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert run_verb(published.run, shlex.split("--test resnet10t.pth --model resnet10t_linear --img_size 32")) == 2
    assert "no classifier of the 18 classes" in capsys.readouterr().err


def test_later_uses_go_on_with_the_pack_and_the_run(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = (trained / "data" / "shards" / "dataset.json").stat().st_mtime_ns
    assert run_verb(published.main, shlex.split(f"--exp_name small {SMALL} --load resnet10t.pth --lr 1e-3")) == 0
    said = capsys.readouterr()
    assert "mlc pack" not in said.err and "is finished" in said.out + said.err
    assert (trained / "data" / "shards" / "dataset.json").stat().st_mtime_ns == before


def test_a_pack_that_was_killed_is_not_taken_for_a_whole_one(folder, tmp_path, monkeypatch):
    """Killed after its shards, before the rename that gives them their name."""
    shutil.copytree(folder / "data" / "data", tmp_path / "data" / "data")
    for name in ("train.csv", "test.csv"):
        shutil.copy(folder / "data" / name, tmp_path / "data" / name)

    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    monkeypatch.chdir(tmp_path)
    flags = shlex.split(f"--exp_name small {SMALL} --load {folder / 'resnet10t.pth'}")
    with monkeypatch.context() as patch:
        patch.setattr("shards.pack._publish", killed)
        with pytest.raises(KilledError):
            published.run(flags)
    assert (tmp_path / "data" / "shards.partial").is_dir() and not (tmp_path / "data" / "shards").exists()
    assert run_verb(published.run, flags) == 0
    assert json.loads((tmp_path / "data" / "shards" / "dataset.json").read_text())["splits"]["val"]["num_samples"] == 4


def test_another_process_waits_for_the_pack(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(published, "WAIT", 0.3)
    with pytest.raises(UserError, match="waited"):
        published._pack_once(folder / "nothing")
    shutil.copytree(folder / "data", tmp_path / "data", ignore=shutil.ignore_patterns("shards*"))
    naps = []

    def nap(_):
        naps.append(not (tmp_path / "data" / "shards").exists())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", "0")
            published._pack_once(tmp_path / "data")

    monkeypatch.setattr(published.time, "sleep", nap)
    monkeypatch.setattr(published, "WAIT", 60)
    published._pack_once(tmp_path / "data")
    assert naps == [True] and load_dataset(tmp_path / "data" / "shards")


@pytest.mark.distributed
def test_two_processes_pack_once_and_train_together(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data", ignore=shutil.ignore_patterns("shards*"))
    flags = SMALL.replace("--data_dir data", f"--data_dir {tmp_path / 'data'}").replace(
        "--batch_size 8", "--batch_size 4"
    )
    where = ["--load", str(folder / "resnet10t.pth"), "--output", str(tmp_path / "runs")]
    done = in_processes("-m", "mlc", "train", "--exp_name", "two", *shlex.split(flags), *where, processes=2)
    assert done.stderr.count("first use of") == 1
    assert log_of(tmp_path / "runs" / "two")[-1]["samples_seen"] == 40
