"""A run in parts: each with its own settings, resumed anywhere as if it had never stopped."""

import json
import math

import pytest
import torch
import yaml
from conftest import TINY, log_of
from safetensors.torch import load_file

from mlc import stages, train
from mlc.clock import Clock
from mlc.config import Config
from mlc.parallel import checkpoint, storage
from shards.console import UserError, run

THREE = """[{freeze: backbone, for: 2st, lr: 0.01, img_size: 16},
            {for: 3st, sched: constant, mixup: 0.4, drop_path: 0.1},
            {opt: sgd, lr: 0.02, loss: focal, warmup: 2st, freeze: patch_embed}]"""


def argv(shards, folder, *more: str) -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    return [*TINY, *short, "--max-steps", "8", "--log-interval", "1", "--eval-every", "4st", *more]


def laid_out(text: str, **settings) -> list[stages.Stage]:
    plain = {"lr": 1e-4, "warmup": "0ep", "model_ema_decay": 0.9998}
    config = Config(stages=yaml.safe_load(text), **plain | settings)
    return stages.lay_out(config, epoch_samples=100, global_batch=10)


def test_stages_share_the_run():
    parts = laid_out("[{for: 2ep, freeze: backbone}, {lr: 0.1}]", epochs=5, lr=1.0)
    assert [(p.begin, p.end, p.last) for p in parts] == [(0, 200, False), (200, 500, True)]
    assert [(p.config.freeze, p.config.lr) for p in parts] == [("backbone", 1.0), ("", 0.1)]
    assert [p.total for p in laid_out("[{for: 25ex}, {for: 1ep}]", epochs=99)] == [130, 130]  # whole steps; their sum
    assert [stages.at(parts, samples).number for samples in (0, 190, 200, 490, 500)] == [0, 0, 1, 1, 1]
    (whole,) = laid_out("[]", epochs=5)
    assert (whole.begin, whole.end, whole.last) == (0, 500, True)


def test_a_stage_begins_where_the_one_before_it_really_ended():
    """Steps of another size, or patience, end a stage where its duration does not say."""
    text = "[{for: 64ex}, {for: 64ex, sched: step, decay_every: 1st}, {for: 48ex}]"
    config = Config(stages=yaml.safe_load(text), lr=1e-4, warmup="0ep", model_ema_decay=0.9998)
    parts = stages.lay_out(config, epoch_samples=100, global_batch=24, ended=[[4, 88]])
    assert [(part.begin, part.end, part.first_step) for part in parts] == [(0, 88, 0), (88, 160, 4), (160, 208, 7)]
    assert {part.total for part in parts} == {208}
    assert [stages.at(parts, seen, [[4, 88]]).number for seen in (88, 159, 160, 999)] == [1, 1, 2, 2]
    clock = Clock(parts[1], 100, 24)
    assert clock.lr(88) == 1e-4 and clock.lr(112) == 0.5e-4
    assert [clock.steps_left(seen) for seen in (88, 185, 208, 230)] == [5, 1, 0, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[{lr: 1}, {lr: 2}]", "stage 1: needs `for: 2ep`"),
        ("[{for: 2ep, seed: 3}, {}]", "stage 1: seed cannot be a stage's"),
        ("[{for: 2ep, frezee: a}, {}]", "did you mean freeze"),
        ("[{for: 2ep, lr: fast}, {}]", "stage 1: lr: expected a number"),
        ("[{for: 2ep, lr: -1}, {}]", "stage 1: --lr must be above 0"),
        ("[{for: soon}, {}]", "stage 1: for: 'soon' is no duration"),
        ("[{for: 5ep}, {}]", "take 50 steps, the run has 50"),
        ("[{for: 2ep}, {model_ema: false}]", "stage 2: model_ema cannot be"),
    ],
)
def test_mistakes_name_the_stage(text, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        laid_out(text, epochs=5)


def test_a_stage_has_a_schedule_of_its_own():
    parts = laid_out("[{for: 2ep, sched: step, decay_every: 1ep}, {lr: 0.1, warmup: 10%}]", epochs=4, lr=1.0)
    first, second = (Clock(part, 100, 10) for part in parts)
    assert [first.lr(s) for s in (0, 90, 100, 190)] == [1.0, 1.0, 0.5, 0.5]
    assert second.lr(200) == 0 and second.lr(210) == pytest.approx(0.05) and second.lr(220) == 0.1
    assert second.lr(310) == pytest.approx(0.05)  # the middle of the wave


def stopping_at(monkeypatch, steps: int) -> None:
    """The run asks to stop in the step after so many of its own."""
    asked = iter(range(10**6))
    monkeypatch.setattr(train.StopFlag, "check", lambda self: next(asked) + 1 == steps)


def same_run(one, other) -> None:
    timing = ("train/img_per_sec", "data/wait_frac", "sys/mem_gb", "ckpt/blocked_s", "ckpt/write_s")
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in log_of(f / "run")] for f in (one, other))
    assert a == b
    a, b = (load_file(folder / "run" / "last" / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_anywhere_it_is_the_run_that_never_stopped(shards, tmp_path, monkeypatch):
    assert train.main(argv(shards, tmp_path / "whole", "--stages", THREE)) == 0
    for steps in (1, 2, 3, 5, 6):  # before, at and after each boundary
        folder = tmp_path / str(steps)
        with monkeypatch.context() as patch:
            stopping_at(patch, steps)
            train.main(argv(shards, folder, "--stages", THREE))
        assert steps <= log_of(folder / "run")[-1]["step"] < 8
        assert train.main(argv(shards, folder, "--stages", THREE, "--resume", "auto")) == 0
        same_run(tmp_path / "whole", folder)


def test_small_images_first(shards, tmp_path, monkeypatch):
    sizes, prepare = [], train.prepare

    def watched(batch, *args, **kwargs):
        sizes.append(batch["image"].shape[-1])
        return prepare(batch, *args, **kwargs)

    monkeypatch.setattr(train, "prepare", watched)
    assert train.main(argv(shards, tmp_path, "--stages", "[{for: 2st, img-size: 16}, {for: 2st}]")) == 0
    assert sizes == [16, 16, 32, 32]
    described = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    "model, weight",
    [("test_vit", "pos_embed"), ("swin_tiny_patch4_window7_224", "relative_position_bias_table")],
)
def test_weights_that_follow_the_size_of_images_are_refused_at_the_start(shards, tmp_path, model, weight, capsys):
    flags = ["--model", model, "--img-size", "64", "--stages", "[{for: 2st, img-size: 32}, {for: 2st}]"]
    if model.startswith("swin"):
        flags += ["--model-kwargs", "embed_dim=16", "depths=[2,2]", "num_heads=[1,2]", "window_size=7"]
    short = ["--data", str(shards), "--output", str(tmp_path), "--experiment", "run", "-b", "8", "-j", "0"]
    assert run(train.main, [*short, *flags]) == 2
    said = capsys.readouterr().err
    assert weight in said and "stages with images of 32 and 64 pixels" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_steps_of_another_size_do_not_end_the_run_in_a_stage(shards, tmp_path, monkeypatch, capsys):
    flags = ["--stages", "[{for: 64ex, freeze: backbone}, {for: 64ex}]"]
    with monkeypatch.context() as patch:
        stopping_at(patch, 1)
        train.main(argv(shards, tmp_path, *flags, "--global-batch-size", "16"))
    again = argv(shards, tmp_path, *flags, "--global-batch-size", "24", "--resume", "auto")
    assert train.main(again) == 0
    said = capsys.readouterr().err
    assert "stage 2 of 2" in said and "done; weights in" in said
    assert [line["samples_seen"] for line in log_of(tmp_path / "run") if "train/lr" in line][-1] == 2 * 16 + 2 * 24 + 72
    assert train.main(again) == 0 and "is finished at 152 of 152" in capsys.readouterr().err


@pytest.mark.parametrize(
    "finished, over, last, stopped, why",
    [
        (False, False, False, False, None),
        (True, True, True, True, train.Ended.FINISHED),  # a stop in the last step is none
        (False, True, True, True, train.Ended.PATIENCE),
        (False, True, False, True, train.Ended.STOPPED),  # the next stage begins at the resume
        (False, False, True, True, train.Ended.STOPPED),
        (False, True, False, False, train.Ended.STAGE),
    ],
)
def test_one_value_says_why_the_loop_ended(finished, over, last, stopped, why):
    assert train.why_ended(finished=finished, stopped=stopped, stage_over=over, last_stage=last) is why


def test_a_stop_at_the_step_that_ends_a_stages_patience(shards, tmp_path, monkeypatch):
    flags = ["--lr", "1e-30", "--eval-every", "1st", "--eval-metric", "loss", "--no-model-ema", "--patience", "1"]
    flags += ["--stages", "[{for: 5st, freeze: backbone}, {for: 3st}]"]
    assert train.main(argv(shards, tmp_path / "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        stopping_at(patch, 2)  # acted on at the end of that step, since it is evaluated
        train.main(argv(shards, tmp_path / "cut", *flags))
    assert log_of(tmp_path / "cut" / "run")[-1]["step"] == 2
    train.main(argv(shards, tmp_path / "cut", *flags, "--resume", "auto"))
    same_run(tmp_path / "whole", tmp_path / "cut")


def weights(shards, folder, *flags: str) -> tuple[dict, dict]:
    """(the first weights, those after the run)"""
    start = argv(shards, folder / "start", "--max-steps", "1", "--lr", "1e-30", "--no-model-ema", *flags)
    end = argv(shards, folder / "end", "--max-steps", "4", "--lr", "0.1", "--sched", "constant", "--no-model-ema")
    train.main(start), train.main([*end, *flags])
    return tuple(load_file(folder / name / "run" / "last" / "model.safetensors") for name in ("start", "end"))


@pytest.mark.parametrize("what, fixed", [("backbone", lambda n: not n.startswith("head.")), ("cpb_mlp", None)])
def test_frozen_weights_do_not_move(what, fixed, shards, tmp_path):
    before, after = weights(shards, tmp_path, "--freeze", what)
    fixed = fixed or (lambda name: what in name)
    for name in before:
        assert torch.equal(before[name], after[name]) == bool(fixed(name)), name


def test_a_frozen_batch_norm_keeps_its_statistics(shards, tmp_path):
    flags = ["--model", "resnet10t", "--img-size", "32", "--freeze", "backbone"]
    base = ["--data", str(shards), "-b", "8", "-j", "0", "--eval-every", "2st", "--no-model-ema", *flags]
    states = []
    for steps in ("1", "4"):
        run = ["--output", str(tmp_path / steps), "--experiment", "run", "--max-steps", steps, "--lr", "0.1"]
        assert train.main([*base, *run]) == 0
        states.append(load_file(tmp_path / steps / "run" / "last" / "model.safetensors"))
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("what, words", [("nothing_here", "found in no parameter"), ("(", "no regular"), ("", None)])
def test_freezing_what_is_not_there(what, words, shards, tmp_path):
    if words is None:
        what, words = ".", "nothing is left"
    with pytest.raises(UserError, match=words):
        train.main(argv(shards, tmp_path, "--freeze", what))


# ---- early stopping --------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_gets_no_better(shards, tmp_path, capsys):
    flags = ["--lr", "1e-30", "--eval-every", "1st", "--eval-metric", "loss", "--no-model-ema", "--patience", "2"]
    assert train.main(argv(shards, tmp_path, *flags)) == 0
    evaluated = [line["step"] for line in log_of(tmp_path / "run") if "val/loss" in line]
    assert evaluated == [1, 2, 3]
    assert "no better loss in 2 evaluations: ended at step 3" in capsys.readouterr().err
    assert train.main(argv(shards, tmp_path, *flags, "--resume", "auto")) == 0
    assert "is finished at" in capsys.readouterr().err and len(log_of(tmp_path / "run")) == 6


def test_patience_is_counted_across_a_resume(shards, tmp_path, monkeypatch):
    flags = ["--lr", "1e-30", "--eval-every", "1st", "--eval-metric", "loss", "--no-model-ema", "--patience", "3"]
    with monkeypatch.context() as patch:
        stopping_at(patch, 2)
        train.main(argv(shards, tmp_path, *flags))
    train.main(argv(shards, tmp_path, *flags, "--resume", "auto"))
    assert [line["step"] for line in log_of(tmp_path / "run") if "val/loss" in line] == [1, 2, 3, 4]


def test_patience_ends_a_stage_and_the_next_one_has_its_own(shards, tmp_path, monkeypatch, capsys):
    flags = ["--lr", "1e-30", "--eval-every", "1st", "--eval-metric", "loss", "--no-model-ema", "--patience", "2"]
    flags += ["--stages", "[{for: 5st, freeze: backbone}, {for: 5st, sched: constant}]"]
    assert train.main(argv(shards, tmp_path / "whole", *flags)) == 0
    said = capsys.readouterr().err
    assert "no better loss in 2 evaluations: stage 1 ended at step 3" in said
    assert "no better loss in 2 evaluations: stage 2 ended at step 5" in said and "done; weights in" in said
    with monkeypatch.context() as patch:
        stopping_at(patch, 4)
        train.main(argv(shards, tmp_path / "cut", *flags))
    train.main(argv(shards, tmp_path / "cut", *flags, "--resume", "auto"))
    same_run(tmp_path / "whole", tmp_path / "cut")


# ---- weight averaging ------------------------------------------------------------------------------------------------


def test_swa_is_the_mean_of_the_weights(shards, tmp_path):
    flags = ["--lr", "0.01", "--sched", "constant", "--checkpoint-every", "1st", "--checkpoint-hist", "9"]
    swa = ["--swa-start", "2st", "--swa-every", "2st"]
    assert train.main(argv(shards, tmp_path, *flags, *swa)) == 0
    values = {}
    for place in storage.complete(tmp_path / "run" / "checkpoints"):
        read = dict(checkpoint.read_tensors(place, ["model.head.fc.weight", "ema.head.fc.weight"]))
        values[storage.read_meta(place)["progress"]["step"]] = read
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight = torch.nn.Parameter(values[4]["model.head.fc.weight"].clone())
    averaged = torch.optim.swa_utils.AveragedModel(module)
    for step in (4, 6, 8):
        module.weight.data.copy_(values[step]["model.head.fc.weight"])
        averaged.update_parameters(module)
        torch.testing.assert_close(values[step]["ema.head.fc.weight"], averaged.module.weight.data)
    assert torch.equal(values[5]["ema.head.fc.weight"], values[4]["ema.head.fc.weight"])


def test_a_mean_of_every_step_and_less(shards):
    """Below a step there is nothing to take twice; the weights of the mean add up to one, each the same."""
    (part,) = laid_out("[]", epochs=5, swa_start="25ex", swa_every="6ex")
    clock = Clock(part, 100, 10)
    shares, in_mean = [], 0
    for seen in range(10, 110, 10):
        decay = clock.averaging(seen, updates=1, in_mean=in_mean)
        if clock.in_swa(seen) and decay is not None:
            in_mean += 1
            shares = [share * decay for share in shares] + [1 - decay]
    assert shares == pytest.approx([1 / 7] * 7)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion", "nadamw"])
def test_every_optimizer_resumes_exactly(name, shards, tmp_path, monkeypatch):
    flags = ["--opt", name, "--lr", "1e-3", "--sched", "constant", "--layer-decay", "0.8", "--clip-grad", "1"]
    assert train.main(argv(shards, tmp_path / "whole", *flags)) == 0
    assert all(math.isfinite(line.get("train/loss", 0)) for line in log_of(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch:
        stopping_at(patch, 3)
        train.main(argv(shards, tmp_path / "cut", *flags))
    train.main(argv(shards, tmp_path / "cut", *flags, "--resume", "auto"))
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_gradient_that_overflows_changes_nothing_without_a_fused_kernel_either(shards, tmp_path):
    with pytest.raises(UserError, match="the weights were not changed"):
        train.main(argv(shards, tmp_path, "--opt", "lamb", "--lr", "1e38", "--sched", "constant"))


def test_settings_reach_the_record(shards, tmp_path):
    assert train.main(argv(shards, tmp_path, "--stages", THREE, "--max-steps", "6")) == 0
    meta = json.loads(next((tmp_path / "run" / "checkpoints").glob("*6/meta.json")).read_text())
    assert meta["stage"] == 2 and meta["config"]["lr"] == "auto" and len(meta["config"]["stages"]) == 3
