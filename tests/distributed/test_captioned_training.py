"""Runs with captions in two processes: what they learn, resume and predict is what one process does."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import worlds
from caption_runs import BIGRU, NO_DROPOUT, argv, hub_folder, same, table, weights
from conftest import log_of, run

from mlc import predict

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return hub_folder("bert-uncased", tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize(
    "world, fusion, text",
    [
        ("cpu2", "concat", "bert-uncased"),
        ("fsdp2", "cross-attention", "bert-uncased"),
        ("zero2", "none", "bert-uncased"),
        ("fsdp2", "gated", "deberta-v3"),
        ("zero2", "late", "albert"),
    ],
)
def test_two_processes_learn_what_one_does(shards, tmp_path, world, fusion, text):
    """With each global batch ordered by length."""
    losses, predicted, folder = {}, {}, hub_folder(text, tmp_path / "hub")
    more = ["--text-model", str(folder), *NO_DROPOUT, "--drop-path", "0", "--max-steps", "3", "--eval-every", "3st"]
    more += ["--word-dropout", "0.2", "--caption-dropout", "0.2", "--group-by-length"]
    for processes in (1, world):
        size = ["-b", "8" if processes == 1 else "4"]
        folder = tmp_path / str(processes)
        worlds.train(processes, argv(shards, folder, fusion, *more, *size, "--log-samples", f"{folder}.jsonl"))
        lines = log_of(folder / "run")
        losses[processes] = [line["train/loss"] for line in lines if "train/loss" in line]
        predict.main(["--run", str(folder / "run"), "--data", str(shards), "-j", "0", "--weights", "last"])
        predicted[processes] = table(folder / "run" / "predictions" / "test.csv")
    assert (tmp_path / f"{world}.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()
    np.testing.assert_allclose(losses[world], losses[1], rtol=1e-4)
    np.testing.assert_allclose(predicted[world], predicted[1], atol=1e-4)


@pytest.mark.parametrize("world, fusion", [("fsdp2", "early"), ("zero3", "concat")])
def test_two_processes_resume_exactly(shards, tmp_path, bert, world, fusion):
    more = ["--text-model", str(bert), "--max-steps", "4", "--checkpoint-every", "2st", "--eval-every", "4st"]
    more += ["-b", "4", "--word-dropout", "0.2", "--caption-dropout", "0.2", "--resume", "auto"]
    flags = argv(shards, tmp_path / "a", fusion, *more)
    worlds.train(world, flags)
    straight, run = (shutil.copytree(tmp_path / "a", tmp_path / "b") / "run"), tmp_path / "a" / "run"
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    shutil.rmtree(run / "last")
    worlds.train(world, flags)
    assert same(weights(run / "last"), weights(straight / "last"))


def test_compiled_and_recomputed_is_the_same(shards, tmp_path, bert):
    more = ["--text-model", str(bert), *NO_DROPOUT, "--drop-path", "0", "--max-steps", "3"]
    losses = []
    for name, flags in (("plain", []), ("again", ["--compile", "--grad-checkpointing", "all"])):
        worlds.train(1, argv(shards, tmp_path, "cross-attention", *more, *flags, name=name), "no_inductor")
        losses.append([line["train/loss"] for line in log_of(tmp_path / name) if "train/loss" in line])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_predictions_do_not_depend_on_the_number_of_processes(shards, tmp_path):
    worlds.train(1, argv(shards, tmp_path, "cross-attention", *BIGRU))
    written = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--run", str(tmp_path / "run"), "--data", str(shards), "--tta", "hflip", "-b", "3", "-j", "1"]
        run("-m", "mlc", "predict", *flags, "--out", str(out), processes=processes)
        written.append((out / "test.csv").read_text())
    assert written[0] == written[1] and len(written[0].splitlines()) == 26
