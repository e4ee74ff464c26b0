"""`mlc plan`: what a run will need, before any GPU is rented: memory by strategy, step time, loader, checkpoints.

Nothing is trained: operations and activations are counted on tensors without memory (mlc/footprint.py). The formulas
are in docs/planning.md; a plan is an estimate, `train.py --dry-run` a measurement.
"""

import math
from argparse import Namespace
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from mlc.data.captions import cleaned
from mlc.data.text import MAX_TOKENS, MOST_WORDS, Words
from mlc.footprint import Costs, Text, count
from shards.console import Parser, UserError, did_you_mean, finite
from shards.json_text import to_json

# Name: (memory in GiB, dense bf16 TFLOP/s, GB/s of memory) as the makers' data sheets give them; T4 and V100 have fp16
# instead.
GPUS = {
    "t4": (15, 65, 320),
    "v100-16g": (16, 125, 900),
    "v100-32g": (32, 125, 900),
    "a4000": (16, 76.7, 448),
    "3090": (24, 71, 936),
    "4090": (24, 165.2, 1008),
    "a5000": (24, 111.1, 768),
    "a6000": (48, 154.8, 768),
    "l40s": (48, 362, 864),
    "a100-40g": (40, 312, 1555),
    "a100-80g": (80, 312, 2039),
    "h100": (80, 989, 3350),
    "h200": (141, 989, 4800),
    "b200": (180, 2250, 8000),
}
CONTEXT_GB = 1.0  # CUDA context, cuBLAS and NCCL buffers, fragmentation: what no formula knows
USABLE = 0.95
STREAMED = 0.8  # of the data sheet's bandwidth: what kernels that only copy reach
ADAM_BYTES = 8  # two float32 moments
# Which of weights, gradients and moments (and the EMA, which lies beside the weights) a strategy divides.
DIVIDED = {
    "ddp": "",
    "zero1": "moments",
    "zero2": "moments gradients",
    "zero3": "moments gradients weights",
    "fsdp2": "moments gradients weights",
}


def costs(options: Namespace) -> Costs:
    """Raises UserError for an impossible model."""
    text = None
    if options.text_model:
        text = Text(options.text_model, options.fusion, options.max_tokens, options.vocabulary)
    return count(
        name=options.model,
        num_classes=options.num_classes,
        img_size=options.img_size,
        amp=options.amp_dtype,
        attention=options.attention,
        again=options.grad_checkpointing,
        text=text,
    )


def text_only(options: Namespace) -> bool:
    return bool(options.text_model) and options.fusion == "none"


@dataclass(frozen=True)
class Estimate:
    """Of one strategy; memory in GiB per GPU, `batch` None where not even one image fits."""

    strategy: str
    fixed_gb: float
    batch: int | None
    used_gb: float


def fixed_bytes(strategy: str, c: Costs, gpus: int, *, autocast: bool, ema: bool) -> float:
    """Bytes per GPU that do not depend on the batch: weights, EMA, gradients, moments, low-precision copies."""
    divided = DIVIDED[strategy].split()

    def part(name: str, size: float) -> float:
        return size / gpus if name in divided else size

    copies = 2 * (c.largest * 2 if "weights" in divided else c.parameters) if autocast else 0
    gathered = 4 * c.largest if "weights" in divided and not autocast else 0
    weights = 4 * c.parameters * (2 if ema else 1)
    return (
        part("weights", weights)
        + part("gradients", 4 * c.trainable)
        + part("moments", ADAM_BYTES * c.trainable)
        + copies
        + gathered
    )


def estimate(strategy: str, c: Costs, options: Namespace) -> Estimate:
    room, _, _ = GPUS[options.gpu]
    fixed = fixed_bytes(strategy, c, options.gpus, autocast=options.amp_dtype != "none", ema=not options.no_model_ema)
    once = fixed + CONTEXT_GB * 2**30 + c.shared
    most = int((room * USABLE * 2**30 - once) // max(c.activations, 1))
    share = options.global_batch_size // options.gpus
    fits = [b for b in range(1, share + 1) if share % b == 0 and b <= most]
    batch = fits[-1] if fits else None
    used = once + c.activations * (batch or 1)
    return Estimate(strategy, fixed / 2**30, batch, used / 2**30)


def plan(options: Namespace) -> dict:
    """Everything `--json` prints."""
    c = costs(options)
    _, tflops, bandwidth = GPUS[options.gpu]
    per_image = 3 * c.flops + c.recomputed  # forward once, backward twice as much
    moved = 3 * c.moved + c.moved_again
    limits = {
        "flops": options.mfu * tflops * 1e12 * options.gpus / per_image,
        "memory": STREAMED * bandwidth * 1e9 * options.gpus / max(moved, 1),
    }
    bound = min(limits, key=limits.get)
    rate = limits[bound]
    state = (4 * c.parameters * (1 if options.no_model_ema else 2)) + ADAM_BYTES * c.trainable
    strategies = DIVIDED if options.gpus > 1 else {"ddp": ""}
    return {
        "costs": asdict(c),
        "train_flops_per_image": per_image,
        "train_bytes_per_image": moved,
        "images_per_second_by": limits,
        "bound_by": bound,
        "images_per_second": rate,
        "step_seconds": options.global_batch_size / rate,
        "hours": options.samples * options.epochs / rate / 3600 if options.samples else None,
        "loader_cores_per_gpu": None if text_only(options) else rate / options.gpus / options.images_per_core,
        "checkpoint_gb": state / 1e9,
        "checkpoint_seconds": state / 1e9 / options.disk_gb_per_second,
        "strategies": [asdict(estimate(name, c, options)) for name in strategies],
    }


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}: known are {', '.join(GPUS)}{did_you_mean(options.gpu, list(GPUS))}")
    if options.gpus < 1 or options.global_batch_size % options.gpus:
        raise UserError(f"--global-batch-size {options.global_batch_size} is not a multiple of --gpus {options.gpus}")
    if options.fusion != "none" and not options.text_model:
        raise UserError("--fusion needs --text-model, which reads the captions")
    options.vocabulary = MOST_WORDS
    if options.data:
        _look_at_data(options)
    found = plan(options)
    if options.json:
        print(to_json(found))
    else:
        _say(found, options)
    return 0


def _look_at_data(options: Namespace) -> None:
    """Classes, samples and, for `bigru`, the words of the training split."""
    from mlc.data.sources import open_split
    from shards.dataset import load_dataset

    dataset = load_dataset(options.data)
    options.num_classes, options.samples = len(dataset.classes), dataset.split("train").num_samples
    if options.text_model == "bigru":
        options.vocabulary = len(Words.of(cleaned(open_split(dataset, "train"), ())))


def _model_name(options: Namespace) -> str:
    image = f"{options.model} at {options.img_size} px"
    if not options.text_model:
        return image
    text = f"captions of {options.max_tokens} tokens by {options.text_model}"
    return text if text_only(options) else f"{image}, {text}, {options.fusion}"


def _say(found: dict, options: Namespace) -> None:
    c, console = found["costs"], Console(highlight=False)
    a_sample, samples = ("a sample", "samples") if options.text_model else ("an image", "images")
    console.print(
        f"{_model_name(options)}: {c['parameters'] / 1e6:.1f} M parameters, "
        f"{c['flops'] / 2e9:.1f} GMAC forward, {c['activations'] / 2**20:.0f} MiB of activations {a_sample} "
        f"and {c['shared'] / 2**20:.0f} MiB for all"
    )
    table = Table(title=f"{options.gpus} x {options.gpu}, global batch {options.global_batch_size}")
    for name in ("strategy", "fixed, GiB", "micro-batch", "accumulation", "used, GiB"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for row in found["strategies"]:
        batch = row["batch"]
        steps = options.global_batch_size // options.gpus // batch if batch else None
        shown = (
            (str(batch), str(steps), f"{row['used_gb']:.1f}") if batch else ("too large", "", f"{row['used_gb']:.1f}")
        )
        table.add_row(row["strategy"], f"{row['fixed_gb']:.1f}", *shown)
    console.print(table)
    hours = f", {found['hours']:.1f} h for {options.epochs:g} epochs" if found["hours"] else ""
    rate, seconds = found["images_per_second"], found["step_seconds"]
    by = {"flops": f"at {options.mfu:.0%} MFU", "memory": f"at {STREAMED:.0%} of the memory's bandwidth, which binds"}
    console.print(f"{by[found['bound_by']]}: {rate:.0f} {samples}/s, {seconds:.2f} s a step{hours}")
    if cores := found["loader_cores_per_gpu"]:
        console.print(f"loader: {math.ceil(cores)} cores per GPU at {options.images_per_core} images/s each")
    console.print(
        f"checkpoint: {found['checkpoint_gb']:.1f} GB, {found['checkpoint_seconds']:.0f} s in the background at "
        f"{options.disk_gb_per_second:g} GB/s"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="mlc plan",
        description="Estimates memory, time and checkpoints of a training run; nothing is trained.",
        epilog="example: mlc plan --model swinv2_large_window12to16_192to256 --gpus 64 --gpu a100-80g --data DIR",
    )
    add = parser.add_argument
    add("--model", default="swinv2_large_window12to16_192to256", help="any timm backbone (default: %(default)s)")
    add("--text-model", default="", help="captions too: an encoder's name or folder, or bigru, as of train.py")
    add("--fusion", default="none", help="of image and captions; none with --text-model: the captions alone")
    add("--max-tokens", type=int, default=MAX_TOKENS, help="of each caption (default: %(default)s)")
    add("--img-size", type=int, default=256, help="pixels of a side (default: 256)")
    add("--num-classes", type=int, default=20, help="without --data (default: 20)")
    add("--data", help="packed data set: its classes, and its samples for the hours")
    add("--samples", type=int, default=0, help="training samples, without --data")
    add("--epochs", type=finite, default=20, help="passes over the data (default: 20)")
    add("--gpus", type=int, default=2, help="GPUs in all (default: 2)")
    add("--gpu", default="a4000", help=f"kind: {', '.join(GPUS)} (default: a4000)")
    add("--global-batch-size", type=int, default=32, help="samples per optimizer step (default: 32)")
    add("--amp-dtype", choices=("bf16", "fp16", "none"), default="bf16", help="autocast (default: bf16)")
    add("--attention", choices=("fast", "timm"), default="fast", help="of Swin and SwinV2 (default: fast)")
    add("--grad-checkpointing", default="none", help="none, all, attention or every:K (default: none)")
    add("--no-model-ema", action="store_true", help="no averaged weights")
    add("--mfu", type=finite, default=0.25, help="share of the GPU's peak that is reached (default: 0.25)")
    add("--images-per-core", type=int, default=1000, help="what a core decodes a second (benchmarks/loader.py)")
    add(
        "--disk-gb-per-second",
        type=finite,
        default=1.0,
        help="write speed of the checkpoint's disk (default: 1)",
    )
    add("--json", action="store_true", help="print JSON")
    return parser
