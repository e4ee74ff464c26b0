"""A run by plain `srun`, one task per process: Slurm's words for what torchrun and `accelerate launch` say."""

import os
import re

import torch


def join_srun() -> None:
    """Sets what torchrun would set, in a process that plain `srun` started: each task is then one process of a run.

    Nothing is changed where a launcher did so before, in a step of one task, or in a batch script, which is no step.
    The port follows from job and step, so that all tasks choose the same and other jobs on the node another one.
    """
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in env or "WORLD_SIZE" in env:
        return
    here, local = tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], int(env["SLURM_NODEID"])), env["SLURM_LOCALID"]
    if 0 < torch.cuda.device_count() < int(env.get("SLURM_GPUS_ON_NODE", 0)):  # --gpus-per-task: it sees only its own
        here, local = 1, "0"
    port = 10_000 + (int(env["SLURM_JOB_ID"]) * 17 + int(env["SLURM_STEP_ID"])) % 20_000
    env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": str(tasks), "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": str(here)}
    alone = env["SLURM_STEP_NUM_NODES"] == "1"
    env.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(env["SLURM_STEP_NODELIST"]))
    env.setdefault("MASTER_PORT", str(port))


def tasks_on_node(counts: str, node: int) -> int:
    """Of Slurm's `2(x3),1` (two tasks on each of three nodes, one on the fourth) the number on a node, from 0 on."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        node -= int(times or 1)
        if node < 0:
            return int(count)
    raise ValueError(f"{counts!r} has too few nodes")


def first_host(nodes: str) -> str:
    """`rack1n03` of Slurm's `rack[1-2]n[03,07-09],login`; `scontrol show hostnames` is not there in a container."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)
