"""Each kind of fault, each at another moment of a run of two processes; benchmarks/faults.py draws them at random."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from injector import FAULTS, MOMENTS, TIMES, cells
from processes import PATIENCE

pytestmark = pytest.mark.distributed

# (fault, moment, rank, time of the moment): exit codes; words of the last line of one of the ranks
DOZEN = {
    ("kill -9", "publishing", 0, 2): ([-9, 1], "another process failed"),
    ("SIGTERM", "writing", 1, 2): ([0, 0], "stopped at step"),
    ("SIGSTOP", "optimizer step", 0, 5): ([0, 0], "done; weights in"),
    ("exception", "exporting", 0, 3): ([1, 1], "RuntimeError: injected"),
    ("NaN", "forward", 0, 7): ([2, 2], "step 7: the gradient is nan"),
    ("dies while others wait", "evaluation", 1, 2): ([1, 1], "another process failed"),
    ("disk full", "staging", 0, 4): ([2, 2], "the last checkpoint, of step 12, could not be written"),
    ("read-only folder", "forward", 0, 8): ([2, 2], "the last checkpoint, of step 12, could not be written"),
    ("slow disk", "writing", 0, 1): ([0, 0], "done; weights in"),
    ("corrupted newest", "backward", 1, 12): ([1, -9], "another process failed"),
    ("shard disappears", "data wait", 0, 2): ([2, 2], "cannot be read"),
    ("reader killed", "prediction", 1, 2): ([1, 2], "a process that reads images ended"),
}


@pytest.fixture(scope="module")
def trials() -> dict[tuple, dict]:
    """{fault: what came of it}; the processes are forked in one that has done nothing else."""
    names = ("fault", "moment", "rank", "at")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "trials.py"), "1"],
        input=json.dumps([dict(zip(names, fault, strict=True)) for fault in DOZEN]),
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE * len(DOZEN),
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(DOZEN), done.stderr[-3000:]
    return {tuple(trial[name] for name in names): trial for trial in found}


@pytest.mark.parametrize("fault", DOZEN, ids=lambda fault: "-".join(map(str, fault[:2])).replace(" ", "_"))
def test_a_fault_costs_nothing_but_time(trials, fault):
    """`problem` names what was half-written, hung, said nothing clear, or differs from the run without a fault."""
    trial, (codes, words) = trials[fault], DOZEN[fault]
    assert trial["problem"] == ""
    assert trial["codes"] == codes, trial
    assert any(words in last for last in trial["last"]), trial
    assert trial["resumes"] == ("done; weights" not in words)
    assert trial["seconds"] < 30


def test_all_kinds_are_among_them():
    assert {fault for fault, _, _, _ in DOZEN} == FAULTS.keys()
    assert {(fault, moment) for fault, moment, _, _ in DOZEN} <= set(cells())
    assert TIMES.keys() == MOMENTS.keys()
