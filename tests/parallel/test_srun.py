"""A task of Slurm knows its place among the others."""

import os

import pytest

from mlc.parallel import srun

# What Slurm 22.05 sets in the third of four tasks on two nodes; tests/slurm has the real thing.
TASK = {
    "SLURM_JOB_ID": "1200",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "2",
}
SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def told(monkeypatch, **changed: str | None) -> list[str | None]:
    """What a task with another environment takes for its place among the others; None removes a variable."""
    with monkeypatch.context() as patch:
        for name in SET:
            patch.setenv(name, "")  # so that it is as before at the end, whoever sets it
            patch.delenv(name)
        for name, value in {**TASK, **changed}.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        srun.join_srun()
        return [os.environ.get(name) for name in SET]


def test_a_task_of_srun_knows_its_place(monkeypatch):
    monkeypatch.setattr(srun.torch.cuda, "device_count", lambda: 2)
    assert told(monkeypatch) == ["2", "4", "0", "2", "n07", "10403"]
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert told(monkeypatch, **one_node, SLURM_LOCALID="2") == ["2", "4", "2", "4", "127.0.0.1", "10403"]
    assert told(monkeypatch, MASTER_ADDR="a", MASTER_PORT="7")[4:] == ["a", "7"]
    assert told(monkeypatch, SLURM_STEP_ID="4")[5] != told(monkeypatch)[5]


def test_a_task_that_sees_one_of_the_gpus_takes_that(monkeypatch):
    monkeypatch.setattr(srun.torch.cuda, "device_count", lambda: 1)
    assert told(monkeypatch, SLURM_PROCID="3", SLURM_LOCALID="1")[:4] == ["3", "4", "0", "1"]


@pytest.mark.parametrize(
    "other",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},  # a launcher in the task
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_ID": None},  # a batch script of a job that asked for four tasks
    ],
)
def test_other_processes_of_a_job_are_left_alone(monkeypatch, other):
    assert told(monkeypatch, **other) == [other.get(name) for name in SET]


def test_slurms_lists():
    counts = "2(x3),1,16(x2)"
    assert [srun.tasks_on_node(counts, node) for node in range(6)] == [2, 2, 2, 1, 16, 16]
    for nodes, first in {
        "n1": "n1",
        "n1,n2": "n1",
        "n[07-08,10]": "n07",
        "r[1-2]n[3,5-6].x,a": "r1n3.x",
        "gpu-a[3]": "gpu-a3",
    }.items():
        assert srun.first_host(nodes) == first, nodes
