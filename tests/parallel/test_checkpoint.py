import copy
import json

import pytest
import torch
from torch import nn

from mlc.parallel import checkpoint
from shards.console import UserError


def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-2
    )
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained(0, 5)
    ema = copy.deepcopy(model)
    folder = tmp_path / "step-00000005"
    checkpoint.save(folder, {"progress": {"step": 5}}, model=model, optimizer=optimizer, ema=ema)
    other, other_optimizer = trained(1, 0)  # other weights, no optimizer state yet
    other_ema = copy.deepcopy(other)
    checkpoint.load(folder, model=other, optimizer=other_optimizer, ema=other_ema)
    advance(model, optimizer, 4)
    advance(other, other_optimizer, 4)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ema.state_dict().values(), other_ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert checkpoint.read_meta(folder)["progress"]["step"] == 5


def test_a_folder_without_meta_is_no_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}" / "meta.json").write_text(json.dumps({"progress": {"step": step}}))
    (folder / "step-00000040").mkdir()
    (folder / ".step-00000050.tmp").mkdir()
    assert checkpoint.find("auto", tmp_path).name == "step-00000030"
    assert checkpoint.find("", tmp_path) is None
    assert checkpoint.find(str(folder / "step-00000010"), tmp_path / "other").name == "step-00000010"
    assert checkpoint.find(str(tmp_path), tmp_path / "other").name == "step-00000030"
    checkpoint.prune(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030", "step-00000040"]


def test_nothing_to_resume_from(tmp_path):
    assert checkpoint.find("auto", tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.find(str(tmp_path / "typo"), tmp_path)


def test_another_model_is_refused_in_one_line(tmp_path):
    model, optimizer = trained(0, 1)
    checkpoint.save(tmp_path / "step-00000001", {}, model=model, optimizer=optimizer, ema=None)
    other = nn.Linear(4, 2)
    with pytest.raises(UserError) as error:
        checkpoint.load(
            tmp_path / "step-00000001", model=other, optimizer=torch.optim.AdamW(other.parameters()), ema=None
        )
    assert "does not fit this run" in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    model, optimizer = trained(0, 1)
    folder = tmp_path / "step-00000001"
    checkpoint.save(folder, {}, model=model, optimizer=optimizer, ema=None)
    for part in folder.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(folder, model=model, optimizer=optimizer, ema=None)
