"""Images per second out of a data loader: ours, timm's, torchvision's, webdataset's, mosaic-streaming's, Energon's.

All read the same JPEG files from a warm disk cache and give the same output: batches of 64 pictures of 256 x 256 after
a RandomResizedCrop (area 0.08 to 1) and a horizontal flip, as uint8, because whoever converts to float in a worker
only loses. The limit is our DataLoader around a data set that decodes each file to its full size and drops the pixels.
Starting the workers is left out. Competitors that are not installed are named and left out; the two that need more than
`pip install mlc[dev]` were installed without their dependencies, because mosaic-streaming would take numpy back to 2.1:

    pip install --no-deps mosaicml-streaming brotli python-snappy cramjam zstd catalogue xxhash
    pip install --no-deps megatron-energon multi-storage-client mfusepy filetype rapidyaml xattr lark wcmatch bracex \\
        deprecation

FFCV is not among them: its last release does not build without a system OpenCV 4.
"""

import csv
import gc
import importlib.util
import io
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import common
import cv2
import numpy as np
import simplejpeg
import timm.data
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from mlc.data.dataset import TrainDataset
from mlc.data.decode import resized
from mlc.data.loader import load, plan_batches, train_positions
from mlc.data.order import Draws
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform, random_box
from shards.dataset import load_dataset
from shards.image import packed_bytes

BATCH, SIZE = 64, 256
OURS, LIMIT = "mlc", "decode only (the limit)"
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Data:
    """The same files as a folder with one class, as WebDataset shards and in mosaic's format."""

    root: Path
    pictures: list[bytes]  # the different ones; each stands in the data several times
    count: int

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def mosaic(self) -> Path:
        return self.root / "mosaic"


# ---- files -----------------------------------------------------------------------------------------------------------


def big_pictures(count: int) -> list[bytes]:
    """640 x 480 JPEGs of quality 90, about 97 kB: crops of scikit-learn's two photographs with a camera's noise."""
    rng, photos = np.random.default_rng(0), [Image.fromarray(photo) for photo in load_sample_images().images]
    pictures = []
    for i in range(count):
        height = rng.uniform(300, 427)
        left, upper = rng.uniform(0, 640 - height * 4 / 3), rng.uniform(0, 427 - height)
        box = (left, upper, left + height * 4 / 3, upper + height)
        pixels = np.asarray(photos[i % 2].resize((640, 480), Image.Resampling.BICUBIC, box=box))
        noisy = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    return pictures


def write(data: Data, shards: int = 8) -> None:
    images = data.folder / "all"
    images.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(data.count)]
    for i, name in enumerate(names):
        (images / name).write_bytes(data.pictures[i % len(data.pictures)])
    table = data.root / "train.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("ImageID", "Labels"), *((name, "one") for name in names)])
    where = ["--csv", str(table), "--images", str(images), "--out", str(data.shards)]
    command = [sys.executable, "-m", "mlc", "pack", *where, "--shard-size", str(data.count // shards)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if importlib.util.find_spec("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(data.mosaic), columns={"image": "bytes"}) as writer:
            for i in range(data.count):
                writer.write({"image": data.pictures[i % len(data.pictures)]})
    if importlib.util.find_spec("megatron"):
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress"]
        command = [str(Path(sys.executable).parent / "energon"), "prepare", *options, str(data.shards)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ---- loaders: (data, workers) -> batches -----------------------------------------------------------------------------


def ours(data: Data, workers: int, aa: str = "") -> Iterable:
    index = open_split(load_dataset(data.shards), "train")
    return _streamed(TrainDataset.of(index, TrainTransform(size=SIZE, aa=aa), seed=0), workers)


def _streamed(dataset, workers: int) -> Iterable:
    positions = train_positions(0, 10**9, plan_batches(BATCH, BATCH, 1, together=1), 0)
    return load(dataset, positions, workers=workers, device=torch.device("cpu"))


class Decoding:
    """Each picture decoded to its full size and dropped."""

    def __init__(self, pictures: list[bytes]):
        self.pictures = pictures

    def __getitems__(self, positions):
        for p in positions:
            simplejpeg.decode_jpeg(self.pictures[p % len(self.pictures)], "RGB")
        return {"image": torch.zeros(1)}


def decoding(data: Data, workers: int) -> Iterable:
    return _streamed(Decoding(data.pictures), workers)


def timms(data: Data, workers: int, aa: str | None = None) -> Iterable:
    """Its DataLoader without its prefetcher, which makes floats in the main process where there is no GPU."""
    return timm.data.create_loader(
        timm.data.create_dataset("", root=str(data.folder)),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        color_jitter=None,
        auto_augment=aa,
        interpolation="random",
        num_workers=workers,
        persistent_workers=False,
        device=torch.device("cpu"),
    ).loader


TORCHVISION = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def image_folder(data: Data, workers: int) -> Iterable:
    dataset = ImageFolder(str(data.folder), TORCHVISION)
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def stock_webdataset(data: Data, workers: int) -> Iterable:
    urls = sorted(map(str, data.shards.glob("train-*.tar")))
    samples = webdataset.WebDataset(urls, resampled=True).shuffle(1000).decode("pilrgb").to_tuple("jpg")
    return webdataset.WebLoader(samples.map_tuple(TORCHVISION).batched(BATCH), batch_size=None, num_workers=workers)


def mosaic(data: Data, workers: int) -> Iterable:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Pictures(StreamingDataset):
        def __getitem__(self, i):
            return TORCHVISION(Image.open(io.BytesIO(super().__getitem__(i)["image"])).convert("RGB"))

    clean_stale_shared_memory()
    dataset = Pictures(local=str(data.mosaic), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    return DataLoader(dataset, BATCH, num_workers=workers, drop_last=True)


def energon(data: Data, workers: int) -> Iterable:
    from megatron import energon as library

    @library.stateless
    def cook(sample: dict) -> dict:
        return library.basic_sample_keys(sample) | {"image": sample["jpg"]}

    class Encoder(library.DefaultTaskEncoder):
        decoder = library.SampleDecoder(image_decode="pilrgb")
        cookers = [library.Cooker(cook)]  # noqa: RUF012

        @library.stateless(restore_seeds=True)
        def encode_sample(self, sample):
            return TORCHVISION(sample["image"])

        def batch(self, samples):
            return torch.stack(samples)

    return library.get_savable_loader(
        library.get_train_dataset(
            data.shards,
            batch_size=BATCH,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
            worker_config=library.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        )
    )


LOADERS: dict[str, tuple[Callable[[Data, int], Iterable], str]] = {  # and the module it needs
    LIMIT: (decoding, "simplejpeg"),
    OURS: (ours, "mlc"),
    "timm create_loader": (timms, "timm"),
    "torchvision ImageFolder": (image_folder, "torchvision"),
    "webdataset + torchvision": (stock_webdataset, "webdataset"),
    "mosaic-streaming + torchvision": (mosaic, "streaming"),
    "Energon + torchvision": (energon, "megatron"),
    f"{OURS}, {RAND_AUGMENT}": (partial(ours, aa=RAND_AUGMENT), "mlc"),
    f"timm, {RAND_AUGMENT}": (partial(timms, aa=RAND_AUGMENT), "timm"),
}


# ---- parts: why this decoder and these filters -----------------------------------------------------------------------


def half_size(data: bytes) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // 2), min_width=-(-width // 2))


def by_torch(pixels: np.ndarray) -> np.ndarray:
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, (SIZE, SIZE), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


DECODERS: dict[str, Callable[[bytes], object]] = {
    "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
    "simplejpeg, half size": half_size,
    "torchvision": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB),
    "OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
    "OpenCV, half size": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2),
    "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
}

FILTERS: dict[str, Callable[[np.ndarray], object]] = {
    "mlc (by the shrinking)": lambda pixels: resized(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), SIZE),
    "OpenCV linear": lambda pixels: cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR),
    "OpenCV cubic": lambda pixels: cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
    "OpenCV area": lambda pixels: cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA),
    "torch bicubic, antialiased": by_torch,
    "Pillow bilinear": lambda pixels: Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BILINEAR),
    "Pillow bicubic": lambda pixels: Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC),
}


def parts(pictures: list[bytes], rounds: int) -> tuple[str, str]:
    """Microseconds of each decoder on whole pictures and of each filter on random crops, with the filters' pixels."""
    crops = []
    for position, data in enumerate(pictures):
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        left, upper, right, lower = map(
            int, random_box(pixels.shape[1::-1], (0.08, 1), (3 / 4, 4 / 3), Draws(0, 0, position))
        )
        crops.append(np.ascontiguousarray(pixels[upper:lower, left:right]))
    decoding = _timed(DECODERS, pictures, rounds)
    filtering = _timed(FILTERS, crops, rounds)
    exact = [np.asarray(FILTERS["Pillow bicubic"](crop)).astype(int) for crop in crops]
    rows = []
    for name, microseconds in filtering.items():
        distance = [np.abs(np.asarray(FILTERS[name](c)) - e).mean() for c, e in zip(crops, exact, strict=True)]
        rows.append([name, f"{microseconds:.0f}", f"{np.mean(distance):.2f}"])
    return (
        common.table(["decoder", "us"], [[name, f"{us:.0f}"] for name, us in decoding.items()]),
        common.table(["filter", "us", "grey levels from Pillow's bicubic"], rows),
    )


def _timed(functions: dict[str, Callable], inputs: list, rounds: int) -> dict[str, float]:
    def once(function: Callable) -> float:
        begin = time.perf_counter()
        for value in inputs:
            function(value)
        return (time.perf_counter() - begin) / len(inputs) * 1e6

    values = common.interleaved({name: partial(once, function) for name, function in functions.items()}, rounds)
    return {name: median(measured) for name, measured in values.items()}


# ---- measuring -------------------------------------------------------------------------------------------------------


def rate(make: Callable[[Data, int], Iterable], data: Data, workers: int, seconds: float) -> float:
    """Images per second, once every worker has delivered and until `seconds` or the epoch are over."""
    batches = iter(make(data, workers))
    for _ in range(2 * workers):
        batch = next(batches)
    if make is not decoding:
        image = batch["image"] if isinstance(batch, dict) else batch if torch.is_tensor(batch) else batch[0]
        assert (tuple(image.shape), image.dtype) == ((BATCH, 3, SIZE, SIZE), torch.uint8), (make, image.shape)
    begin, images = time.perf_counter(), 0
    for _ in batches:
        images += BATCH
        if (took := time.perf_counter() - begin) > seconds:
            break
    del batches
    _no_workers_left()
    return images / took


def _no_workers_left() -> None:
    """Some iterators are parts of a cycle and would keep their workers busy during somebody else's turn."""
    gc.collect()
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


def report(values: dict[int, dict[str, list[float]]]) -> str:
    """A row for each loader; for each number of workers its rate, the rounds' spread and how much faster ours is."""
    header = ["images/s"]
    for workers in values:
        header += [f"{workers} worker{'s' * (workers > 1)}", "spread", "mlc is"]
    rows = []
    for name in next(iter(values.values())):
        row = [name]
        for measured in values.values():
            faster = median(measured[OURS]) / median(measured[name])
            row += [f"{median(measured[name]):.0f}", f"{common.spread(measured[name]):.0%}", f"{faster:.2f} x"]
        rows.append(row)
    return common.table(header, rows)


def main() -> None:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes (default: 1 2)")
    parser.add_argument(
        "--only", metavar="TEXT", help="only loaders with TEXT in their name, beside ours and the limit"
    )
    parser.add_argument("--parts", action="store_true", help="instead: the decoders and the filters one could choose")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    unique, count, seconds, rounds = (32, 1024, 0.7, 1) if args.quick else (256, 4096, 2.0, args.rounds)
    chosen = {}
    for name, (make, module) in LOADERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: not installed, left out")
        elif not args.only or args.only in name or name in (OURS, LIMIT):
            chosen[name] = make
    measured = {}
    big = big_pictures(unique)
    kinds = {"640 x 480": big, "packed, short side 288": [packed_bytes(p, resize=288, quality=92)[0] for p in big]}
    for kind, pictures in kinds.items():
        size = f"{sum(map(len, pictures)) / unique / 1000:.0f} kB"
        if args.parts:
            print(f"\n{kind} ({size}), {common.rounds_said(rounds)}", *parts(pictures[:64], rounds), sep="\n\n")
            continue
        with tempfile.TemporaryDirectory() as root:
            data = Data(Path(root), pictures, count)
            write(data)
            measured[kind] = {
                workers: common.interleaved(
                    {name: partial(rate, make, data, workers, seconds) for name, make in chosen.items()}, rounds
                )
                for workers in ([1] if args.quick else args.workers)
            }
        print(f"\n{kind} ({size}), {common.rounds_said(rounds)}\n")
        print(report(measured[kind]), flush=True)
    versions = common.versions("torch", "torchvision", "timm", "webdataset", "mosaicml-streaming", "megatron-energon")
    versions |= common.versions("simplejpeg", "opencv-python-headless", "pillow")
    print(f"\n{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    common.write_json(args.json, versions=versions, images_per_second=measured)


if __name__ == "__main__":
    main()
