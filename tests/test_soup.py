"""`mlc soup`: the mean is the mean, the greedy one leaves garbage out, and what comes out is a model like any other."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from mlc import features, soup, train
from mlc.ckpt import export_weights
from mlc.predict import main as predict
from mlc.resume import at_path
from shards.console import UserError
from shards.console import run as run_verb


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of eight steps with two checkpoints that differ."""
    folder = tmp_path_factory.mktemp("soup")
    short = [
        "--data",
        str(shards),
        "--output",
        str(folder),
        "--experiment",
        "run",
        "-b",
        "8",
        "-j",
        "0",
        "--lr",
        "1e-2",
    ]
    assert train.main([*TINY, *short, "--max-steps", "8", "--checkpoint-every", "4st", "--head-bias", "prior"]) == 0
    return folder / "run"


def changed(source: Path, folder: Path, change) -> Path:
    """A copy of exported weights with every tensor changed."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def noisy(seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    return lambda name, tensor: tensor + scale * torch.randn(tensor.shape, generator=generator)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_uniform_is_the_arithmetic_mean_of_every_tensor(trained, tmp_path, capsys):
    folders = [changed(trained / "best", tmp_path / str(seed), noisy(seed, 0.1)) for seed in range(3)]
    for number, folder in enumerate(folders):
        (folder / "thresholds.json").write_text(json.dumps({"metric": "f1_samples", "global": 0.1 * (number + 1)}))
    assert run_verb(soup.main, [*map(str, folders), "--out", str(tmp_path / "soup")]) == 0
    found, parts = weights(tmp_path / "soup"), list(map(weights, folders))
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).mean(0), rtol=0, atol=1e-6)
    assert "soup of 3 of 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "soup" / "thresholds.json").read_text())["global"] == pytest.approx(0.2)
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["mlc"]["soup"] == list(map(str, folders))


def test_numbers_that_are_no_weights_are_the_first_ones(tmp_path):
    for name, count, mean in (("a", 10, 1.0), ("b", 21, 2.0)):
        (tmp_path / name).mkdir()
        state = {"bn.num_batches_tracked": torch.tensor(count), "bn.running_mean": torch.tensor([mean])}
        state |= {"half": torch.tensor([65000.0]).half(), "mask": torch.tensor([count == 10])}
        save_file(state, tmp_path / name / "model.safetensors")
    mixed = soup.average([tmp_path / "a", tmp_path / "b"])
    assert mixed["bn.num_batches_tracked"].item() == 10 and mixed["mask"].item() is True
    assert mixed["bn.running_mean"].item() == 1.5
    assert mixed["half"].dtype == torch.float16 and mixed["half"].item() == 64992  # no overflow on the way


def test_greedy_leaves_garbage_out_and_the_soup_predicts(trained, shards, tmp_path, capsys):
    near = changed(trained / "best", tmp_path / "near", noisy(0, 1e-7))
    garbage = changed(trained / "best", tmp_path / "garbage", noisy(1, 30.0))
    argv = [str(garbage), str(trained), str(near), "--out", str(tmp_path / "soup"), "--data", str(shards), "-j", "0"]
    assert run_verb(soup.main, [*argv, "--greedy", "--metric", "map"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and "the best one" in said[0] and " stays" in said[1]
    assert said[2].startswith(f"{garbage}: map ") and "left out: with it" in said[2]
    assert "soup of 2 of 3" in said[3]
    for name, tensor in weights(tmp_path / "soup").items():
        torch.testing.assert_close(tensor, weights(trained / "best")[name], rtol=0, atol=1e-6)
    tuned = json.loads((tmp_path / "soup" / "thresholds.json").read_text())
    own = json.loads((trained / "best" / "thresholds.json").read_text())
    assert tuned["global"] == pytest.approx(own["global"], abs=1e-3)
    predict(["--run", str(tmp_path / "soup"), "--data", str(shards), "--split", "test", "-j", "0"])
    assert (tmp_path / "soup" / "predictions" / "test-submission.csv").exists()
    timm.create_model(f"local-dir:{tmp_path / 'soup'}", pretrained=True)


def test_greedy_keeps_what_does_not_lower_the_score(monkeypatch, capsys):
    """Against the published algorithm written out on numbers: a model is its own number, the score is -|mean - 1|."""
    numbers = {"a": 1.4, "b": 0.8, "c": -3.0, "d": 1.2, "e": 0.9}
    monkeypatch.setattr(soup, "average", lambda values: sum(values) / len(values))
    own = {name: -abs(value - 1) for name, value in numbers.items()}
    kept = soup.greedy(numbers, own, lambda value: {"map": -abs(value - 1)}, "map")
    # e 0.90 | b (0.8): mean 0.85 out | d (1.2): mean 1.05, better, in | a: 1.167 out | c: out
    assert kept == ["e", "d"]
    assert "a: map -0.4000, left out: with it -0.0500 -> -0.1667" in capsys.readouterr().out


@pytest.mark.parametrize("ema", [False, True])
def test_the_last_checkpoints_of_a_run(trained, tmp_path, ema):
    out = tmp_path / "soup"
    more = ["--weights", "ema"] if ema else []
    assert run_verb(soup.main, [str(trained), "--checkpoints", "2", "--out", str(out), *more]) == 0
    parts = []
    for number, place in enumerate(at_path(str(trained))):
        export_weights(place, tmp_path / str(number), ema=ema)
        parts.append(weights(tmp_path / str(number)))
    assert len(parts) == 2 and any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    for name, tensor in weights(out).items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2, rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["mlc"]["soup"] == ["step-00000008", "step-00000004"]


def other_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_classes_or_models_are_refused(trained, tmp_path, capsys):
    classes = changed(trained / "best", tmp_path / "classes", lambda name, tensor: tensor)
    names = json.loads((classes / "config.json").read_text())["label_names"]
    other_config(classes, label_names=names[::-1])
    small = tmp_path / "small"
    model = timm.create_model("resnet10t", num_classes=len(names))
    small.mkdir()
    save_file(model.state_dict(), small / "model.safetensors")
    shutil.copy(trained / "best" / "config.json", small)
    other_config(small, architecture="resnet10t", model_args={})
    for folder, words in ((classes, "has other classes as"), (small, "has resnet10t, not swinv2")):
        assert run_verb(soup.main, [str(trained), str(folder), "--out", str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "at least two different models"),
        (["--greedy"], "--greedy needs --data"),
        (["--checkpoints", "1"], "the last N >= 2 checkpoints of one run"),
        (["--checkpoints", "5"], "has 2 complete checkpoints, not 5; --checkpoint-hist"),
        (["--checkpoints", "2", "--weights", "best"], "--weights best is no part of a checkpoint"),
        (["--metric", "f1"], "--metric f1 is not measured; choose one of map, "),
    ],
)
def test_a_mistake_is_one_line(more, said, trained, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        soup.main([str(trained), "--out", str(tmp_path / "o"), *more])
    assert "\n" not in str(caught.value) and not (tmp_path / "o").exists()


def test_the_soup_does_not_overwrite_an_ingredient(trained, tmp_path):
    other = changed(trained / "best", tmp_path / "other", noisy(0, 0.1))
    with pytest.raises(UserError, match="is one of the models"):
        soup.main([str(trained), str(other), "--out", str(other)])


def modes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_of_a_run_and_of_what_follows_has_the_mode_of_the_umask(trained, shards, tmp_path, umask):
    """A colleague, or a web server, reads them."""
    before = os.umask(umask)
    try:
        data = ["--data", str(shards), "-j", "0"]
        predict(["--run", str(trained), *data, "--split", "test", "--out", str(tmp_path / "predictions")])
        export_weights(at_path(str(trained))[0], tmp_path / "exported", ema=False)
        soup.main([*[str(trained / which) for which in ("best", "last")], "--out", str(tmp_path / "soup")])
        features.main(["--run", str(trained), *data, "--split", "test", "--out", str(tmp_path / "f.arrow")])
    finally:
        os.umask(before)
    written = modes(tmp_path)
    assert {"predictions/test.csv", "exported/model.safetensors", "soup/model.safetensors"} <= written.keys()
    wrong = {name: mode for name, mode in written.items() if int(mode, 8) not in (0o666 & ~umask, 0o777 & ~umask)}
    assert not wrong
    of_the_run = {
        name: mode for name, mode in (modes(trained) | modes(shards)).items() if mode not in ("0o644", "0o755")
    }
    assert before != 0o022 or not of_the_run
