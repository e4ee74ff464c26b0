"""What does an image cost in GPU memory while training, and what does each way to save it cost in time?

Ways: timm's attention, ours, ours compiled, and --grad-checkpointing attention, every:2 and all. On a GPU a step
(forward, backward, AdamW) runs at two batch sizes: their peaks of allocated memory differ by what an image adds, and
the line through them meets batch 0 at what a step takes for itself, weights and optimizer state included; img/s are
those of the larger batch, time is relative to timm's. Where there is no GPU, bytes are counted as `mlc plan` counts
them (mlc/footprint.py) and marked as computed; what a compiled model keeps is not countable so.

`FLOPs` are those that a training step executes for an image, relative to timm's without recomputing, always counted.
"""

import sys
import time
from collections.abc import Iterator
from statistics import median

import common
import timm
import torch

from mlc.footprint import Costs, count
from mlc.models.build import build_model
from mlc.parallel.compiler import compile_blocks
from mlc.parallel.recompute import recompute

MODELS = ("swinv2_large_window12to16_192to256",)
QUICK = ("swinv2_tiny_window8_256",)
WAYS = {  # name: --attention, --compile, --grad-checkpointing
    "timm": ("timm", False, "none"),
    "fast": ("fast", False, "none"),
    "fast, compiled": ("fast", True, "none"),
    "fast, attention": ("fast", False, "attention"),
    "fast, every:2": ("fast", False, "every:2"),
    "fast, all": ("fast", False, "all"),
    "timm, attention": ("timm", False, "attention"),
    "timm, all": ("timm", False, "all"),
}
CLASSES = 1000


def size_of(name: str) -> int:
    """Pixels of a side that the model was made for."""
    return timm.get_pretrained_cfg(name).input_size[-1]


def counted(name: str, way: str) -> Costs:
    attention, _, again = WAYS[way]
    return count(name=name, num_classes=CLASSES, img_size=size_of(name), amp="bf16", attention=attention, again=again)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class Training:
    """A model on the GPU, with which steps of any batch size can be taken."""

    def __init__(self, name: str, way: str):
        attention, compiled, again = WAYS[way]
        torch.manual_seed(0)
        self.model = build_model(name=name, num_classes=CLASSES, attention=attention).cuda().train()
        if compiled:
            compile_blocks(self.model)
        recompute(self.model, again)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.size = size_of(name)

    def step(self, images: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(images).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # with accumulation they are there during all but one pass

    def peak_and_seconds(self, batch: int) -> tuple[int, float]:
        """Bytes above those of what else is on the GPU, and seconds, of the third step."""
        images = torch.randn(batch, 3, self.size, self.size, device="cuda")
        for _ in range(2):
            self.step(images)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self.step(images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), time.perf_counter() - begin


def measured(name: str, way: str, batches: tuple[int, int], rounds: int) -> dict:
    """Bytes of an image and of a step without images; seconds of the larger batch, one a round. One model at a time is
    on the GPU, or its weights would be part of another's peak."""
    training = Training(name, way)
    few, _ = training.peak_and_seconds(batches[0])
    turns = [training.peak_and_seconds(batches[1]) for _ in range(rounds)]
    image = (turns[0][0] - few) / (batches[1] - batches[0])
    return {"image": image, "rest": few - batches[0] * image, "seconds": [s for _, s in turns], "batch": batches[1]}


# ---- the table -------------------------------------------------------------------------------------------------------


def rows(name: str, options) -> Iterator[tuple[list[str], dict]]:
    ways = {way: counted(name, way) for way in WAYS if not WAYS[way][1]}
    plain = 3 * ways["timm"].flops
    first = None
    for way, (attention, compiled, _) in WAYS.items():
        c = ways.get(way, ways[attention])
        flops = (3 * c.flops + c.recomputed) / plain
        cells, found = ["-", "-", "-", "-"], {}
        if options.device == "cuda":
            found = measured(name, way, tuple(options.batch_sizes), options.rounds)
            torch.cuda.empty_cache()
            seconds = median(found["seconds"])
            first = first or seconds
            rate = f"{found['batch'] / seconds:.1f}"
            cells = [f"{found['image'] / 2**20:.1f}", f"{found['rest'] / 2**20:.0f}", rate, f"{seconds / first:.2f}"]
        elif not compiled:
            cells[:2] = [f"{c.activations / 2**20:.1f}", f"{(c.shared + fixed(c)) / 2**20:.0f}"]
        result = {"model": name, "way": way, "flops": flops, "measured": found}
        yield [f"{name.removesuffix('_192to256')}, {way}", *cells, f"{flops:.2f}"], result | {"counted": vars(c)}


def fixed(c: Costs) -> int:
    """Weights and their copies in bfloat16, gradients, AdamW's moments; no EMA, as in `Training`."""
    return 6 * c.parameters + 12 * c.trainable


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names (default: SwinV2-L-256)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs=2, default=(8, 24), help="on a GPU (default: 8 24)")
    options = parser.parse_args()
    if options.quick:
        options.models, options.rounds = QUICK, 1
    lines, results = [], []
    for name in options.models:
        for line, result in rows(name, options):
            lines.append(line)
            results.append(result)
    on_gpu = options.device == "cuda"
    where = f"{torch.cuda.get_device_name()}, measured" if on_gpu else "computed for a GPU, none here"
    print(f"{common.machine()}; {where}; {common.versions('torch', 'timm')}; bf16 autocast, AdamW\n")
    header = ["model, way", "MiB an image", "MiB for all", "img/s", "time", "FLOPs"]
    print(common.table(header, lines))
    software = common.versions("torch", "timm")
    common.write_json(options.json, device=where, options=vars(options), versions=software, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
