"""Distillation in the training story: what each kind of teacher and each rule adds to the loss, by closed forms."""

import csv
import functools
from pathlib import Path

import pytest
import torch
from conftest import PLAIN, TINY, log_of
from torch.nn.functional import cosine_similarity

from mlc import predict, train
from mlc.data.dataset import TrainDataset
from mlc.data.mixing import swap_pairs
from mlc.data.order import DROPOUT, hash64
from mlc.data.soft_labels import SoftLabels
from mlc.data.sources import open_sources
from mlc.flags import read_config
from mlc.models.build import build_model
from mlc.models.export import load_exported
from mlc.models.features import PooledFeatures, orthonormal_rows
from mlc.models.teacher import Teacher
from mlc.optim.ema import Ema
from mlc.optim.losses import bce, focal, smooth
from mlc.parallel import compiler, launch
from shards.console import run as run_verb
from shards.dataset import load_dataset

AS_PREDICTED = ["--crop", "squish", "--hflip", "0"]  # what `mlc predict` does to an image


def argv(shards: Path, folder: Path, *more: str) -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0"]
    long = ["--max-steps", "3", "--log-interval", "1", "--eval-every", "3st"]
    return [*TINY, *PLAIN, *short, *long, "--lr", "1e-3", *more]


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in log_of(folder / "run") if "train/loss" in line]


@pytest.fixture(scope="module")
def teachers(shards, tmp_path_factory) -> list[str]:
    """Two trained models, the second one wider; with the prediction files that they wrote of the training split."""
    folder = tmp_path_factory.mktemp("teachers")
    wide = ["--seed", "3", "--model-kwargs", "embed_dim=24", "depths=[2,2]", "num_heads=[1,2]", "window_size=4"]
    kinds = {"a": [], "b": wide}
    for name, more in kinds.items():
        assert train.main(argv(shards, folder / name, "--lr", "1e-2", "--head-bias", "prior", *more)) == 0
        run = str(folder / name / "run")
        predict.main(["--run", run, "--data", str(shards), "--split", "train", "-j", "0"])
    return [str(folder / name / "run") for name in kinds]


def file_of(teacher: str) -> str:
    return f"{teacher}/predictions/train.csv"


class First:
    """The first step, by the parts the story is made of."""

    def __init__(self, args: list[str]):
        self.config = config = read_config(args)
        self.classes = load_dataset(config.data[0]).classes
        launch.seed_everything(config.seed)
        names = ("img_size", "drop_path", "model_kwargs")
        given = {name: getattr(config, name) for name in names}
        self.student = build_model(name=config.model, num_classes=len(self.classes), **given).train()
        cfg = self.student.pretrained_cfg
        self.mean, self.std = cfg["mean"], cfg["std"]
        self.sources = sources = open_sources(config)
        transform = train.train_transform(config, self.mean)
        stream = TrainDataset(sources.sampler, sources.readers, transform, config.seed)
        self.batch = stream.__getitems__(range(config.batch_size))
        self.image, self.target, self.mix = train.prepare(self.batch, config, self.mean, self.std, mixing=True)

    def logits(self) -> torch.Tensor:
        launch.seed_everything(int(hash64(self.config.seed, DROPOUT, 0, 0, 0)[0]) >> 1)
        return self.student(self.image)

    def teach(self, folder: str) -> torch.Tensor:
        """Logits of a model that is built for these images."""
        with torch.no_grad():
            return load_exported(f"{folder}/best")[0](self.image)


# ---- teachers --------------------------------------------------------------------------------------------------------


def test_a_file_teaches_what_its_model_teaches(shards, teachers, tmp_path):
    """Three steps, for the weights of the third hang on the gradients of the first two."""
    for name, teacher, workers in (("live", teachers[0], "0"), ("file", file_of(teachers[0]), "1")):
        args = argv(shards, tmp_path / name, *AS_PREDICTED, "--kd-teacher", teacher, "--kd-alpha", "0.7", "-j", workers)
        assert train.main(args) == 0
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def test_several_teachers_are_the_mean_of_their_softened_probabilities(shards, teachers, tmp_path):
    """Two runs, and a file, which is mixed as the labels are; with accumulation."""
    more = ["--kd-teacher", teachers[0], "--kd-teacher", teachers[1], "--kd-teacher", file_of(teachers[1])]
    args = argv(shards, tmp_path, *more, "--kd-temp", "3", "--kd-alpha", "0.4", "--mixup", "0.4")
    assert train.main([*args, "--max-steps", "1", "-b", "4", "--global-batch-size", "8", "--drop-path", "0"]) == 0
    first = First([*args, "--drop-path", "0"])
    x = first.logits()
    soft = SoftLabels(first.config.kd_teacher[2:], first.sources.sampler.sources, first.classes)
    source, row = first.batch["source"].numpy(), first.batch["row"].numpy()
    p = (torch.from_numpy(soft(source, row))[:, 0].double().logit() / 3).sigmoid().float()
    own = first.mix.lam[:, None]
    seen = [(first.teach(teacher) / 3).sigmoid() for teacher in teachers] + [own * p + (1 - own) * swap_pairs(p)]
    assert (seen[0] - seen[1]).abs().max() > 0.01 and first.mix.lam.min() < 0.95
    expected = 0.6 * bce(x, first.target) + 0.4 * 9 * bce(x / 3, sum(seen) / 3)
    assert losses(tmp_path)[0] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_runs_own_average_teaches_in_eval_mode(shards, tmp_path):
    """Before the first update it is the student's own first weights, without stochastic depth."""
    args = argv(shards, tmp_path, "--kd-teacher", "ema", "--kd-alpha", "1", "--mixup", "0.4")
    assert train.main(args) == 0
    first = First(args)
    x = first.logits()
    with torch.no_grad():
        soft = (first.student.eval()(first.image) / 2).sigmoid()
    assert losses(tmp_path)[0] == pytest.approx(4 * bce(x / 2, soft).mean().item(), rel=1e-5)


def test_an_average_that_teaches_is_the_one_of_this_step():
    """Our attention keeps what it made of its weights between two batches of an evaluation."""
    make = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    models = [
        build_model(name="swinv2_tiny_window8_256", num_classes=3, img_size=32, model_kwargs=make) for _ in range(2)
    ]
    ema, image = Ema(models[0]), torch.randn(2, 3, 32, 32)
    teacher = Teacher(ema.module)
    before = teacher(image)
    ema.update(models[1], 0.0)
    assert not torch.allclose(teacher(image), before)
    torch.testing.assert_close(teacher(image), models[1].eval()(image), atol=1e-6, rtol=1e-5)


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_the_larger_one_of_smoothed_label_and_teacher_is_the_target_of_the_runs_loss(shards, teachers, tmp_path):
    more = ["--kd-teacher", teachers[0], "--kd-rule", "max", "--kd-temp", "5", "--loss", "focal", "--smoothing", "0.1"]
    args = argv(shards, tmp_path, *more)
    assert train.main(args) == 0
    first = First(args)
    target = torch.maximum(smooth(first.target, 0.1), first.teach(teachers[0]).sigmoid())
    value = focal(first.logits(), target, 2.0, -1.0).mean().item()
    assert losses(tmp_path)[0] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_features_of_the_same_and_of_another_width(which, shards, teachers, tmp_path):
    more = ["--kd-teacher", teachers[which], "--kd-feature", "0.3", "--kd-alpha", "0", "--grad-checkpointing", "all"]
    args = argv(shards, tmp_path, *more)
    assert train.main(args) == 0
    first = First(args)
    teacher = load_exported(f"{teachers[which]}/best")[0]
    features = [PooledFeatures(model) for model in (first.student, teacher)]
    x, _ = first.logits(), teacher(first.image)
    s, t = (hook.take() for hook in features)
    assert t.shape[1] == (32, 48)[which]
    t = t @ orthonormal_rows(32, 48, 42).T if which else t
    expected = bce(x, first.target).mean() + 0.3 * (1 - cosine_similarity(s, t)).mean()
    assert losses(tmp_path)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_features_alone_teach(shards, teachers, tmp_path):
    """Their loss falls, so its gradient arrives through the hook."""
    more = ["--kd-teacher", teachers[1], "--kd-feature", "100", "--kd-alpha", "0", "--max-steps", "20"]
    assert train.main(argv(shards, tmp_path, *more)) == 0
    found = losses(tmp_path)
    assert found[-1] < 0.5 * found[0]


# ---- with other settings ---------------------------------------------------------------------------------------------


def test_compiled_teachers_teach_the_same_and_compile_nothing_later(shards, teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiler, "need_compiler", lambda device: None)
    torch._dynamo.reset()
    for number, more in enumerate((["--kd-teacher", teachers[1], "--kd-feature", "1"], ["--kd-teacher", "ema"])):
        for name in ("plain", "compiled"):
            flags = ["--compile"] if name == "compiled" else []
            assert train.main(argv(shards, tmp_path / f"{number}{name}", *more, *flags, "--drop-path", "0")) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "graphs compiled" in line]
        assert len(said) == 1 and "step 1:" in said[0], said
        assert losses(tmp_path / f"{number}compiled") == pytest.approx(losses(tmp_path / f"{number}plain"), rel=1e-4)


def test_the_batch_size_is_found_with_a_file(shards, teachers, tmp_path, capsys):
    more = ["--kd-teacher", file_of(teachers[0]), "-b", "auto", "--global-batch-size", "8", "--mixup", "0.4"]
    assert train.main(argv(shards, tmp_path, *more)) == 0
    assert "batch size auto: 8 per device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--kd-teacher", "ema", "--no-model-ema"], "--kd-teacher ema needs the averaged weights"),
        (["--kd-teacher", "a.csv", "--kd-feature", "1"], "--kd-feature needs one --kd-teacher that is a model"),
        (["--kd-teacher", "a", "--kd-teacher", "b", "--kd-feature", "1"], "--kd-feature needs one --kd-teacher"),
        (["--kd-feature", "1"], "--kd-feature needs one --kd-teacher"),
        (["--kd-teacher", "ema", "--kd-feature", "-1"], "--kd-feature must not be negative"),
        (["--kd-rule", "max"], "--kd-rule max needs --kd-teacher"),
        (["--kd-teacher", "nowhere.csv"], "nowhere.csv cannot be read as predictions"),
        (["--kd-teacher", "nowhere"], "nowhere/config.json: missing"),
    ],
)
def test_mistakes_are_one_line(shards, tmp_path, capsys, more, words):
    assert run_verb(train.main, argv(shards, tmp_path, *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_a_file_of_other_images_is_refused(shards, teachers, tmp_path, capsys):
    with Path(file_of(teachers[0])).open() as file:
        rows = list(csv.reader(file))
    with (tmp_path / "some.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-2])
    assert run_verb(train.main, argv(shards, tmp_path, "--kd-teacher", str(tmp_path / "some.csv"))) == 2
    assert f"no row for 2 of the {len(rows) - 1} training images" in capsys.readouterr().err
