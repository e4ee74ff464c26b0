"""How near does prediction with views (test-time augmentation) come to the bare forward passes?

`predict` is what `mlc predict` does with packed images until the probabilities are there: read, decode, normalise, make
the views on the device, forward, gather, sigmoid and mean (`mlc.inference.logits_of_rows`). `bare` runs the model as
many times as there are views over a batch that is on the device and normalised already. They take turns in one process.
The rate of `predict` is that between its first and its last batch; `with start` also counts the start of the workers
and the first batch. On a CPU both have one thread, as `mlc predict` has; the workers have the other cores.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import common
import torch
from step import wait
from train_e2e import packed

from mlc.data.dataset import BadSamples, EvalDataset
from mlc.data.reader import TarReader
from mlc.data.sources import open_split
from mlc.data.transforms import EvalTransform
from mlc.inference import logits_of_rows, probabilities, tta_views
from mlc.models.build import build_model
from mlc.parallel import launch
from shards.dataset import load_dataset

MODEL, LARGE = "swinv2_tiny_window8_256", "swinv2_large_window12to16_192to256"
CLASSES = 1000


class Bench:
    def __init__(self, options, shards: Path):
        self.accelerator = launch.start(options.amp)
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(0)
        shape = {"name": options.model, "img_size": options.img_size, "num_classes": CLASSES}
        self.model = build_model(**shape, attention=options.attention).to(self.device).eval()
        self.batch, self.workers = options.batch_size, options.workers
        index = open_split(load_dataset(shards), "train")
        self.dataset = EvalDataset(TarReader(index), EvalTransform(size=options.img_size))
        self.image = torch.randn(self.batch, 3, options.img_size, options.img_size, device=self.device)

    @torch.no_grad()
    def bare(self, views: str) -> dict[str, float]:
        count, passes = len(tta_views(views)), len(self.dataset.rows) // self.batch

        def forward() -> None:
            with self.accelerator.autocast():
                for _ in range(count):
                    self.model(self.image).float()

        forward()
        wait(self.device.type)
        begin = time.perf_counter()
        for _ in range(passes):
            forward()
        wait(self.device.type)
        return {"rate": passes * self.batch / (time.perf_counter() - begin)}

    def predict(self, views: str) -> dict[str, float]:
        begin, times, done = time.perf_counter(), [], []
        for rows, logits in logits_of_rows(
            [self.model],
            self.dataset,
            self.accelerator,
            batch_size=self.batch,
            workers=self.workers,
            mean=self.model.pretrained_cfg["mean"],
            std=self.model.pretrained_cfg["std"],
            bad=BadSamples(0),
            views=tta_views(views),
        ):
            probabilities(logits[:, 0])
            times.append(time.perf_counter())
            done.append(len(rows))
        return {"rate": sum(done[1:]) / (times[-1] - times[0]), "with start": sum(done) / (times[-1] - begin)}


def rows(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    lines = []
    for name, values in found.items():
        spec, who = name.split(": ")
        rates = [one["rate"] for one in values]
        line = [spec, who, f"{median(rates):.2f}", f"{common.spread(rates):.0%}"]
        if who == "predict":
            bare = median(one["rate"] for one in found[f"{spec}: bare"])
            shares = (median(one[kind] for one in values) / bare for kind in ("rate", "with start"))
            line += [f"{share:.1%}" for share in shares]
        lines.append(line + [""] * (6 - len(line)))
    return lines


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=LARGE if on_gpu else MODEL, help="timm's name (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--views", nargs="+", default=["", "hflip", "hflip,scale"], help="as in --tta, '' for one view")
    parser.add_argument(
        "-b", "--batch-size", type=int, default=64 if on_gpu else 8, help="images (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=60 if on_gpu else 6, help="of a turn (default: %(default)s)")
    parser.add_argument("-j", "--workers", type=int, default=8 if on_gpu else 1, help="default: %(default)s")
    parser.add_argument("--attention", choices=("fast", "timm"), default="fast", help="default: %(default)s")
    parser.add_argument("--amp", choices=("bf16", "none"), default="bf16" if on_gpu else "none", help="autocast")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batches, options.views = 1, min(options.batches, 4), options.views[-1:]
        if not on_gpu:
            options.img_size, options.batch_size = 128, 4
    with tempfile.TemporaryDirectory() as folder:
        # of the demo data five sixths are for training; this is more than asked for
        samples = -(-options.batches * options.batch_size * 6 // 5) + 6
        bench = Bench(options, packed(Path(folder), samples, options.img_size + options.img_size // 8))
        bench.dataset.rows = bench.dataset.rows[: options.batches * options.batch_size]
        turns: dict[str, Callable[[], dict[str, float]]] = {}
        for views in options.views:
            spec = f"{views or 'one'} ({len(tta_views(views))})"
            turns |= {f"{spec}: bare": partial(bench.bare, views), f"{spec}: predict": partial(bench.predict, views)}
        found = common.interleaved(turns, options.rounds)
    where = torch.cuda.get_device_name() if on_gpu else "1 thread"
    versions = common.versions("torch", "timm", "accelerate")
    print(f"{common.machine()}; {where}; {versions}; {common.rounds_said(options.rounds)}")
    print(
        f"{options.model} at {options.img_size} px, {options.attention} attention, autocast {options.amp}, "
        f"{options.batches} batches of {options.batch_size}, {options.workers} workers\n"
    )
    print(common.table(["views", "", "img/s", "spread", "of bare", "with start"], rows(found)))
    common.write_json(options.json, device=where, options=vars(options), versions=versions, results=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
