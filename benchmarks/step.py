"""How fast is a step of Swin and SwinV2 with our window attention, beside timm's own, and how near to the peak?

ConvNets may be given as well; ours have their weights in channels last. `--peers transformers` adds that library's Swin
or SwinV2 of the same shape, with weights of its own.

Three things are timed on random images that are on the device already: `forward` (evaluation, no gradients),
`gradients` (forward and backward in training mode) and `step` (those, AdamW and zero_grad). Both candidates start from
the same weights and take turns in one process. `of peak` is timm's number of matrix-product FLOPs, counted by
torch.utils.flop_counter, times the images per second, over the peak: --peak-tflops, else a GPU's data sheet (dense
bfloat16) as `mlc plan` has it, else, on a CPU, the rate of a 2048 x 2048 float32 product measured before. Memory is
what PyTorch allocated on the GPU at most during a turn, less what it held before.
"""

import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlc.models.build import build_model, fast_memory_format
from mlc.parallel.compiler import compile_blocks
from mlc.plan import GPUS

MODELS = (
    "swinv2_large_window12to16_192to256",
    "swinv2_base_window16_256",
    "swinv2_tiny_window8_256",
    "swin_large_patch4_window7_224",
    "swin_base_patch4_window7_224",
)
QUICK = ("swinv2_tiny_window8_256",)
MODES = ("forward", "gradients", "step")
WHO = ("timm", "mlc")


class Candidate:
    """A model, its optimizer and a batch, and the seconds of each of the MODES."""

    def __init__(self, name: str, who: str, options, *, compiled: bool):
        torch.manual_seed(0)
        self.device, self.batch = options.device, options.batch_size
        self.model = build_model(name=name, num_classes=1000, attention="timm" if who == "timm" else "fast")
        size = self.model.pretrained_cfg["input_size"][-1]
        if who == "mlc":
            self.model.to(memory_format=fast_memory_format(self.model, self.device))
        if who == "transformers":
            self.model = Transformers(self.model)
        self.model.to(self.device)
        self.image = torch.randn(self.batch, 3, size, size, device=self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.iterations = options.iterations
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16) if options.amp == "bf16" else nullcontext
        if compiled:
            compile_blocks(self.model)

    def forward(self) -> None:
        with torch.no_grad(), self.autocast():
            self.model(self.image)

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.model(self.image).float().square().mean()
        loss.backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def timed(self, mode: str) -> dict[str, float]:
        """Seconds of one pass and bytes above those that were held before."""
        self.model.train(mode != "forward")
        self.model.zero_grad()
        run = getattr(self, mode)
        run()  # also the compiler, and the bias of the evaluation
        held = reset_memory(self.device)
        begin = time.perf_counter()
        for _ in range(self.iterations):
            run()
        wait(self.device)
        seconds = (time.perf_counter() - begin) / self.iterations
        return {"seconds": seconds, "bytes": peak_memory(self.device) - held}


class Transformers(torch.nn.Module):
    """That library's Swin or SwinV2 of the shape of one of timm's."""

    def __init__(self, shape: torch.nn.Module):
        super().__init__()
        from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

        first = [stage.blocks[0] for stage in shape.layers]
        given = {
            "image_size": shape.patch_embed.img_size[0],
            "embed_dim": shape.embed_dim,
            "depths": [len(stage.blocks) for stage in shape.layers],
            "num_heads": [block.attn.num_heads for block in first],
            "window_size": first[0].window_size[0],
            "num_labels": shape.num_classes,
            "drop_path_rate": 0.0,
        }
        version2 = hasattr(first[0].attn, "logit_scale")
        kinds = (Swinv2ForImageClassification, Swinv2Config) if version2 else (SwinForImageClassification, SwinConfig)
        self.inner = kinds[0](kinds[1](**given))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values=image).logits


# ---- the device ------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_memory(device: str) -> int:
    """Bytes in use now; `peak_memory` counts from here."""
    wait(device)
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def peak(options) -> tuple[float, str]:
    """(FLOP/s, where it is from)."""
    if options.peak_tflops:
        return options.peak_tflops * 1e12, f"{options.peak_tflops} TFLOP/s, given"
    if options.device == "cuda":
        name = torch.cuda.get_device_name().lower()
        known = [key for key in GPUS if key.split("-")[0] in re.split(r"\W+", name)]
        if not known:
            return float("nan"), f"unknown for {name}; --peak-tflops gives it"
        return GPUS[known[0]][1] * 1e12, f"{GPUS[known[0]][1]} TFLOP/s, data sheet of {known[0]}"
    a, rates = torch.randn(2048, 2048), []
    for _ in range(6):
        begin = time.perf_counter()
        a @ a
        rates.append(2 * 2048**3 / (time.perf_counter() - begin))
    return max(rates), f"{max(rates) / 1e12:.3f} TFLOP/s, measured with a 2048 x 2048 float32 product"


def flops(name: str) -> dict[str, int]:
    """Of one image, {mode: FLOPs}, of timm's model; backward twice as many as forward, AdamW has no matrix products."""
    model = build_model(name=name, num_classes=1000, attention="timm")
    image = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    forward = counter.get_total_flops()
    return {"forward": forward, "gradients": 3 * forward, "step": 3 * forward}


# ---- the table -------------------------------------------------------------------------------------------------------


def measure(name: str, options, *, compiled: bool) -> dict[str, dict[str, list[dict[str, float]]]]:
    """{mode: {candidate: measurements}}."""
    candidates = {who: Candidate(name, who, options, compiled=compiled) for who in (*WHO, *options.peers)}
    found = {}
    for mode in options.modes:
        turns: dict[str, Callable[[], dict]] = {who: partial(c.timed, mode) for who, c in candidates.items()}
        found[mode] = common.interleaved(turns, options.rounds)
    return found


def rows(name: str, how: str, found: dict, counted: dict[str, int], limit: float, batch: int) -> list[list[str]]:
    lines = []
    for mode, measured in found.items():
        seconds = {who: [m["seconds"] for m in values] for who, values in measured.items()}
        for who in measured:
            rate = batch / median(seconds[who])
            memory = max(m["bytes"] for m in measured[who])
            lines.append(
                [
                    f"{name.removesuffix('_192to256')}, {how}",
                    mode,
                    who,
                    f"{rate:.2f}" if rate < 100 else f"{rate:.0f}",
                    f"{common.spread(seconds[who]):.0%}",
                    f"{median(seconds['timm']) / median(seconds[who]):.2f}",
                    f"{rate * counted[mode] / limit:.1%}",
                    f"{memory / 1e9:.2f}" if memory else "-",
                ]
            )
    return lines


def main() -> int:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names (default: five of Swin and SwinV2)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="no", help="torch.compile the blocks")
    parser.add_argument("--peers", nargs="+", choices=("transformers",), default=(), help="compare with these too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="images of a pass (default: 64 on a GPU, 4 on a CPU)")
    parser.add_argument("--iterations", type=int, help="passes of a turn (default: 10 on a GPU, 1 on a CPU)")
    parser.add_argument("--amp", choices=("bf16", "none"), help="autocast (default: bf16 on a GPU, none on a CPU)")
    parser.add_argument("--peak-tflops", type=float, help="what `of peak` refers to")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch_size = options.batch_size or (64 if on_gpu else 4)
    options.iterations = options.iterations or (10 if on_gpu else 1)
    options.amp = options.amp or ("bf16" if on_gpu else "none")
    if options.quick:
        options.models, options.rounds = QUICK, 1
    limit, source = peak(options)
    compiled = {"no": (False,), "yes": (True,), "both": (False, True)}[options.compile]
    results, lines = [], []
    for name in options.models:
        counted = flops(name)
        for yes in compiled:
            found = measure(name, options, compiled=yes)
            results.append({"model": name, "compiled": yes, "flops": counted, "measured": found})
            lines += rows(name, "compiled" if yes else "eager", found, counted, limit, options.batch_size)
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    software = common.versions("torch", "timm", *options.peers)
    print(f"{common.machine()}; {where}; {software}; {common.rounds_said(options.rounds)}")
    print(f"batches of {options.batch_size}, autocast {options.amp}; peak {source}\n")
    header = ["model", "timed", "who", "img/s", "spread", "ratio", "of peak", "memory, GB"]
    print(common.table(header, lines))
    common.write_json(options.json, device=where, peak=limit, options=vars(options), versions=software, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
