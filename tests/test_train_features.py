"""A head on frozen features through the whole story: trained, stopped, resumed, evaluated, exported, predicted with."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from caption_runs import hub_folder, same, table, weights
from conftest import PLAIN, log_of
from safetensors.torch import load_file, save_file

from mlc import ckpt, evaluate, features, predict, soup, train
from mlc.data import transforms
from mlc.data.features import FeatureFile, write_features
from mlc.data.mixing import draw_mix
from mlc.data.sources import open_sources
from mlc.flags import read_config
from mlc.models.build import build_model
from mlc.models.export import load_exported
from mlc.models.heads import Mlp
from mlc.optim.losses import bce
from shards import pack
from shards.console import UserError
from shards.dataset import load_dataset, open_index


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub_folder("bert-uncased", folder)
    torch.manual_seed(1)
    save_file(build_model(name="test_resnet", num_classes=7).state_dict(), folder / "resnet.safetensors")
    return folder


@pytest.fixture(scope="session")
def made(shards, hub) -> Path:
    """Of images and captions."""
    told = ["--model", "test_resnet", "--pretrained-path", str(hub / "resnet.safetensors"), "--img-size", "32"]
    told += ["--text-model", str(hub / "bert"), "--split", "train,val,test", "--out", str(hub / "both.arrow")]
    features.main(["--data", str(shards), "-j", "0", *told])
    return hub / "both.arrow"


def argv(shards, folder, *more: str, name: str = "run") -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", name, "-b", "8", "-j", "0"]
    return [*PLAIN, *short, "--max-steps", "4", "--log-interval", "1", "--eval-every", "4st", "--lr", "1e-2", *more]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in log_of(run) if "train/loss" in line]


@pytest.mark.parametrize("head", ["linear", "mlp", "lstm"])
@pytest.mark.parametrize("norm", ["standardize", "l2", "none"])
def test_trains_evaluates_and_predicts(shards, made, tmp_path, head, norm):
    told = ["--features", str(made), "--head", head, "--feature-norm", norm, "--mixup", "0.4", "--drop", "0.1"]
    assert train.main(argv(shards, tmp_path, *told)) == 0
    run = tmp_path / "run"
    data = ["--run", str(run), "--data", str(shards), "--features", str(made), "-j", "0"]
    evaluate.main([*data, "--json"])
    found = json.loads((run / "predictions" / "val.json").read_text())
    logged = [line for line in log_of(run) if "val/loss" in line][-1]
    which = max(("val", "val_ema"), key=lambda name: logged[f"{name}/f1_samples"])
    assert found["map"] == pytest.approx(logged[f"{which}/map"], abs=1e-6)
    ckpt.main(["export", str(run), str(tmp_path / "out"), "--ema"])
    assert same(weights(tmp_path / "out"), weights(run / "last"))
    predict.main([*data, "--split", "test", "--weights", "last"])
    model, info = load_exported(tmp_path / "out")
    values, _ = FeatureFile(made).values("test")
    with torch.no_grad():
        mine = model(torch.from_numpy(values.copy())).sigmoid().numpy()
    np.testing.assert_allclose(table(run / "predictions" / "test.csv"), mine, atol=1e-6)
    assert info["architecture"] == "features" and info["mlc"]["norm"] == norm
    soup.main([str(run / "best"), str(run / "last"), "--out", str(tmp_path / "soup"), *data[2:], "--split", "val"])


def test_it_learns_what_a_head_on_the_frozen_backbone_learns(shards, hub, tmp_path, monkeypatch):
    """Linear, from the same start, on the same images without augmentation and made small alike (training's own way is
    the cheaper one): the only difference is who computes the features, and when."""
    monkeypatch.setattr(transforms, "decoded", functools.partial(transforms.decoded, antialias=True))
    told = ["--model", "test_resnet", "--pretrained-path", str(hub / "resnet.safetensors"), "--img-size", "32"]
    features.main(["--data", str(shards), "-j", "0", *told, "--out", str(tmp_path / "f.arrow")])
    common = ["--head-bias", "prior", "--opt", "sgd", "--lr", "0.5", "--mixup", "0"]
    plain = ["--freeze", "backbone", "--crop", "squish", "--hflip", "0"]
    train.main(argv(shards, tmp_path, *common, *told, *plain, name="backbone"))
    train.main(argv(shards, tmp_path, *common, "--features", str(tmp_path / "f.arrow"), "--feature-norm", "none"))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "backbone"), rtol=1e-5)
    head, whole = weights(tmp_path / "run" / "last"), weights(tmp_path / "backbone" / "last")
    torch.testing.assert_close(head["classifier.weight"], whole["fc.weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head["classifier.bias"], whole["fc.bias"], rtol=1e-4, atol=1e-6)
    (lines, others) = ([line for line in log_of(tmp_path / name) if "val/map" in line] for name in ("run", "backbone"))
    assert lines[-1]["val/map"] == pytest.approx(others[-1]["val/map"], abs=1e-5)


def test_a_step_by_hand(shards, made, tmp_path):
    """Features looked up by the row, standardised over the training rows, mixed with the partner's, and the loss."""
    flags = argv(shards, tmp_path, "--features", str(made), "--head", "mlp", "--mixup", "0.4", "--no-model-ema")
    flags += ["--max-steps", "1", "--where", "n_labels > 3", "--seed", "5"]
    train.main(flags)
    config, file = read_config(flags), FeatureFile(made)
    sources = open_sources(config)
    values, _ = file.values("train")
    rows = sources.sampler.sources[0].rows
    assert 0 < len(rows) < len(values)
    width = file.sizes[0]
    mean, std = values[rows].mean(0), values[rows].std(0)
    has = values[rows, width:].any(1)
    mean[width:], std[width:] = values[rows, width:][has].mean(0), values[rows, width:][has].std(0)
    own = load_file(tmp_path / "run" / "last" / "model.safetensors")
    np.testing.assert_allclose(own["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(own["std"], np.where(std > 1e-6, std, 1), rtol=1e-3, atol=1e-5)
    picked = sources.sampler.locate(np.arange(8))[1]
    x = (values[picked] - own["mean"].numpy()) / own["std"].numpy()
    x[~values[picked, width:].any(1), width:] = 0
    mix = draw_mix(torch.arange(8), config, 256, 256)
    lam = mix.lam[:, None].numpy()
    assert (lam < 1).any()
    x = torch.from_numpy(lam * x + (1 - lam) * x[np.arange(8) ^ 1]).float()
    target = torch.from_numpy(sources.readers[0].index.targets(picked))
    from mlc.parallel import launch

    launch.seed_everything(5)
    head = Mlp(values.shape[1], target.shape[1])
    expected = bce(head(x), mix.labels(target)).mean().item()
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)


def test_stopped_and_resumed_is_never_stopped(shards, made, tmp_path):
    told = ["--head", "mlp", "--head-kwargs", "dropout=0.3", "--splicemix", "0.5"]
    flags = argv(shards, tmp_path / "a", *told, "--drop", "0.2", "--checkpoint-every", "2st", "--resume", "auto")
    flags += ["--log-samples", str(tmp_path / "samples.jsonl"), "--features"]
    train.main([*flags, str(made)])
    straight, run = shutil.copytree(tmp_path / "a", tmp_path / "b") / "run", tmp_path / "a" / "run"
    logged = (tmp_path / "samples.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "last")
    moved = shutil.copy(made, tmp_path / "moved.arrow")
    train.main([*flags, str(moved)])  # where the file lies does not matter
    assert same(weights(run / "last"), weights(straight / "last")) and losses(run) == losses(straight)
    assert (tmp_path / "samples.jsonl").read_text() == logged
    with pytest.raises(UserError, match="another feature_norm"):
        train.main([*flags, str(made), "--feature-norm", "l2"])
    values, seen = FeatureFile(made).values("train")
    index, first = open_index(load_dataset(shards), "train"), FeatureFile(made)
    parts = {"train": (index, values + 1, seen)}
    for split in ("val", "test"):
        parts[split] = open_index(load_dataset(shards), split), *first.values(split)
    write_features(tmp_path / "other.arrow", parts, data=first.data, encoders=first.encoders)
    with pytest.raises(UserError, match="was made with another features"):
        train.main([*flags, str(tmp_path / "other.arrow"), "--max-steps", "6"])


def test_a_teachers_file_and_the_runs_own_average(shards, made, tmp_path):
    train.main(argv(shards, tmp_path, "--features", str(made)))
    data = ["--data", str(shards), "--features", str(made), "--split", "train", "-j", "0"]
    predict.main(["--run", str(tmp_path / "run"), *data])
    teachers = ["--kd-teacher", str(tmp_path / "run" / "predictions" / "train.csv"), "--kd-teacher", "ema"]
    train.main(argv(shards, tmp_path, "--features", str(made), *teachers, "--mixup", "0.4", name="student"))
    assert all(np.isfinite(losses(tmp_path / "student")))


def test_two_files_stand_side_by_side(shards, hub, made, tmp_path):
    both, dataset = FeatureFile(made), load_dataset(shards)
    width, names = both.sizes[0], ("train", "val", "test")
    for number, part in enumerate((slice(0, width), slice(width, None))):
        own = {
            name: (open_index(dataset, name), both.values(name)[0][:, part].copy(), both.values(name)[1])
            for name in names
        }
        write_features(tmp_path / f"{number}.arrow", own, data=both.data, encoders=[both.encoders[number]])
    train.main(argv(shards, tmp_path, "--features", str(made), name="one"))
    files = ["--features", str(tmp_path / "0.arrow"), "--features", str(tmp_path / "1.arrow")]
    train.main(argv(shards, tmp_path, *files, name="two"))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    data = ["--data", str(shards), "-j", "0"]
    predict.main(["--run", str(tmp_path / "one"), *data, *files])
    predict.main(["--run", str(tmp_path / "two"), *data, "--features", str(made)])
    one, two = (table(tmp_path / name / "predictions" / "test.csv") for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match="of 1 encoders, and the run was trained on 2"):
        predict.main(["--run", str(tmp_path / "one"), *data, *files[:2]])
    with pytest.raises(UserError, match=r"encoder 1 \(bert\) has another"):
        predict.main(["--run", str(tmp_path / "one"), *data, *files[2:], *files[:2]])


def test_a_neighbour_takes_the_place_of_a_bad_image(shards, made, tmp_path):
    file, dataset = FeatureFile(made), load_dataset(shards)
    index = open_index(dataset, "train")
    values, seen = (array.copy() for array in file.values("train"))
    seen[[3, 7]] = False
    parts = {"train": (index, values, seen), "val": (open_index(dataset, "val"), *file.values("val"))}
    write_features(tmp_path / "f.arrow", parts, data=file.data, encoders=file.encoders)
    told = ["--features", str(tmp_path / "f.arrow"), "--epochs", "1", "--log-samples", str(tmp_path / "s.jsonl")]
    flags = [text for text in argv(shards, tmp_path, *told) if text not in ("--max-steps", "4")]
    train.main(flags)
    drawn = {key for line in (tmp_path / "s.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]}
    assert not drawn & {index.key(3), index.key(7)} and len(drawn) > 30
    assert log_of(tmp_path / "run")[-2]["data/bad_samples"] == 2
    with pytest.raises(UserError, match="2 bad samples, --max-bad-samples allows 1"):
        train.main([*flags, "--experiment", "again", "--max-bad-samples", "1"])


def test_a_fold_and_a_rehearsal_in_workers(demo_csv, hub, tmp_path, capsys):
    csv, images = str(demo_csv / "train.csv"), str(demo_csv / "images")
    pack.main(["--csv", csv, "--images", images, "--folds", "3", "--out", str(tmp_path / "shards"), "-j", "1"])
    told = ["--model", "test_resnet", "--pretrained-path", str(hub / "resnet.safetensors"), "--img-size", "32"]
    made = tmp_path / "f.arrow"
    features.main(["--data", str(tmp_path / "shards"), "-j", "1", *told, "--split", "train", "--out", str(made)])
    flags = argv(tmp_path / "shards", tmp_path, "--features", str(made), "--fold", "1", "-j", "1")
    train.main([*flags, "--dry-run", "-b", "auto", "--global-batch-size", "8"])
    assert "dry run: all is well" in capsys.readouterr().err
    train.main(flags)
    fold = open_index(load_dataset(tmp_path / "shards"), "train").fold
    own, values = weights(tmp_path / "run" / "last"), FeatureFile(made).values("train")[0]
    np.testing.assert_allclose(own["mean"], values[fold != 1].mean(0), atol=1e-5)
    fold_1 = ["--split", "train", "--fold", "1", "-j", "1"]
    evaluate.main(
        ["--run", str(tmp_path / "run"), "--data", str(tmp_path / "shards"), "--features", str(made), *fold_1]
    )
    assert len(table(tmp_path / "run" / "predictions" / "train.csv")) == (fold == 1).sum()


@pytest.mark.distributed
@pytest.mark.parametrize("world", ["cpu2", "fsdp2", "zero2"])
def test_two_processes_learn_what_one_does(shards, made, tmp_path, world):
    found = {}
    for processes in (1, world):
        size = ["-b", "8" if processes == 1 else "4", "--mixup", "0.4", "--head", "mlp"]
        worlds.train(processes, argv(shards, tmp_path / str(processes), "--features", str(made), *size))
        found[processes] = losses(tmp_path / str(processes) / "run")
    np.testing.assert_allclose(found[world], found[1], rtol=1e-4)
    one, two = (weights(tmp_path / str(name) / "run" / "last") for name in (1, world))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "told, words",
    [
        (["--features", "nowhere.arrow"], "nowhere.arrow is no file of features .*No such file"),
        (["--features", "{shards}/train.arrow"], "train.arrow is no file of features .other metadata"),
        (["--features", "{train}"], "no split 'val'; it has: train; `mlc features --split train,val` makes all"),
        (
            ["--features", "{short}", "--val-split", ""],
            "no features for 70 of 100 samples of the split 'train', such as",
        ),
        (["--features", "{other}"], "was made from other data: fingerprint 0123"),
        (["--features", "{made}", "--model", "resnet18"], "--model is for models that see images"),
        (["--features", "{made}", "--text-model", "bigru"], "--text-model is for models that see images or captions"),
        (["--features", "{made}", "--aa", "trivial"], "--aa is for models that see"),
        (["--features", "{made}", "--head", "csra"], "--head csra looks at an image; with --features choose one"),
        (["--features", "{made}", "--head", "mlp", "--head-kwargs", "hiden=3"], "did you mean hidden"),
        (["--features", "{made}", "--experiment", ""], "--features needs --experiment NAME"),
        (["--features", "{made}", "--kd-teacher", "runs/a"], "--kd-teacher runs/a sees images; with --features give"),
        (["--features", "{made}", "--data", "{shards}", "--data", "{shards}"], "give one --data"),
        (["--feature-norm", "l2"], "--feature-norm l2 needs --features FILE"),
    ],
)
def test_mistakes_are_one_line(shards, made, tmp_path, told, words):
    file, index = FeatureFile(made), open_index(load_dataset(shards), "train")
    values, seen = file.values("train")
    some = type("Some", (), {"batch": index.batch.slice(0, 30), "__len__": lambda _: 30})()
    places = {"shards": shards, "made": made} | {
        name: tmp_path / f"{name}.arrow" for name in ("short", "other", "train")
    }
    whole, first = (index, values, seen), (some, values[:30], seen[:30])
    for name, rows, data in (("short", first, file.data), ("other", whole, "0123"), ("train", whole, file.data)):
        write_features(places[name], {"train": rows}, data=data, encoders=file.encoders)
    with pytest.raises(UserError, match=words) as caught:
        train.main(argv(shards, tmp_path, *(text.format(**places) for text in told)))
    assert "\n" not in str(caught.value)


def test_prediction_needs_the_same_features(shards, demo_csv, hub, made, tmp_path):
    train.main(argv(shards, tmp_path, "--features", str(made)))
    flags = ["--run", str(tmp_path / "run"), "-j", "0"]
    data = [*flags, "--data", str(shards)]
    for more, words in (
        (data, "trained on features of test_resnet and bert: give --features FILE"),
        ([*data, "--features", str(made), "--tta", "hflip"], "features have no views"),
        ([*flags, "--images", str(demo_csv / "images")], "a folder of images has none; pack it"),
    ):
        with pytest.raises(UserError, match=words):
            predict.main(more)
    with pytest.raises(UserError, match="this run was trained on features; take the encoders"):
        features.main(["--data", str(shards), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "f.arrow")])
