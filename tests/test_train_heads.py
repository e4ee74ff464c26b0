"""Every head through the whole story: trained, evaluated, exported, predicted with, and as a teacher."""

import json

import numpy as np
import pytest
import torch
import worlds
from conftest import TINY, log_of
from safetensors.torch import load_file

from mlc import ckpt, predict, train
from mlc.data.sources import open_sources
from mlc.flags import read_config
from mlc.models.export import load_exported
from mlc.models.heads import LABEL_HEADS
from mlc.models.label_relations import label_graph
from shards.console import UserError

SMALL = {
    "mlp": ["hidden=8"],
    "ml_decoder": ["dim=16", "hidden=16"],
    "query2label": ["dim=16", "feedforward=16"],
    "csra": ["heads=4", "lam=0.3"],
    "lstm": ["embed=4", "hidden=6"],
    "gcn": ["embed=4", "hidden=8"],
}


WORLDS = {  # which ways of dividing the weights each is tried in
    "mlp": ("cpu2",),
    "ml_decoder": ("zero3",),
    "query2label": ("fsdp2",),
    "csra": ("fsdp2",),
    "lstm": ("fsdp2", "zero3"),
    "gcn": ("zero3",),
}


def argv(shards, folder, head: str, *more: str) -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    steps = ["--max-steps", "2", "--log-interval", "1", "--eval-every", "2st", "--warmup", "0ep"]
    return [*TINY, *short, *steps, "--head", head, "--head-kwargs", *SMALL[head], *more]


@pytest.mark.parametrize("head", LABEL_HEADS)
def test_trains_and_predicts(shards, tmp_path, head):
    assert train.main(argv(shards, tmp_path, head)) == 0
    run = tmp_path / "run"
    assert json.loads((run / "best" / "config.json").read_text())["mlc"]["head"] == head
    predict.main(["--run", str(run), "--data", str(shards), "--split", "test", "-j", "0"])
    rows = (run / "predictions" / "test.csv").read_text().splitlines()
    assert len(rows) > 10 and 0 < float(rows[1].split(",")[1]) < 1
    ckpt.main(["export", str(run), str(tmp_path / "out"), "--ema"])
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "last"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    load_exported(tmp_path / "out")


def test_a_teacher_and_a_resume_with_another_head(shards, tmp_path):
    assert train.main(argv(shards, tmp_path / "teacher", "csra")) == 0
    teacher = ["--kd-teacher", str(tmp_path / "teacher" / "run"), "--kd-feature", "0.5", "--max-steps", "1"]
    assert train.main(argv(shards, tmp_path, "gcn", *teacher)) == 0
    assert np.isfinite(log_of(tmp_path / "run")[0]["train/loss"])
    with pytest.raises(UserError, match="another head_kwargs"):
        train.main(argv(shards, tmp_path, "gcn", *teacher, "--head-kwargs", "tau=0.1", "--resume", "auto"))


def test_a_head_alone_is_trained(shards, tmp_path):
    """The frozen backbone stays as it was; the head has a learning rate of its own."""
    more = ["--freeze", "backbone", "--head-lr-mult", "2", "--weight-decay", "0"]
    assert train.main(argv(shards, tmp_path, "mlp", *more, "--no-model-ema")) == 0
    assert train.main(argv(shards, tmp_path / "other", "mlp", *more, "--no-model-ema", "--lr", "1e-2")) == 0
    one, other = (load_file(folder / "run" / "last" / "model.safetensors") for folder in (tmp_path, tmp_path / "other"))
    assert {name for name in one if not torch.equal(one[name], other[name])} == {
        f"label_head.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")
    }


def test_the_graph_is_that_of_the_rows_that_are_trained_on(shards, tmp_path):
    train.main(argv(shards, tmp_path, "gcn", "--where", "n_labels > 3"))
    sources = open_sources(read_config(["--data", str(shards), "--where", "n_labels > 3"]))
    rows = sources.sampler.sources[0]
    target = rows.index.targets(rows._rows)
    assert 0 < len(target) < len(rows.index)
    np.testing.assert_array_equal(sources.cooccurrence(), target.T @ target)
    graph = load_file(tmp_path / "run" / "last" / "model.safetensors")["label_head.graph"]
    torch.testing.assert_close(graph, label_graph(target.T @ target, 0.4, 0.2))


@pytest.mark.distributed
@pytest.mark.parametrize("head, worlds_", WORLDS.items(), ids=WORLDS)
def test_divided_training_is_that_of_one_process(shards, tmp_path, head, worlds_):
    """Without dropout the losses are the same, wherever a head's weights lie between two uses."""
    exact = ["dropout=0"] if head in ("ml_decoder", "query2label") else []
    losses = {}
    for world in (1, *worlds_):
        folder = tmp_path / str(world)
        flags = [
            "--head-kwargs",
            *SMALL[head],
            *exact,
            "-b",
            "16" if world == 1 else "8",
            "--drop-path",
            "0",
            "--max-steps",
            "4",
        ]
        worlds.train(world, argv(shards, folder, head, *flags))
        losses[world] = [line["train/loss"] for line in log_of(folder / "run") if "train/loss" in line]
        np.testing.assert_allclose(losses[world], losses[1], rtol=1e-4, err_msg=str(world))


@pytest.mark.distributed
@pytest.mark.parametrize("head", ["ml_decoder", "lstm", "gcn"])
def test_weights_in_bfloat16_and_what_does_not_travel(shards, tmp_path, head):
    """FSDP2 under autocast hands a head weights of another type than its buffers and its input."""
    worlds.train("fsdp2", argv(shards, tmp_path, head, "--amp-dtype", "bf16"))
    assert all(np.isfinite(line["train/loss"]) for line in log_of(tmp_path / "run") if "train/loss" in line)
