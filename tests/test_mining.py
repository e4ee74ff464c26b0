"""Hard mining from the losses of the run: the right samples come once more, and a resumed run repeats the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from indexes import make_index
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits

from mlc import predict, train
from mlc.config import Config
from mlc.data.mixing import draw_mix
from mlc.data.prediction_files import read_predictions
from mlc.data.sampler import Rows, Sampler
from mlc.mining import HardMining
from shards.console import run as run_verb
from shards.dataset import load_dataset, open_index

CPU = torch.device("cpu")


def arguments(data, folder: Path, *more: str) -> list[str]:
    """120 train rows - 24 of validation = 100 and 20 % more: 15 steps of 8 an epoch."""
    short = ["--data", str(data), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    samples = ["--log-samples", str(folder / "samples.jsonl"), "--hard-mining", "0.2"]
    return [*TINY, *short, *samples, "--max-steps", "40", "--log-interval", "1", "--val-split", "", *more]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def epochs(folder: Path, size: int) -> list[Counter]:
    keys = [key for line in lines_of(folder) for key in line["keys"]]
    return [Counter(keys[first : first + size]) for first in range(0, len(keys) - size + 1, size)]


# ---- the list --------------------------------------------------------------------------------------------------------


def test_the_list_is_of_the_largest_losses_whatever_the_batches(tmp_path):
    """Against a dictionary; one run in batches of 16, one in batches of 8 with the samples of another data set."""
    index = make_index(tmp_path / "a", 100, seed=0)
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(100, 5, generator=generator), torch.rand(100, 5, generator=generator).round()
    expected = {
        row: binary_cross_entropy_with_logits(logits[row, [0, 2]], target[row, [0, 2]]).item() for row in range(100)
    }
    for size, sources in ((16, 1), (8, 2)):
        parts = [Rows(index, 0, hard=0.1), Rows(make_index(tmp_path / "b", 40, seed=1), 1)][:sources]
        sampler = Sampler(parts, [None] * sources, 0)
        mining, seen, shown = HardMining(sampler, CPU, [0, 2]), 0, set()
        while not mining.renew(seen, size):
            source, row = sampler.locate(np.arange(seen, seen + size))
            batch = {"source": torch.tensor(source), "row": torch.tensor(row)}
            mining.add(batch, torch.where(batch["source"][:, None] == 0, logits[row], 30.0), target[row])
            shown |= set(row[source == 0].tolist())
            seen += size
        assert seen + size > sampler.epoch_samples >= seen and len(shown) > 50
        hardest = sorted(shown, key=lambda row: -expected[row])[:10]
        assert parts[0].hard.lists[parts[0].hard.newest].tolist() == hardest


def test_what_an_epoch_did_not_show_keeps_its_loss(tmp_path):
    sampler = Sampler([Rows(make_index(tmp_path, 20, seed=0), 0, hard=0.1)], [None], 0)
    mining = HardMining(sampler, CPU, [0])

    def show(rows, loss):
        batch = {"source": torch.zeros(len(rows), dtype=torch.int64), "row": torch.tensor(rows)}
        mining.add(batch, torch.full((len(rows), 1), loss), torch.zeros(len(rows), 1))

    show(range(20), 1.0)
    show([3, 4], 5.0)
    assert mining.renew(22, 2) and set(sampler.sources[0].hard.lists[1]) == {3, 4}
    show(range(4), 0.0)
    show([7], 2.0)
    assert mining.renew(44, 2) and set(sampler.sources[0].hard.lists[2]) == {4, 7}


def test_the_loss_of_a_grid_is_laid_to_a_sample_that_is_in_it(tmp_path):
    rows = 400
    sampler = Sampler([Rows(make_index(tmp_path, rows, seed=0), 0, hard=0.1)], [None], 0)
    mining = HardMining(sampler, CPU, [0])
    mix = draw_mix(torch.arange(rows), Config(splicemix=0.6, cutmix=1.0), 32, 32)
    seen = [
        set(sources) if (how or "").startswith("splicemix") else {place, *sources}
        for place, (how, sources, _) in enumerate(mix.described())
    ]
    charged = mix.charged().tolist()
    assert all(sample in samples for sample, samples in zip(charged, seen, strict=True))
    assert all(sample == place for place, sample in enumerate(charged) if place in seen[place])
    assert 0.1 < np.mean([place not in samples for place, samples in enumerate(seen)]) < 0.3

    losses = torch.arange(1, rows + 1.0)[:, None]  # of picture i; the largest that a sample has is its own
    batch = {"source": torch.zeros(rows, dtype=torch.int64), "row": torch.arange(rows)}
    mining.add(batch, losses, torch.zeros(rows, 1), mix)
    expected = {sample: place for place, sample in enumerate(charged)}
    found = mining._now.round().long() - 1
    assert all(found[sample] == place for sample, place in expected.items())
    assert (found < 0).sum() == rows - len(expected)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_second_epoch_repeats_what_a_still_model_finds_hardest(shards, tmp_path):
    """A model that does not move, on images that are not changed: its predictions say what must be repeated."""
    index = open_index(load_dataset(shards), "train")
    still = ["--lr", "1e-30", "--weight-decay", "0", "--drop-path", "0", "--crop", "squish", "--hflip", "0"]
    assert train.main(arguments(shards, tmp_path, *still, "-b", "6", "--no-model-ema")) == 0
    argv = ["--run", str(tmp_path / "run"), "--weights", "last", "--data", str(shards), "--split", "train", "-j", "0"]
    assert run_verb(predict.main, argv) == 0
    classes = load_dataset(shards).classes
    p = read_predictions(tmp_path / "run" / "predictions" / "train.csv", classes)[1].astype(float)
    target = index.targets(np.arange(len(index))) > 0.5
    loss = -np.log(np.where(target, p, 1 - p)).mean(1)
    extra = round(0.2 * len(index))
    found = epochs(tmp_path, len(index) + extra)
    every = Counter(index.key(row) for row in range(len(index)))
    repeated = [set(epoch - every) for epoch in found]
    hardest = {index.key(row) for row in np.argsort(-loss)[:extra]}
    assert len(repeated) == 2 and [len(keys) for keys in repeated] == [extra, extra]
    assert len(repeated[1] & hardest) >= extra - 1 and len(repeated[0] & hardest) < extra - 3


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert train.main(arguments(shards, folder, "--mixup", "0.4", "-j", "1")) == 0
    return folder


@pytest.mark.parametrize("steps", [7, 18, 30], ids=["in the first epoch", "in the second", "at its end"])
def test_a_resumed_run_is_the_one_that_never_stopped(shards, straight, tmp_path, steps):
    first = arguments(shards, tmp_path, "--mixup", "0.4", "--resume", "auto")
    assert stopped_after(first, tmp_path, steps) < 40
    assert train.main(arguments(shards, tmp_path, "--mixup", "0.4", "--resume", "auto")) == 0
    assert lines_of(tmp_path) == lines_of(straight)
    weights = [load_file(folder / "run" / "last" / "model.safetensors") for folder in (straight, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def stopped_after(argv: list[str], folder: Path, steps: int) -> int:
    """Trains until a STOP file that appears in the middle; how many steps that were."""
    from mlc.parallel.preempt import StopFlag

    check, calls = StopFlag.check, []

    def counting(self):
        calls.append(1)
        return check(self) or len(calls) >= steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopFlag, "check", counting)
        assert train.main(argv) == 0
    return len(lines_of(folder))


def test_a_list_of_errors_is_taken_from_a_file(shards, tmp_path, capsys):
    index, classes = open_index(load_dataset(shards), "train"), load_dataset(shards).classes
    target = index.targets(np.arange(len(index)))
    target[:5] = 1 - target[:5]  # predictions that are wrong for five images
    text = "\n".join(
        ",".join([index.image_id(row), *(f"{0.1 + 0.8 * value:.2f}" for value in target[row])])
        for row in range(len(index))
    )
    (tmp_path / "oof.csv").write_text(",".join(["ImageID", *classes]) + "\n" + text + "\n")
    more = ["--hard-list", str(tmp_path / "oof.csv"), "--hard-mining", str(5 / len(index))]
    assert train.main(arguments(shards, tmp_path, *more, "--max-steps", "30")) == 0
    every = Counter(index.key(row) for row in range(len(index)))
    for epoch in epochs(tmp_path, len(index) + 5):
        assert epoch - every == Counter(index.key(row) for row in range(5))
    again = arguments(shards, tmp_path, "--resume", "auto", "--max-steps", "32")
    assert run_verb(train.main, again) == 2
    assert "was made with another samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--hard-mining", "1.5"], "--hard-mining must be in [0, 1]"),
        (["--hard-mining", "0", "--hard-list", "x.csv"], "--hard-list needs --hard-mining"),
        (["--hard-list", "nowhere.csv"], "nowhere.csv cannot be read as predictions"),
    ],
)
def test_mistakes_are_one_line(shards, tmp_path, capsys, more, words):
    assert run_verb(train.main, arguments(shards, tmp_path, *more)) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
