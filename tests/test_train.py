"""The training story in this process: each switch does what it says, each mistake is one line."""

import gzip
import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, TINY, log_of
from torch.utils._python_dispatch import TorchDispatchMode

from mlc import train
from mlc.config import Config
from mlc.data.dataset import TrainDataset
from mlc.data.order import DROPOUT, hash64
from mlc.data.sources import open_split
from mlc.flags import read_config
from mlc.models.build import build_model
from mlc.models.teacher import Teacher
from mlc.optim.distill import distill_loss, soften
from mlc.optim.losses import asl, bce, focal, smooth, two_way
from mlc.parallel import launch, storage
from shards.console import UserError
from shards.console import run as run_verb
from shards.dataset import load_dataset


def argv(shards: Path, folder: Path, *more: str) -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    return [*TINY, *PLAIN, *short, "--max-steps", "3", "--log-interval", "1", "--eval-every", "3st", *more]


def first_batch(config: Config):
    """(image, target) of step 1 and the student that sees it, by the parts the story is made of."""
    dataset = load_dataset(config.data[0])
    launch.seed_everything(config.seed)
    names = ("img_size", "head", "drop_path", "model_kwargs")
    model = build_model(
        name=config.model, num_classes=len(dataset.classes), **{n: getattr(config, n) for n in names}
    ).train()
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    index = open_split(dataset, "train")
    batch = TrainDataset.of(index, train.train_transform(config, mean), config.seed).__getitems__(
        range(config.batch_size)
    )
    image, target, _ = train.prepare(batch, config, mean, std, mixing=True)
    launch.seed_everything(int(hash64(config.seed, DROPOUT, 0, 0, 0)[0]) >> 1)
    return model, image, target, (mean, std)


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--loss", "focal", "--focal-gamma", "1.5", "--focal-alpha", "0.3"], lambda x, t: focal(x, t, 1.5, 0.3)),
        (["--smoothing", "0.2", "--mixup", "0.4"], lambda x, t: bce(x, smooth(t, 0.2))),
        (["--loss", "asl", "--splicemix", "0.7", "--cutmix", "1", "--mix-labels", "union"], asl),
        (["--groups", "digit", "--group-loss", "digit=two-way"], lambda x, t: two_way(x[:, :10], t[:, :10])),
        (["--head", "extra_linear"], lambda x, t: bce(x, t)),
    ],
)
def test_the_logged_loss_is_the_losss_own_value(shards, tmp_path, more, expected):
    args = argv(shards, tmp_path, *more)
    assert train.main(args) == 0
    model, image, target, _ = first_batch(read_config(args))
    value = expected(model(image), target).mean().item()
    assert log_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(value, rel=1e-5)


def test_distillation_from_a_run(shards, tmp_path):
    assert train.main(argv(shards, tmp_path / "teacher", "--lr", "1e-2")) == 0
    folder = tmp_path / "teacher" / "run"
    args = argv(shards, tmp_path, "--kd-teacher", str(folder), "--kd-alpha", "1", "--kd-temp", "3", "--img-size", "24")
    assert train.main(args) == 0
    config = read_config(args)
    model, image, _, (mean, std) = first_batch(config)
    classes = load_dataset(config.data[0]).classes
    teacher = Teacher.load(folder, classes=classes, device=torch.device("cpu"), mean=mean, std=std)
    value = distill_loss(model(image), soften(teacher(image), 3.0), 3.0).mean().item()
    assert log_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(value, rel=1e-4)
    with pytest.raises(UserError, match="other classes"):
        Teacher.load(folder, classes=classes[::-1], device=torch.device("cpu"), mean=mean, std=std)


def test_a_teacher_with_another_normalisation_sees_the_same_picture(shards, tmp_path):
    assert train.main(argv(shards, tmp_path)) == 0
    folder = tmp_path / "run" / "best"
    info = json.loads((folder / "config.json").read_text())
    image = torch.rand(2, 3, 32, 32)
    own, other = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    logits = []
    for mean, std in (own, other):
        teacher = Teacher.load(folder, classes=info["label_names"], device=torch.device("cpu"), mean=mean, std=std)
        logits.append(teacher((image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_the_prior_bias_starts_at_the_frequencies(shards, tmp_path):
    args = argv(shards, tmp_path, "--head-bias", "prior")
    train.main(args)
    index = open_split(load_dataset(shards), "train")
    p = torch.tensor((index.class_counts() + 1) / (len(index) + 2))
    target = first_batch(read_config(args))[2]
    surprise = -(target * p.log() + (1 - target) * (1 - p).log()).mean().item()
    assert log_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(surprise, rel=1e-5)


def test_learning_rate_in_the_log(shards, tmp_path):
    train.main(
        argv(shards, tmp_path, "--sched", "step", "--decay-every", "1st", "--decay-rate", "0.5", "--lr", "0.008")
    )
    assert [line["train/lr"] for line in log_of(tmp_path / "run") if "train/lr" in line] == [0.008, 0.004, 0.002]


def test_mixing_ends_when_told(shards, tmp_path):
    file = tmp_path / "samples.jsonl"
    train.main(argv(shards, tmp_path, "--mixup", "0.4", "--mixup-off", "2st", "--log-samples", str(file)))
    mixed = [any(line["partner"]) for line in map(json.loads, file.read_text().splitlines())]
    assert mixed == [True, True, False]


def test_the_log_of_samples_says_what_was_mixed_with_what(shards, tmp_path):
    file = tmp_path / "samples.jsonl"
    mixes = ["--mixup", "0.4", "--cutmix", "1", "--splicemix", "0.4"]
    train.main(argv(shards, tmp_path, *mixes, "--global-batch-size", "32", "--log-samples", str(file)))
    seen = set()
    for line in map(json.loads, file.read_text().splitlines()):
        columns = (line[name] for name in ("mix", "partner", "lambda"))
        for place, (how, partner, share) in enumerate(zip(*columns, strict=True)):
            four = line["keys"][place // 4 * 4 :][:4]
            seen.add(how and how.split()[0])
            if how is None:
                assert partner is None and share == 1
            elif how.startswith("splicemix"):
                assert len(partner) in (2, 4) and set(partner) <= set(four)
                assert share == (line["keys"][place] in partner) / len(partner)
            else:
                assert partner == line["keys"][place ^ 1] and 0 <= share < 1
    assert seen >= {"mixup", "cutmix", "splicemix"}


def test_what_is_mixed_does_not_depend_on_the_micro_batch(shards, tmp_path):
    logs = []
    for size in ("16", "4"):
        file = tmp_path / f"{size}.jsonl"
        more = ["-b", size, "--global-batch-size", "16", "--mixup", "0.4", "--cutmix", "1", "--splicemix", "0.5"]
        train.main(argv(shards, tmp_path / size, *more, "--log-samples", str(file), "--val-split", ""))
        logs.append(file.read_text())
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "more, words",
    [
        (["-b", "6", "--splicemix", "0.5"], "--batch-size 6 is not a multiple of 4, but splicemix takes four samples"),
        (["-b", "5", "--cutmix", "1"], "--batch-size 5 is odd, but mixing pairs samples on a device; use 6 or --mixup"),
        (["--group-loss", "digits=asl"], "--group-loss digits: no such group; did you mean digit?"),
        (["--groups", "pen"], "--groups pen: no such group; choose one of digit, ink"),
    ],
)
def test_mistakes_in_mixing_and_groups_are_one_line(shards, tmp_path, more, words):
    with pytest.raises(UserError) as error:
        train.main(argv(shards, tmp_path, *more))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_validation_the_last_weights_are_kept(shards, tmp_path):
    train.main(argv(shards, tmp_path, "--val-split", "", "--no-model-ema", "--threshold", "0.3"))
    run = tmp_path / "run"
    assert (run / "last" / "model.safetensors").exists() and not (run / "best").exists()
    assert json.loads((run / "last" / "thresholds.json").read_text())["global"] == 0.3


def test_starting_from_weights_on_disk(shards, tmp_path):
    """Run, then go on from its exported weights: the first validation is the other's last."""
    train.main(argv(shards, tmp_path / "a", "--no-model-ema"))
    weights = tmp_path / "a" / "run" / "last" / "model.safetensors"
    train.main(argv(shards, tmp_path / "b", "--no-model-ema", "--pretrained-path", str(weights), "--lr", "1e-12"))
    a, b = (log_of(tmp_path / name / "run")[-1] for name in "ab")
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-5)


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: values that the host asks for, and copies from it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_asks_for_nothing_between_two_lines_of_the_log(shards, tmp_path):
    """But for the loss and what rides on it, of the step before; so that a longer run asks no more than a short one."""
    counts = []
    for steps in (4, 8):
        more = ["--max-steps", str(steps), "--log-interval", "100", "--val-split", "", "--mixup", "0.4"]
        more += ["--cutmix", "1", "--splicemix", "0.5", "--cutout", "0.3"]
        more += ["--weighted-loss", "effective", "--group-loss", "ink=asl", "--groups", "digit"]
        with HostReads() as reads:
            args = argv(shards, tmp_path / str(steps), *more, "--reprob", "0.5", "--clip-grad", "0.1")
            train.main([*args, "--checkpoint-every", "1000ep", "--global-batch-size", "16"])
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_a_profile_of_the_run(shards, tmp_path, capsys):
    train.main(argv(shards, tmp_path, "--profile", "--max-steps", "8", "--val-split", ""))
    folder = tmp_path / "run" / "profile"
    said = capsys.readouterr().err
    assert f"profile of 3 steps in {folder}" in said.replace("\n", "") and "there is no profile" not in said
    assert "aten::" in (folder / "operators.txt").read_text()
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#4", "ProfilerStep#6"} <= names and "ProfilerStep#3" not in names


def test_a_run_too_short_for_a_profile_says_so(shards, tmp_path, capsys):
    train.main(argv(shards, tmp_path, "--profile", "--val-split", ""))
    assert "shorter than 7 steps" in capsys.readouterr().err


def test_deterministic_gives_the_same_run(shards, tmp_path):
    for name, more in (("a", ["--deterministic"]), ("b", [])):
        train.main(argv(shards, tmp_path / name, *more, "--mixup", "0.4"))
        assert torch.are_deterministic_algorithms_enabled() == bool(more)
        torch.use_deterministic_algorithms(False)
    a, b = ([line["train/loss"] for line in log_of(tmp_path / n / "run") if "train/loss" in line] for n in "ab")
    assert a == b


def test_a_gradient_that_is_no_number_stops_before_it_does_harm(shards, tmp_path, capsys):
    args = argv(shards, tmp_path, "--max-steps", "6", "--checkpoint-every", "1st", "--lr", "1e30", "--no-model-ema")
    assert run_verb(train.main, args) == 2
    assert "the weights were not changed" in capsys.readouterr().err
    deadline = time.monotonic() + 300  # the checkpoint in flight is written to its end before a process goes
    while not (saved := storage.complete(tmp_path / "run" / "checkpoints")) or list(saved[0].parent.glob(".*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert math.isfinite(log_of(tmp_path / "run")[-1]["train/grad_norm"]) and not storage.damage(saved[-1])


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_by_the_wall_clock_and_elsewhere(shards, tmp_path, monkeypatch):
    """One is due at each step; the ranks act on it a step later."""
    clock = iter(range(10**6))
    monkeypatch.setattr("mlc.clock.time.monotonic", lambda: float(next(clock)))
    more = ["--checkpoint-every", "0.01min", "--checkpoint-hist", "9", "--checkpoint-dir", str(tmp_path / "elsewhere")]
    assert train.main(argv(shards, tmp_path, "--max-steps", "5", *more)) == 0
    names = [f"step-{step:08d}" for step in range(2, 6)]
    assert checkpoints(tmp_path / "elsewhere" / "run") == names and not (tmp_path / "run" / "checkpoints").exists()
    seconds = [line["ckpt/blocked_s"] for line in log_of(tmp_path / "run") if "ckpt/blocked_s" in line]
    assert len(seconds) == 3 and all(0 < s < 5 for s in seconds)


def test_a_checkpoint_that_cannot_be_written(shards, tmp_path, capsys, monkeypatch):
    """In the middle it costs a line, at the end it is an error."""
    begin, failing = storage.begin, ["2", "4"]

    def some_fail(building):
        if building.name[len(".step-0000000")] in failing:
            raise OSError(30, "Read-only file system")
        begin(building)

    monkeypatch.setattr(storage, "begin", some_fail)
    args = argv(shards, tmp_path, "--checkpoint-every", "2st", "--max-steps", "5", "--no-checkpoint-async")
    assert run_verb(train.main, args) == 0
    assert capsys.readouterr().err.count("could not be written: OSError: [Errno 30] Read-only file system") == 2
    assert checkpoints(tmp_path / "run" / "checkpoints") == ["step-00000005"]
    failing += ["7"]
    assert run_verb(train.main, [*args, "--max-steps", "7", "--resume", "auto"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: the last checkpoint, of step 7, could not be written to")


def test_starting_from_the_weights_of_a_checkpoint(shards, tmp_path, capsys):
    train.main(argv(shards, tmp_path / "a", "--lr", "1e-2", "--model-ema-decay", "0.5"))
    old = tmp_path / "a" / "run"
    more = ["--resume", str(old), "--resume-weights-only", "--seed", "5", "--lr", "1e-12", "--model-ema-decay", "1"]
    assert train.main(argv(shards, tmp_path / "b", *more, "--no-model-ema-warmup")) == 0
    assert "training starts anew" in capsys.readouterr().err
    a, b = (log_of(tmp_path / name / "run") for name in "ab")
    assert [line["step"] for line in b if "train/loss" in line] == [1, 2, 3]
    for name in ("val/loss", "val_ema/loss"):
        assert b[-1][name] == pytest.approx(a[-1][name], rel=1e-5)


def test_a_damaged_newest_checkpoint_costs_its_steps_only(shards, tmp_path, capsys):
    args = argv(shards, tmp_path, "--checkpoint-every", "1st", "--max-steps", "4")
    assert train.main(args) == 0
    whole = log_of(tmp_path / "run")
    part = tmp_path / "run" / "checkpoints" / "step-00000004" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    assert train.main([*args, "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "step-00000004 is damaged and left out: __0_0.distcp has" in said and "step-00000003: step 3, 24" in said
    again = log_of(tmp_path / "run")
    assert [line["train/loss"] for line in again if "train/loss" in line] == [
        line["train/loss"] for line in whole if "train/loss" in line
    ]
    assert checkpoints(tmp_path / "run" / "checkpoints") == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--resume-weights-only"], "--resume-weights-only needs --resume PATH"),
        (["--checkpoint-dir", "s4://bucket"], "s4://bucket: unknown kind of URL"),
        (["--eval-every", "5min"], "--eval-every: '5min' is no duration"),
        (["--checkpoint-every", "0min"], "--checkpoint-every: '0min' is no duration"),
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--data", ""], "--data DIR is missing"),
        (["--train-split", "trian"], "no split 'trian'"),
        (["--train-split", "test"], "'test' has no labels"),
        (["--model", "swinv2_tinny"], "no model 'swinv2_tinny'"),
        (["--model-kwargs", "depth=[1]"], "cannot build swinv2_tiny_window8_256"),
        (["--pretrained-path", "no.pth"], "no.pth: no such file"),
        (["--kd-teacher", "nowhere"], "nowhere/config.json: missing"),
        (["--eval-metric", "f2"], "--eval-metric f2 is not measured"),
        (["--eval-every", "often"], "--eval-every: 'often' is no duration"),
        (["--checkpoint-every", "0ep"], "--checkpoint-every 0ep: must be longer"),
        (["--global-batch-size", "12"], "use --batch-size one of 1, 2, 3, 4, 6, 12"),
        (["-b", "7", "--mixup", "0.4"], "--batch-size 7 is odd"),
        (["--resume", "nowhere"], "--resume nowhere: no complete checkpoint"),
        (["--aa", "rand-q9"], "--aa rand-q9"),
    ],
)
def test_mistakes_are_one_line(shards, tmp_path, capsys, more, words):
    assert run_verb(train.main, argv(shards, tmp_path, *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_a_run_is_not_overwritten_and_not_mixed_with_another(shards, tmp_path, capsys):
    assert run_verb(train.main, argv(shards, tmp_path, "--checkpoint-every", "1st")) == 0
    for more, words in (
        ([], "holds a run already"),
        (["--resume", "auto", "--seed", "7"], "another seed: 42 then, 7 now"),
        (["--resume", "auto", "--img-size", "24"], "another img_size: 32 then, 24 now"),
    ):
        assert run_verb(train.main, argv(shards, tmp_path, *more)) == 2
        assert words in capsys.readouterr().err


def test_a_broken_image_is_named(shards, tmp_path, capsys):
    """One image overwritten in place: the message has shard and key, with and without workers."""
    import shutil

    broken = shutil.copytree(shards, tmp_path / "shards")
    index = open_split(load_dataset(broken), "train")
    with index.shard_path(0).open("r+b") as file:
        file.seek(int(index.offset[3]))
        file.write(b"\0" * int(index.size[3]))
    for number, workers in enumerate(("0", "1")):
        args = argv(broken, tmp_path / str(number), "--max-steps", "20", "-j", workers, "--max-bad-samples", "0")
        assert run_verb(train.main, args) == 2
        assert f"train-000000.tar:{index.key(3)}: its crc32 is not" in capsys.readouterr().err
