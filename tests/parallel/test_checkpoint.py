import copy
import errno
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from mlc import ckpt
from mlc.parallel import checkpoint, storage
from mlc.parallel.checkpoint import Saver
from shards.console import UserError


def trained(seed: int, steps: int) -> dict:
    """A model with normalisation, an optimizer with two groups, an average."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-2
    )
    advance(model, optimizer, steps)
    return {"model": model, "optimizer": optimizer, "ema": copy.deepcopy(model)}


def advance(model, optimizer, steps, **_):
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module):
    for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path, lines):
    return Saver(tmp_path / "checkpoints", keep=2, background=True, say=lines.append)


def saved(root: Path, step: int = 1, keep: int = 2, **state) -> Path:
    writer = Saver(root, keep=keep, background=False, say=print)
    writer.save(step, {"progress": {"step": step}}, **(state or trained(0, 1)))
    writer.finish()
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    return [storage.step_of(folder) for folder in storage.complete(root)]


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, background):
    run, meta = trained(0, 5), {"progress": {"step": 5}}
    saver = Saver(tmp_path, keep=1, background=background, say=print)
    saver.save(5, meta, **run)
    meta["progress"]["step"] = 6  # the loop goes on
    saver.finish()
    other = trained(1, 0)  # other weights, no optimizer state yet
    folder = tmp_path / "step-00000005"
    checkpoint.load(folder, **other)
    advance(**run, steps=4)
    advance(**other, steps=4)
    assert_same(run["model"], other["model"])
    assert_same(run["ema"], other["ema"])
    assert storage.read_meta(folder)["progress"]["step"] == 5
    assert not storage.damage(folder) and not list(tmp_path.glob(".*"))


def test_what_is_written_is_the_moment_of_the_save(tmp_path, saver, monkeypatch):
    """Nothing has reached the disk when the loop changes the tensors."""
    go, begin = threading.Event(), storage.begin
    monkeypatch.setattr(storage, "begin", lambda building: (go.wait(10), begin(building)))
    run = trained(0, 5)
    before = copy.deepcopy(run["model"])
    saver.save(5, {}, **run)
    advance(**run, steps=3)
    assert not steps(saver.root)
    go.set()
    saver.finish()
    other = trained(1, 0)
    checkpoint.load(saver.root / "step-00000005", **other)
    assert_same(before, other["model"])
    assert not torch.equal(before[0].weight, run["model"][0].weight)


def test_the_next_save_waits_for_the_one_in_flight_and_says_so(saver, lines, monkeypatch):
    go, begin, writing = threading.Event(), storage.begin, []

    def slow(building):
        writing.append(building.name)
        assert go.wait(10)
        begin(building)

    monkeypatch.setattr(storage, "begin", slow)
    run = trained(0, 1)
    saver.save(1, {}, **run)
    threading.Timer(0.3, go.set).start()
    saver.save(2, {}, **run)
    assert steps(saver.root)[0] == 1 and writing[0] == ".step-00000001.tmp"
    saver.finish()
    assert steps(saver.root) == [1, 2]
    assert len(lines) == 1 and "for the checkpoint of step 1 to be written" in lines[0]
    seconds = saver.take_seconds()
    assert seconds["ckpt/blocked_s"] > 0.2 and seconds["ckpt/write_s"] > 0 and saver.take_seconds() == {}


def test_a_failure_that_one_rank_has_for_itself_ends_the_run(saver, lines, monkeypatch):
    """The others wait for it within a collective: going on would leave them there."""
    monkeypatch.setattr(storage, "writer", lambda *_, **__: 1 / 0)
    saver.save(1, {}, **trained(0, 1))
    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert not lines and not steps(saver.root)


def test_weight_decay_and_learning_rate_are_those_of_the_new_settings(tmp_path):
    folder = saved(tmp_path, **trained(0, 2))
    other = trained(1, 0)
    for group in other["optimizer"].param_groups:
        group["lr"], group["weight_decay"] = 0.5, 0.25
    checkpoint.load(folder, **other)
    assert [(g["lr"], g["weight_decay"]) for g in other["optimizer"].param_groups] == [(0.5, 0.25)] * 2
    assert all("exp_avg" in state for state in other["optimizer"].state.values())


@pytest.mark.parametrize("averaged", [True, False])
def test_only_the_weights(tmp_path, averaged):
    run = trained(0, 3)
    advance(run["model"], run["optimizer"], 2)
    folder = saved(tmp_path, **run | ({} if averaged else {"ema": None}))
    other = trained(1, 0)
    checkpoint.load_weights(folder, model=other["model"], ema=other["ema"])
    assert_same(run["model"], other["model"])
    assert_same(run["ema"] if averaged else run["model"], other["ema"])
    assert not other["optimizer"].state


def test_another_model_is_refused_in_one_line(tmp_path):
    folder, other = saved(tmp_path), nn.Linear(4, 2)
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, model=other, optimizer=torch.optim.AdamW(other.parameters()), ema=None)
    assert "does not fit this run" in str(error.value) and "\n" not in str(error.value)


# ---- each rank its part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_tensor_is_written_once_and_the_ranks_write_alike(world):
    state = {"model": {f"layer.{i}": torch.zeros(i * 7 % 50 + 1, 16) for i in range(60)}, "ema": {}}
    parts = [checkpoint.share(state, rank, world)["model"] for rank in range(world)]
    assert sorted(name for part in parts for name in part) == sorted(state["model"])
    written = [sum(t.nbytes for t in part.values()) for part in parts]
    assert max(written) < 1.05 * min(written)
    assert all(part[name] is state["model"][name] for part in parts for name in part)  # no copy


# ---- failures --------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch):
    """The first file of each checkpoint lies on a device that is full."""
    begin = storage.begin

    def begin_full(building):
        begin(building)
        (building / "__0_0.distcp").symlink_to("/dev/full")

    monkeypatch.setattr(storage, "begin", begin_full)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_a_line_and_the_next_interval_tries_again(tmp_path, lines, background, monkeypatch):
    saver = Saver(tmp_path, keep=1, background=background, say=lines.append)
    saver.save(1, {}, **trained(0, 1))
    saver._wait()
    with monkeypatch.context() as patch:
        full_disk(patch)
        saver.save(2, {}, **trained(0, 2))
        saver._wait()
    assert steps(tmp_path) == [1] and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert "step 2 could not be written" in lines[0] and os.strerror(errno.ENOSPC) in lines[0]
    saver.save(3, {}, **trained(0, 3))
    saver.finish()
    assert steps(tmp_path) == [3] and not storage.damage(tmp_path / "step-00000003")


def test_the_last_checkpoint_must_be_written(tmp_path, lines):
    (tmp_path / "file").touch()
    saver = Saver(tmp_path / "file" / "checkpoints", keep=1, background=True, say=lines.append)
    saver.save(7, {}, **trained(0, 1))
    with pytest.raises(UserError, match=r"the last checkpoint, of step 7, could not be written to .*--resume auto"):
        saver.finish()
    assert len(lines) == 1


# ---- finding, damage, deleting ---------------------------------------------------------------------------------------


def test_a_folder_without_meta_is_no_checkpoint(tmp_path):
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "meta.json").write_text(json.dumps({"progress": {"step": step}}))
    (tmp_path / "step-00000040").mkdir()
    (tmp_path / ".step-00000050.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [10, 20, 30]
    assert [folder.name for folder in storage.prune(tmp_path, keep=2)] == ["step-00000010"]
    assert len(list(tmp_path.iterdir())) == 5  # what another process may be writing stays
    storage.tidy(tmp_path, newest=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000020"]


def test_old_ones_go_only_after_a_newer_one_is_complete(tmp_path, saver, monkeypatch):
    seen, publish = [], storage.publish

    def watched(*args):
        seen.append(steps(saver.root))
        publish(*args)

    monkeypatch.setattr(storage, "publish", watched)
    for step in (1, 2, 3, 4):
        saver.save(step, {}, **trained(0, 1))
    saver.finish()
    assert seen == [[], [1], [1, 2], [2, 3]] and steps(saver.root) == [3, 4]


def test_a_run_that_goes_on_from_an_older_checkpoint_gives_up_the_newer_ones(tmp_path):
    for step in (10, 20, 30):
        saved(tmp_path, step, keep=3)
    saved(tmp_path, 15, keep=3)
    assert steps(tmp_path) == [10, 15]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_found(tmp_path, name):
    folder = saved(tmp_path)
    assert storage.damage(folder) == ""
    file, whole = folder / name, (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    file.write_bytes(flipped)
    assert storage.damage(folder) == f"{name} is not what was written (its sha256 differs)"
    assert storage.damage(folder, contents=False) == ""
    file.write_bytes(whole[:100])
    assert storage.damage(folder) == f"{name} has 100 bytes instead of {len(whole)}"
    file.unlink()
    assert storage.damage(folder) == f"{name} is missing"


def test_several_processes_share_the_reading(tmp_path):
    folder = saved(tmp_path)
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(len(file.read_bytes())))
    found = [storage.damage(folder, part=part, parts=3) for part in range(3)]
    assert sum(map(bool, found)) == 1


@pytest.mark.parametrize("keep", [0, 100, -7])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, keep):
    run = trained(0, 1)
    folder = saved(tmp_path, **run)
    for name in ("__0_0.distcp", ".metadata"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:keep])
        with pytest.raises(UserError, match="damaged") as error:
            checkpoint.load(folder, **run)
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(whole)
    (folder / "meta.json").write_text("{")
    assert "meta.json is missing or damaged" in storage.damage(folder)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    run = trained(0, 1)
    folder = saved(tmp_path / "checkpoints", **run)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="no business with"):
        checkpoint.load(folder, **run)
    assert not (tmp_path / "run").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "run").exists()  # it would have been


# ---- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch) -> str:
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "an-id"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield "s3://runs/mine"
    server.stop()


def test_s3(bucket, lines, monkeypatch):
    root = storage.place(bucket)
    saver = Saver(root, keep=2, background=True, say=lines.append)
    run = trained(0, 3)
    for step in (1, 2, 3):
        saver.save(step, {"config": {"eval_metric": "map"}}, **run)
    saver.finish()
    assert steps(root) == [2, 3] and all(line.startswith("waited") for line in lines)
    folder = storage.complete(root)[-1]
    assert folder == f"{bucket}/step-00000003" and storage.damage(folder) == ""
    other = trained(1, 0)
    checkpoint.load(folder, **other)
    assert_same(run["model"], other["model"])
    assert ckpt.main(["verify", bucket]) == 0 and ckpt.main(["ls", bucket]) is None
    monkeypatch.setattr(storage, "publish", lambda *_: (_ for _ in ()).throw(OSError("cut")))  # before meta.json
    saver.save(4, {}, **run)
    with pytest.raises(UserError, match="cut"):
        saver.finish()
    assert steps(root) == [2, 3] and "step-00000004" not in storage.names(root)


def test_urls_that_cannot_be_used():
    with pytest.raises(UserError, match="unknown kind of URL"):
        storage.place("s4://bucket/runs")
    with pytest.raises(UserError, match="no user, password") as error:
        storage.place("s3://me:hunter2@bucket/runs")
    assert "hunter2" not in str(error.value)
