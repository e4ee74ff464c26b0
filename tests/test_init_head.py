"""`--init-head`: the classifier begins as the head that was trained on the frozen features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from caption_runs import table, weights
from safetensors.torch import save_file

from mlc import features, predict, train
from mlc.models.build import build_model
from mlc.models.init_head import init_head
from shards.console import UserError
from shards.dataset import load_dataset


def backbone(folder: Path, seed: int = 1, name: str = "test_resnet") -> list[str]:
    torch.manual_seed(seed)
    file = folder / f"{name}-{seed}.safetensors"
    save_file(build_model(name=name, num_classes=7).state_dict(), file)
    return ["--model", name, "--pretrained-path", str(file), "--img-size", "32"]


def probe(shards, folder: Path, flags: list[str], *more: str) -> Path:
    """A run on the features of this backbone."""
    data = ["--data", str(shards), "-j", "0"]
    features.main([*data, *flags, "--split", "train,val", "--out", str(folder / "f.arrow")])
    how = ["--output", str(folder), "--experiment", "probe", "-b", "8", "--max-steps", "6", "--lr", "1e-2"]
    train.main([*data, *how, "--features", str(folder / "f.arrow"), "--head-bias", "prior", *more])
    return folder / "probe"


@pytest.mark.parametrize("norm", ["standardize", "none"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_untrained_network_answers_as_the_head_does(shards, tmp_path, norm, name):
    flags = backbone(tmp_path, name=name)
    if name == "test_vit":
        flags[-1] = "160"
    head = probe(shards, tmp_path, flags, "--feature-norm", norm)
    fine = [*flags, "--init-head", str(head), "--lr", "1e-12", "--freeze", "backbone", "--val-crop", "squish"]
    data = ["--data", str(shards), "-j", "0"]
    train.main([*data, *fine, "--output", str(tmp_path), "--experiment", "fine", "-b", "8", "--max-steps", "1"])
    for run, more in ((head, ["--features", str(tmp_path / "f.arrow")]), (tmp_path / "fine", [])):
        told = ["--run", str(run), *data, *more, "--split", "val"]
        predict.main(told)
    got, wanted = (table(run / "predictions" / "val.csv") for run in (tmp_path / "fine", head))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.ptp(wanted, axis=0).max() > 0.01


def test_classes_go_by_their_names(shards, tmp_path):
    flags = backbone(tmp_path)
    head = probe(shards, tmp_path, flags)
    classes = load_dataset(str(shards)).classes
    model = build_model(name="test_resnet", num_classes=2, pretrained_path=flags[3])
    init_head(model, head, [classes[3], classes[1]])
    both = weights(head / "best")
    weight = (both["classifier.weight"] / both["std"])[[3, 1]]
    torch.testing.assert_close(model.fc.weight, weight)
    torch.testing.assert_close(model.fc.bias, both["classifier.bias"][[3, 1]] - weight @ both["mean"])


def test_mistakes_are_one_line(shards, tmp_path):
    flags = backbone(tmp_path)
    head = probe(shards, tmp_path, flags)
    classes = load_dataset(str(shards)).classes
    model = build_model(name="test_resnet", num_classes=len(classes), pretrained_path=flags[3])
    with pytest.raises(UserError, match="no class 'unicorn'"):
        init_head(model, head, [*classes[1:], "unicorn"])
    other = build_model(name="test_resnet", num_classes=len(classes), pretrained_path=backbone(tmp_path, seed=2)[3])
    with pytest.raises(UserError, match="with other weights than this model"):
        init_head(other, head, classes)
    with pytest.raises(UserError, match="--init-head starts the classifier"):
        train.main(["--data", str(shards), *flags, "--init-head", str(head), "--head", "mlp"])
    (tmp_path / "l2").mkdir()
    l2 = probe(shards, tmp_path / "l2", flags, "--feature-norm", "l2")
    with pytest.raises(UserError, match="without l2"):
        init_head(model, l2, classes)
    image = tmp_path / "image"
    data = ["--data", str(shards), "-j", "0", "--output", str(tmp_path), "--experiment", "image", "-b", "8"]
    train.main([*data, *flags, "--max-steps", "1"])
    with pytest.raises(UserError, match="not a run of `mlc train --features`"):
        init_head(model, image, classes)
