"""How does a training step scale over processes, and what should 8, 64 or 512 GPUs give?

Every process trains on random images that are on its device already, through `mlc.parallel.strategy` as a run does. Its
rate beside that of a process alone is the efficiency. Timed besides: forward and backward with the reduction of the
gradients and without it (`no_sync`), and the bare collective over as many bytes. What of the collective is hidden
behind the backward pass is the overlap, 1 - (with - without) / bare. A process has one thread on a CPU; more processes
than cores share them, which the column `of cores` takes into account; an overlap cannot be told then.

`--predict` only computes: T = k c + max(0, r - o b), for k accumulated micro-batches of c seconds each, a backward pass
of b = 2/3 c, of which a share o can hide the reduction, and r seconds of a ring all-reduce of S bytes over W GPUs,

    r = 2 (W - 1) / W  S / B + n h l,    h = 2 (min(W, 8) - 1) + 2 ceil(log2(W / 8))

B is the bandwidth of a GPU's link inside a node of 8, or that of the whole node's network where there are several nodes
and it is less: NCCL builds as many rings as there are network cards, and each crosses every node once. The n buckets of
25 MiB each pay the latency l of h hops: a ring inside the node, a tree among nodes.
"""

import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import common
import torch
from step import wait
from torch import distributed

from mlc.models.build import build_model
from mlc.optim.ema import Ema
from mlc.optim.losses import bce
from mlc.optim.param_groups import param_groups
from mlc.parallel import launch, strategy
from shards.json_text import to_json

MODEL, LARGE = "swinv2_tiny_window8_256", "swinv2_large_window12to16_192to256"
NODE = 8  # GPUs
BUCKET = 25 * 2**20  # bytes; DDP's default
BACKWARD = 2 / 3  # of the time of a forward and a backward pass
CLASSES = 1000


# ---- measured --------------------------------------------------------------------------------------------------------


class Member:
    """One process of a world: the model in its strategy, and the seconds of the parts of a step."""

    def __init__(self, options: Namespace, name: str):
        choice = strategy.Choice(name=name)
        self.accelerator = launch.start(options.amp, group=choice.divided)
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(0)
        model = build_model(
            name=options.model, num_classes=CLASSES, img_size=options.img_size, attention=options.attention
        ).to(self.device)
        self.gradients = sum(p.numel() for p in model.parameters())
        self.bare, self.ema = model, Ema(model)
        self.divided = strategy.divide(
            choice,
            self.accelerator,
            model,
            self.ema.module,
            lambda model: torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, fused=True),
            clip=None,
            batch_size=options.batch_size,
            accumulation=1,
        )
        self.image = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=self.device)
        self.target = torch.rand(options.batch_size, CLASSES, device=self.device).round()

    def passes(self, *, reduced: bool) -> None:
        with self.divided.accumulate(reduced):
            with self.accelerator.autocast():
                logits = self.divided.model(self.image)
            self.divided.backward(bce(logits, self.target).mean())

    def step(self) -> None:
        self.passes(reduced=True)
        self.divided.step()
        self.ema.update(self.bare, 0.999)

    def collective(self) -> Callable[[], object]:
        """The bare reduction of all gradients in float32."""
        world = distributed.get_world_size()
        part = torch.zeros(-(-self.gradients // world), device=self.device)
        flat = torch.zeros(len(part) * world, device=self.device)
        if isinstance(self.divided, strategy.Fsdp2):
            return partial(distributed.reduce_scatter_tensor, part, flat)
        return partial(distributed.all_reduce, flat)

    def seconds(self, action: Callable[[], object]) -> float:
        """From when all are ready until all are done."""
        together = distributed.barrier if distributed.is_initialized() else nullcontext
        together()
        begin = time.perf_counter()
        action()
        wait(self.device.type)
        together()
        return time.perf_counter() - begin

    def measure(self, iterations: int) -> dict[str, float]:
        actions = {
            "step": self.step,
            "with": partial(self.passes, reduced=True),
            "without": partial(self.passes, reduced=False),
        }
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            actions["bare"] = self.collective()
        for action in actions.values():
            action()
        self.divided.optimizer.zero_grad()
        found: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(iterations):
            for name, action in actions.items():
                found[name].append(self.seconds(action))
        return {name: median(values) for name, values in found.items()} | {"parameters": self.gradients}


def member(rank: int, world: int, port: int, options: Namespace, name: str, answer: str) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ |= {key: str(value) for key, value in {**ranks, **meeting}.items()}
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    found = Member(options, name).measure(options.iterations)
    if rank == 0:
        Path(answer).write_text(to_json(found))
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def turn(world: int, options: Namespace, name: str) -> dict[str, float]:
    """Seconds of each part of a step in a world of fresh processes."""
    context = multiprocessing.get_context("forkserver")  # CUDA wants no fork of a process that uses it
    context.set_forkserver_preload(["mlc.train"])
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        given = (world, port, options, name, str(answer))
        processes = [context.Process(target=member, args=(rank, *given)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{name} in {world} processes failed, see above")
        return json.loads(answer.read_text())


def measured_rows(found: dict[str, list[dict[str, float]]], batch: int, cores: int) -> list[list[str]]:
    rows, alone = [], {}
    for label, values in found.items():
        name, world = label.split(", ")
        middle = {key: median(one[key] for one in values) for key in values[0]}
        rates = [batch / one["step"] for one in values]
        alone.setdefault(name, median(rates))
        share = median(rates) / alone[name]
        reduction = middle["with"] - middle["without"]
        line = [name, world, f"{median(rates):.2f}", f"{common.spread(rates):.0%}", f"{share:.0%}"]
        line.append(f"{share * max(1, int(world) / cores):.0%}")
        if "bare" in middle:
            line += [f"{1e3 * s:.0f}" for s in (middle["without"], reduction, middle["bare"])]
            if int(world) <= cores:  # else the others' turns on the core are most of the difference
                line.append(f"{1 - reduction / middle['bare']:.0%}")
        rows.append(line + [""] * (10 - len(line)))
    return rows


# ---- predicted -------------------------------------------------------------------------------------------------------


def all_reduce_seconds(size: float, gpus: int, *, link: float, network: float, latency: float) -> float:
    """r of the formula above. size: bytes. link, network: bytes a second of a GPU inside a node, and of a node."""
    nodes = -(-gpus // NODE)
    bandwidth = link if nodes == 1 else min(link, network)
    hops = 2 * (min(gpus, NODE) - 1) + 2 * math.ceil(math.log2(nodes))
    return 2 * (gpus - 1) / gpus * size / bandwidth + math.ceil(size / BUCKET) * hops * latency


def step_seconds(compute: float, reduction: float, *, overlap: float, accumulation: int) -> float:
    """T of the formula above; `compute` is that of one micro-batch."""
    return accumulation * compute + max(0.0, reduction - overlap * BACKWARD * compute)


def predicted_rows(options: Namespace, parameters: int) -> list[list[str]]:
    compute, rows = options.predict_batch / options.rate, []
    for network in options.network:
        for gpus in options.gpus:
            links = {"link": options.nvlink * 1e9, "network": network * 1e9 / 8, "latency": options.latency * 1e-6}
            reduction = all_reduce_seconds(4 * parameters, gpus, **links)
            line = [f"{network:g} Gb/s", str(gpus), f"{1e3 * reduction:.1f}"]
            for accumulation in (1, 4):
                seconds = step_seconds(compute, reduction, overlap=options.overlap, accumulation=accumulation)
                images = gpus * options.predict_batch * accumulation / seconds
                line += [f"{images:.0f}", f"{accumulation * compute / seconds:.1%}"]
            rows.append(line)
    return rows


def predict(options: Namespace) -> None:
    model = build_model(name=options.predict_model, num_classes=CLASSES)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"\nComputed, not measured: {options.predict_model}, DDP, {4 * parameters / 1e6:.0f} MB of gradients; a GPU "
        f"alone does {options.rate:g} img/s in batches of {options.predict_batch}, {options.nvlink:g} GB/s to its "
        f"neighbours, {options.latency:g} us a hop; {options.overlap:.0%} of the backward pass can hide the reduction\n"
    )
    names = ["img/s", "efficiency"]
    header = ["network of a node", "GPUs", "all-reduce, ms", *names, *(f"{n}, 4 accumulated" for n in names)]
    print(common.table(header, predicted_rows(options, parameters)))


# ---- the tables ------------------------------------------------------------------------------------------------------


def measure(options: Namespace) -> None:
    turns = {
        f"{name}, {world}": partial(turn, world, options, name)
        for name in options.strategies
        for world in options.processes
    }
    found = common.interleaved(turns, options.rounds)
    on_gpu, cores = options.device == "cuda", len(os.sched_getaffinity(0))
    where = torch.cuda.get_device_name() if on_gpu else "one thread a process"
    versions = common.versions("torch", "timm", "accelerate")
    print(f"{common.machine()}; {where}; {versions}; {common.rounds_said(options.rounds)}")
    print(
        f"{options.model} at {options.img_size} px, batches of {options.batch_size} a process, "
        f"{options.attention} attention, autocast {options.amp}\n"
    )
    header = ["strategy", "processes", "img/s each", "spread", "efficiency", "of cores"]
    header += ["passes, ms", "reduction adds, ms", "bare, ms", "overlap"]
    print(common.table(header, measured_rows(found, options.batch_size, max(options.processes) if on_gpu else cores)))
    common.write_json(options.json, device=where, options=vars(options), versions=versions, results=found)


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    on_gpu, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    worlds = [n for n in (1, 2, 4, 8) if n <= gpus] if on_gpu else [1, 2, 4]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=worlds, help="default: up to 4, or all GPUs")
    parser.add_argument("--strategies", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--model", default=LARGE if on_gpu else MODEL, help="timm's name (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=256 if on_gpu else 128, help="pixels (default: %(default)s)")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=64 if on_gpu else 8, help="images a process (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=10 if on_gpu else 5, help="steps of a turn")
    parser.add_argument("--attention", choices=("fast", "timm"), default="fast", help="default: %(default)s")
    parser.add_argument("--amp", choices=("bf16", "none"), default="bf16" if on_gpu else "none", help="autocast")
    group = parser.add_argument_group("prediction")
    group.add_argument("--predict", action="store_true", help="only compute what many GPUs should give")
    group.add_argument("--predict-model", default=LARGE, help="timm's name (default: %(default)s)")
    group.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    group.add_argument("--rate", type=float, default=1034, help="img/s of one GPU (default: 30 %% of an H200's peak)")
    group.add_argument("--predict-batch", type=int, default=64, help="images a GPU (default: %(default)s)")
    group.add_argument(
        "--network", type=float, nargs="+", default=[3200, 1600, 200], help="Gb/s of a node (8 x 400, 8 x 200, 1 x 200)"
    )
    group.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU in one direction (default: H100, H200)")
    group.add_argument("--latency", type=float, default=10, help="us a hop (default: %(default)s, an assumption)")
    group.add_argument("--overlap", type=float, default=0.5, help="share of the backward pass (default: %(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.iterations = 1, 2
        if options.device == "cpu":
            options.img_size, options.batch_size, options.processes = 64, 2, [1, 2]
    if not options.predict:
        measure(options)
    predict(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
