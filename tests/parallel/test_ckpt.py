"""`mlc ckpt` on the checkpoints of a real run."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, log_of
from safetensors.torch import load_file

from mlc import train
from mlc.ckpt import main
from mlc.parallel import checkpoint
from shards.console import run as run_verb


@pytest.fixture(scope="module", params=["linear", "extra_linear"])
def made(request, shards, tmp_path_factory) -> Path:
    """Three steps, three checkpoints, one evaluation after the second and one at the end."""
    folder = tmp_path_factory.mktemp(request.param)
    args = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-b", "8", "-j", "0", "--lr", "1e-2"]
    args += ["--head", request.param, "--eval-every", "2st", "--checkpoint-every", "1st", "--checkpoint-hist", "3"]
    assert train.main([*TINY, *args, "--max-steps", "3", "--log-interval", "1"]) == 0
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000003"


def test_ls(run, capsys):
    (run / "checkpoints" / ".step-00000004.tmp").mkdir()
    (run / "checkpoints" / "step-00000001" / "__0_0.distcp").unlink()
    assert run_verb(main, ["ls", str(run), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 4 and "incomplete" in rows[".step-00000004.tmp"]["state"]
    assert rows["step-00000001"]["state"] == "damaged: __0_0.distcp is missing"
    second, third = rows["step-00000002"], rows["step-00000003"]
    values = [line["val_ema/f1_samples@tuned"] for line in log_of(run) if "val_ema/loss" in line]
    assert f"val_ema {values[0]:.4f}" in second["evaluation"] and f"val_ema {values[1]:.4f}" in third["evaluation"]
    assert third["epoch"] == log_of(run)[-1]["epoch"] and third["bytes"] > 100_000 and third["written"][:2] == "20"
    assert run_verb(main, ["ls", str(run)]) == 0
    assert "step-00000003" in capsys.readouterr().out


def test_show(run, capsys):
    assert run_verb(main, ["show", str(run)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoint"] == str(newest(run)) and shown["progress"]["step"] == 3
    weights = load_file(run / "last" / "model.safetensors")
    if shown["config"]["head"] == "linear":
        assert shown["model"].startswith(f"{len(weights)} tensors, {sum(t.nbytes for t in weights.values()) / 1e6:.1f}")


def test_verify(run, capsys):
    assert run_verb(main, ["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": sound, ") == 3
    file = newest(run) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run_verb(main, ["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count(": sound, ") == 2 and "step-00000003: DAMAGED: __0_0.distcp is not what was written" in out
    assert run_verb(main, ["verify", str(newest(run).with_name("step-00000002"))]) == 0


def test_verify_loads_what_has_no_checksums(run, capsys):
    meta = json.loads((newest(run) / "meta.json").read_text())
    del meta["files"]
    (newest(run) / "meta.json").write_text(json.dumps(meta))
    file = newest(run) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])
    assert run_verb(main, ["verify", str(newest(run))]) == 1
    assert "DAMAGED" in capsys.readouterr().out


@pytest.mark.parametrize("group", [1, checkpoint.GROUP])
def test_the_average_is_exported_as_the_run_exports_it(run, tmp_path, monkeypatch, group):
    """`last/` holds the average; tensor by tensor or all at once, the files are the same."""
    monkeypatch.setattr(checkpoint, "GROUP", group)
    sizes, read = [], checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda folder, state: (sizes.append(len(state)), read(folder, state)))
    assert run_verb(main, ["export", str(run), str(tmp_path / "out"), "--ema"]) == 0
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "last"))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype
    assert (tmp_path / "out" / "config.json").read_text() == (run / "last" / "config.json").read_text()
    assert group > 1 or max(sizes) == 1


def test_the_weights_are_exported_and_plain_timm_loads_them(run, tmp_path):
    assert run_verb(main, ["export", str(newest(run)), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    averaged = load_file(run / "last" / "model.safetensors")
    assert any(not torch.equal(weights[name], averaged[name]) for name in weights)
    own = dict(checkpoint.read_tensors(newest(run), ["model.patch_embed.proj.weight"]))
    assert torch.equal(weights["patch_embed.proj.weight"], own["model.patch_embed.proj.weight"])
    best = json.loads((run / "best" / "thresholds.json").read_text())
    assert json.loads((tmp_path / "out" / "thresholds.json").read_text())["global"] == best["global"]


def test_prune(run, capsys):
    assert run_verb(main, ["prune", str(run), "--keep", "1"]) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert capsys.readouterr().out.count("deleted ") == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["ls", "nowhere"], "nowhere: no checkpoints there"),
        (["show", "nowhere"], "nowhere: no complete checkpoint there"),
        (["verify", "nowhere"], "no complete checkpoint"),
        (["export", "nowhere", "out"], "no complete checkpoint"),
        (["prune", "nowhere", "--keep", "0"], "--keep must be at least 1"),
        (["prune", "nowhere", "--keep", "1"], "no checkpoints there"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert run_verb(main, argv) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert words in message
