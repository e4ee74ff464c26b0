"""Checkpoints of several processes: any world's by any other world, in the middle of an epoch."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from conftest import TINY, log_of
from safetensors.torch import load_file

from mlc.parallel import storage
from mlc.parallel.checkpoint import Saver
from shards.console import UserError

pytestmark = pytest.mark.distributed

STRATEGIES = ("ddp", "fsdp2")
WORLDS = (1, 2, 3)
GLOBAL = 12  # 1 x 12, 2 x 6, 3 x 4
CUT, LAST = 5, 7  # steps; an epoch of the 100 samples is 8.3
CHECKPOINT = Path("run", "checkpoints", f"step-{CUT:08d}")
ROUNDING = 1e-5  # largest relative difference of a loss: a sum over 12 samples is divided among the ranks


def argv(shards: Path, folder: Path, world: int, strategy: str, *more: str) -> list[str]:
    """No drop-path, which depends on the rank."""
    model = [text.replace("depths=[2,2]", "depths=[1,1]") for text in TINY]
    args = ["--data", str(shards), "--output", str(folder), "--experiment", "run", *model, "--drop-path", "0"]
    args += ["-b", str(GLOBAL // world), "-j", "0", "--global-batch-size", str(GLOBAL), "--max-steps", str(LAST)]
    args += ["--val-split", "", "--lr", "1e-3", "--clip-grad", "1", "--mixup", "0.2", "--log-interval", "1"]
    args += ["--model-ema-decay", "0.5", "--strategy", strategy, "--checkpoint-every", f"{CUT}st"]
    return [*args, "--log-samples", str(folder / "samples.jsonl"), *more]


def samples(folder: Path) -> list[dict]:
    """Keys of the global batches with a checksum of each augmented image, its partner and lambda."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str = "train/loss") -> list[float]:
    return [line[name] for line in log_of(folder / "run") if name in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The average, as it is exported."""
    return load_file(folder / "run" / "last" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> dict[tuple[str, int], Path]:
    """One run per strategy and world that was never cut; each leaves a checkpoint of step CUT."""
    folders = {}
    for strategy, world in itertools.product(STRATEGIES, WORLDS):
        folders[strategy, world] = folder = tmp_path_factory.mktemp(f"{strategy}-{world}-")
        worlds.train(world, argv(shards, folder, world, strategy))
    return folders


@pytest.mark.parametrize("before, after", itertools.product(WORLDS, WORLDS))
@pytest.mark.parametrize("then, now", itertools.product(STRATEGIES, STRATEGIES))
def test_every_worlds_checkpoint_goes_on_in_every_world(shards, straight, tmp_path, then, now, before, after):
    """The same samples, seen the same way, and the same losses: bit for bit in the same world.

    Under DDP in three processes that is the next loss: after its first step DDP puts the gradients into other buckets,
    and the order in which three numbers are added depends on their place in one.
    """
    source, target = straight[then, before], straight[now, after]
    worlds.train(after, argv(shards, tmp_path, after, now, "--resume", str(source / CHECKPOINT)))
    assert samples(tmp_path) == samples(straight["ddp", 1])[CUT:]
    assert len(set(losses(target))) == LAST
    assert losses(tmp_path) == pytest.approx(losses(target)[CUT:], rel=ROUNDING, abs=0)
    same = (then, before) == (now, after)
    assert not same or losses(tmp_path)[0] == losses(target)[CUT]
    exact = same and (now, after) != ("ddp", 3)
    assert not exact or losses(tmp_path) == losses(target)[CUT:]
    mine, theirs = weights(tmp_path), weights(target)
    assert mine.keys() == theirs.keys()
    for name in mine:
        rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(mine[name], theirs[name], **rounding, msg=lambda m, n=name: f"{n}: {m}")


def member(rank: int, folder: Path) -> None:
    """Two processes: the disk of the second is full at step 2, the folder of the first is none at step 4."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    lines, begin = [], storage.begin

    def begin_full(building):
        begin(building)
        (building / "__1_0.distcp").symlink_to("/dev/full")

    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "ema": None}
    saver = Saver(folder / "checkpoints", keep=1, background=True, say=lines.append)
    saver.save(1, {}, **state)
    saver._wait()
    storage.begin = begin_full
    saver.save(2, {}, **state)
    saver._wait()
    storage.begin = begin
    assert [storage.step_of(path) for path in storage.complete(saver.root)] == [1]
    saver.save(3, {}, **state)
    saver.finish()
    saver.root = folder / "meeting"
    saver.save(4, {}, **state)
    try:
        saver.finish()
    except UserError as error:
        lines.append(str(error))
    (folder / f"lines-{rank}.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


def test_the_ranks_agree_on_what_failed(tmp_path):
    torch.multiprocessing.spawn(member, (tmp_path,), nprocs=2)
    one, other = (json.loads((tmp_path / f"lines-{rank}.json").read_text()) for rank in (0, 1))
    lines = [line for line in one if not line.startswith("waited")]
    assert lines == [line for line in other if not line.startswith("waited")] and len(lines) == 3
    assert "step 2 could not be written: rank 1: OSError: [Errno 28] No space left" in lines[0]
    assert "step 4 could not be written" in lines[1] and "the last checkpoint, of step 4" in lines[2]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-00000003" and storage.damage(folder) == ""


@pytest.mark.parametrize("world", WORLDS)
def test_the_ranks_write_alike(straight, world):
    folder = straight["ddp", world] / CHECKPOINT
    written = [path.stat().st_size for path in folder.glob("*.distcp")]
    assert len(written) == world and max(written) < 1.2 * min(written)
    assert storage.damage(folder) == ""
