"""Checkpoints of several processes: any world's by any other world, in the middle of an epoch."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, environment, log_of

from mlc.parallel import storage
from mlc.parallel.checkpoint import Saver
from shards.console import UserError

pytestmark = pytest.mark.distributed

STRATEGIES = {"ddp": []}  # name -> the flags that choose it
WORLDS = (1, 2, 3)
GLOBAL = 12  # 1 x 12, 2 x 6, 3 x 4
CUT, LAST = 5, 7  # steps; an epoch of the 100 samples is 8.3


def argv(shards: Path, folder: Path, world: int, last: int, *more: str) -> list[str]:
    """No drop-path, which depends on the rank; a rate that does not depend on the length of the run."""
    args = ["--data", str(shards), "--output", str(folder), "--experiment", "run", *TINY, "--drop-path", "0"]
    args += ["-b", str(GLOBAL // world), "-j", "0", "--global-batch-size", str(GLOBAL), "--max-steps", str(last)]
    args += ["--val-split", "", "--sched", "constant", "--lr", "1e-3", "--clip-grad", "1", "--log-interval", "1"]
    return [*args, "--log-samples", str(folder / "samples.jsonl"), *more]


def run_worlds(*worlds: tuple[int, list[str]]) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "worlds.py")],
        input=json.dumps(worlds),
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in log_of(folder / "run")]


@pytest.fixture(scope="module")
def cut(shards, tmp_path_factory) -> Path:
    """A run that was never cut, and one per strategy and world that was, at step CUT."""
    root = tmp_path_factory.mktemp("worlds")
    ends = [(1, argv(shards, root / "reference", 1, LAST))]
    for (name, flags), world in itertools.product(STRATEGIES.items(), WORLDS):
        ends.append((world, argv(shards, root / f"{name}-{world}", world, CUT, *flags)))
    run_worlds(*ends)
    return root


@pytest.mark.parametrize("then, now", itertools.product(STRATEGIES, STRATEGIES))
def test_every_worlds_checkpoint_goes_on_in_every_world(shards, cut, tmp_path, then, now):
    cells = list(itertools.product(WORLDS, WORLDS))
    made = {
        (before, after): (cut / f"{then}-{before}" / "run", tmp_path / f"{before}-{after}") for before, after in cells
    }
    run_worlds(
        *(
            (after, argv(shards, folder, after, LAST, *STRATEGIES[now], "--resume", str(checkpoint)))
            for (_, after), (checkpoint, folder) in made.items()
        )
    )
    expected, straight = samples(cut / "reference"), losses(cut / "reference")
    assert len(set(straight)) == LAST
    for (before, after), (_, folder) in made.items():
        assert samples(folder) == expected[CUT:], f"{before} -> {after}"
        assert losses(folder) == pytest.approx(straight[CUT:], rel=1e-5), f"{before} -> {after}"


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
def test_the_ranks_write_alike(cut, world):
    folder = cut / f"ddp-{world}" / "run" / "checkpoints" / f"step-{CUT:08d}"
    written = [path.stat().st_size for path in folder.glob("*.distcp")]
    assert len(written) == world and max(written) < 1.2 * min(written)
    assert storage.damage(folder) == ""
