"""How a run goes on, or another begins from it: what the checkpoint knows, what is said, what is refused."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import PLAIN, TINY, log_of

from mlc import predict, train
from mlc.kept_weights import step_of
from mlc.parallel import launch, storage
from shards.console import run as run_verb

ALWAYS = ["-b", "8", "-j", "0", "--log-interval", "3", "--eval-every", "2st", "--checkpoint-every", "2st"]


def argv(shards, folder, *more: str) -> list[str]:
    return [*TINY, *PLAIN, *ALWAYS, "--data", str(shards), "--output", str(folder), "--experiment", "run", *more]


@pytest.fixture(scope="module")
def six_steps(shards, tmp_path_factory):
    """A run of six steps with all of its checkpoints; copy it before going on with it."""
    folder = tmp_path_factory.mktemp("six")
    assert train.main(argv(shards, folder, "--max-steps", "6", "--checkpoint-hist", "9")) == 0
    return folder


@pytest.fixture
def again(six_steps, tmp_path):
    shutil.copytree(six_steps / "run", tmp_path / "run")
    return tmp_path


def meta(folder, step: int) -> dict:
    return storage.read_meta(folder / "run" / "checkpoints" / f"step-{step:08d}")


def cut_to(folder, step: int) -> None:
    for place in storage.complete(folder / "run" / "checkpoints"):
        if storage.step_of(place) > step:
            shutil.rmtree(place)


def said(shards, folder, capsys, *more: str, code: int = 0) -> str:
    assert run_verb(train.main, argv(shards, folder, *more)) == code
    return capsys.readouterr().err


# ---- the same run ----------------------------------------------------------------------------------------------------


def test_the_mean_loss_of_an_interval_covers_what_was_before_the_stop(shards, six_steps, again, capsys):
    """Lines at steps 1, 3 and 6; stopped at 4, so the last one begins before the stop."""
    assert meta(six_steps, 4)["progress"]["interval"][1] == 1
    cut_to(again, 4)
    said(shards, again, capsys, "--max-steps", "6", "--resume", "auto")
    one, other = (
        {line["step"]: line["train/loss"] for line in log_of(folder / "run") if "train/loss" in line}
        for folder in (six_steps, again)
    )
    assert one == other and list(one) == [1, 3, 6]


class Killed(BaseException):
    """As a signal that nobody can catch, for this process."""


def test_best_is_that_of_the_checkpoint_after_a_kill_between_the_two(shards, tmp_path, capsys, monkeypatch):
    """Killed when the weights of step 4 were published and the checkpoint of step 4 was not."""
    values = iter([0.5, 0.9, 0.2, 0.6])
    evaluate, save = train.evaluate, train.checkpoint.Saver.save

    def evaluate_as_told(weights, *args, **kwargs):
        found, value = evaluate(weights, *args, **kwargs), next(values)
        for result in found.values():
            result.metrics["f1_samples"] = value
        return found

    def save_or_die(self, step, *args, **kwargs):
        if step == 4:
            raise Killed
        save(self, step, *args, **kwargs)

    monkeypatch.setattr(train, "evaluate", evaluate_as_told)
    flags = ["--max-steps", "6", "--resume", "auto", "--no-model-ema", "--no-checkpoint-async"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.checkpoint.Saver, "save", save_or_die)
        train.main(argv(shards, tmp_path, *flags))
    run = tmp_path / "run"
    assert step_of(run / "best") == 4 and step_of(run / ".best-of-checkpoint") == 2
    aside = (run / ".best-of-checkpoint" / "model.safetensors").read_bytes()
    cut_at = iter([4])
    with monkeypatch.context() as patch:  # another way from there, whose first evaluation is worse
        patch.setattr(train.StopFlag, "check", lambda self: next(cut_at, None) is not None)
        text = said(shards, tmp_path, capsys, *flags, "--lr", "1e-30")
    assert "best is that of step 2 again; what came after it was given up" in text
    assert step_of(run / "best") == 2 and (run / "best" / "model.safetensors").read_bytes() == aside
    assert "best f1_samples 0.6000 at step 6" in said(shards, tmp_path, capsys, *flags, "--lr", "1e-30")
    assert step_of(run / "best") == 6 and not (run / ".best-of-checkpoint").exists()


def test_a_best_that_the_checkpoint_does_not_know_is_looked_for_again(shards, again, capsys):
    cut_to(again, 4)
    config = again / "run" / "best" / "config.json"
    info = json.loads(config.read_text())
    info["mlc"]["step"] = 99
    config.write_text(json.dumps(info))
    text = said(shards, again, capsys, "--max-steps", "6", "--lr", "1e-30", "--resume", "auto")
    assert "has not the weights of step" in text and step_of(again / "run" / "best") == 6


# ---- with other settings ---------------------------------------------------------------------------------------------


def test_a_rate_that_jumps_is_said(shards, again, capsys):
    text = said(shards, again, capsys, "--max-steps", "8", "--resume", "auto")
    assert "the learning rate goes on at 1.46e-05; with the settings of the checkpoint it would be 0" in text


def test_another_optimizer_is_named(shards, again, capsys):
    text = said(shards, again, capsys, "--max-steps", "8", "--opt", "sgd", "--resume", "auto", code=2)
    assert "has no momentum_buffer of " in text.splitlines()[-1]
    assert "made with --opt adamw, or with another --momentum or --freeze; use the same" in text


def test_another_autocast_is_said(shards, again, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)  # of the training before, in this process
    text = said(shards, again, capsys, "--max-steps", "7", "--amp-dtype", "bf16", "--resume", "auto")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "autocast no -> bf16" in text


def test_another_training_split_of_the_same_size_is_refused(shards, tmp_path, capsys):
    copy = shutil.copytree(shards, tmp_path / "shards")
    about = json.loads((copy / "dataset.json").read_text())
    about["splits"]["twin"] = about["splits"]["train"] | {"index": "twin.arrow"}
    (copy / "dataset.json").write_text(json.dumps(about))
    shutil.copy(copy / about["splits"]["train"]["index"], copy / "twin.arrow")
    said(copy, tmp_path, capsys, "--max-steps", "1", "--val-split", "")
    text = said(copy, tmp_path, capsys, "--max-steps", "2", "--train-split", "twin", "--resume", "auto", code=2)
    assert "another training split: train then, twin now" in text and "--allow-data-change" in text


def test_scores_of_another_validation_split_do_not_compare(shards, again, capsys):
    text = said(shards, again, capsys, "--max-steps", "7", "--val-split", "train", "--lr", "1e-30", "--resume", "auto")
    assert "scores with another --val-split do not compare" in text and step_of(again / "run" / "best") == 7


def test_an_automatic_batch_is_no_change(shards, again, capsys):
    more = ["-b", "auto", "--global-batch-size", "8", "--max-steps", "7", "--resume", "auto"]
    assert "batch-size" not in said(shards, again, capsys, *more).partition("changed since")[2].partition("\n")[0]


@pytest.mark.parametrize("flags", [["--epochs", "inf"], ["--lr", "nan"], ["--lr-mult", "head=inf"]])
def test_numbers_are_finite(shards, tmp_path, capsys, flags):
    assert f"{flags[0]} must be finite, not" in said(shards, tmp_path, capsys, *flags, code=2)


def test_numbers_of_other_verbs_are_finite(capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main(["--run", "x", "--data", "y", "--threshold", "nan"])
    assert ended.value.code == 2 and "--threshold: nan is not a finite number" in capsys.readouterr().err


# ---- another run -----------------------------------------------------------------------------------------------------


def test_a_new_run_from_a_checkpoint_leaves_the_other_alone_and_has_a_best_of_its_own(
    shards, six_steps, tmp_path, capsys
):
    path = six_steps / "run" / "checkpoints" / "step-00000004"
    before = sorted(path.parent.iterdir()), (six_steps / "run" / "log.jsonl").read_text()
    more = ["--resume", str(path), "--lr", "1e-30", "--max-steps", "6"]
    text = said(shards, tmp_path, capsys, *more)
    assert "a new run from" in text and "resumed from" in text
    assert step_of(tmp_path / "run" / "best") == 6 and "at step 6" in text
    assert [line["step"] for line in log_of(tmp_path / "run") if "train/loss" in line] == [6]
    text = said(shards, tmp_path, capsys, *more)  # the same command
    assert "has checkpoints of its own and goes on from them" in text and "is finished at" in text
    assert [line["step"] for line in log_of(tmp_path / "run") if "train/loss" in line] == [6]
    refused = argv(shards, six_steps, "--resume", str(tmp_path / "run"), "--max-steps", "9")
    assert run_verb(train.main, refused) == 2
    assert before == (sorted(path.parent.iterdir()), (six_steps / "run" / "log.jsonl").read_text())


# ---- a loss scaler ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch):
    """A loss scaler on the CPU, where Accelerate has none: in 16 bits it would be the same one."""
    start, scalers = launch.start, []

    def with_scaler(*args, **kwargs):
        accelerator = start(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(launch, "start", with_scaler)
    return scalers


def test_the_scale_of_the_loss_goes_on(shards, tmp_path, capsys, scaled):
    said(shards, tmp_path, capsys, "--max-steps", "4", "--checkpoint-hist", "9")
    assert meta(tmp_path, 2)["progress"]["scaler"]["scale"] == 2.0**11
    cut_to(tmp_path, 2)
    said(shards, tmp_path, capsys, "--max-steps", "4", "--checkpoint-hist", "9", "--resume", "auto")
    assert [scaler.get_scale() for scaler in scaled] == [2.0**12] * 2


def test_under_a_scaler_a_loss_that_is_never_a_number_is_no_success(shards, tmp_path, capsys, scaled, monkeypatch):
    prepare = train.prepare

    def damaged(*args, **kwargs):
        image, *others = prepare(*args, **kwargs)
        return image * torch.nan, *others

    monkeypatch.setattr(train, "prepare", damaged)
    text = said(shards, tmp_path, capsys, "--max-steps", "4", code=2)
    assert "in 4 steps, whatever the loss scale; the weights were not changed by it" in text.splitlines()[-1]
