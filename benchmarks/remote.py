"""What far shards cost: images per second and requests of the training stream from a web server with latency.

A server on loopback answers each request after a pause, as one on the internet would. The stream reads packed pictures
by range requests or through `--cache-dir`, shuffled globally or in blocks, from the first sample on; the cache either
holds the whole data set or a quarter of it. Two workers, batches of 64 pictures of 256 x 256. The server has a process
of its own on the same cores, so its own work is part of the time.
"""

import contextlib
import http.server
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import common
import torch
from loader import Data, big_pictures, write

from mlc.data.dataset import TrainDataset
from mlc.data.loader import load, plan_batches, train_positions
from mlc.data.remote import open_reader
from mlc.data.sampler import Rows, Sampler
from mlc.data.sources import open_split
from mlc.data.transforms import TrainTransform
from shards.dataset import load_dataset
from shards.image import packed_bytes

BATCH, SIZE, WORKERS, SEED = 64, 256, 2, 0
SHARDS = 128  # of 16 pictures: 8 blocks of 32 touch 24 of them, and a quarter is 32


@dataclass(frozen=True)
class Way:
    """`cache`: share of the data set that fits into --cache-dir, 0 for range requests; `block` of --shuffle block:N."""

    cache: float
    block: int


WAYS = {
    "ranges, global": Way(0, 0),
    "ranges, block:32": Way(0, 32),
    "cache of all, global": Way(1.1, 0),
    "cache of all, block:32": Way(1.1, 32),
    "cache of a quarter, global": Way(0.25, 0),
    "cache of a quarter, block:32": Way(0.25, 32),
}


# ---- server ----------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """A folder with ranges, a pause before each answer, and a count of answers and bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        time.sleep(self.server.latency)
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file():
            self.send_error(404)
            return
        with open(path, "rb") as file:
            if asked:
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                file.seek(first)
                data = file.read(last + 1 - first)
            else:
                data = file.read()
        with self.server.counts.get_lock():
            self.server.counts[0] += 1
            self.server.counts[1] += len(data)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A reader that hangs up at the end of its turn is no news."""


def _serve(folder: Path, latency: float, counts, ready) -> None:
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.latency, server.counts = latency, counts
    ready.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def serving(folder: Path, latency: float) -> Iterator[tuple[str, object]]:
    """(URL, shared counts: answers, bytes) of a server process."""
    here, there = multiprocessing.Pipe()
    counts = multiprocessing.Array("q", 2)
    process = multiprocessing.Process(target=_serve, args=(folder, latency, counts, there), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{here.recv()}", counts
    process.terminate()
    process.join()


# ---- measuring -------------------------------------------------------------------------------------------------------


def turn(way: Way, url: str, counts, bytes_in_all: int, images: int) -> tuple[float, int, int]:
    """(seconds, answers, bytes) of `images` images of a run that begins with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset(url, cache_dir=folder)
        index = open_split(dataset, "train")
        cache = {"cache_dir": folder, "cache_gb": way.cache * bytes_in_all / 1e9} if way.cache else {}
        sampler = Sampler([Rows(index, SEED, block=way.block)], [None], SEED)
        stream = TrainDataset(sampler, [open_reader(index, **cache)], TrainTransform(size=SIZE), SEED)
        plan = plan_batches(BATCH, BATCH, 1, together=1)
        counts[0] = counts[1] = 0
        begin = time.perf_counter()
        for _ in load(stream, train_positions(0, images, plan, 0), workers=WORKERS, device=torch.device("cpu")):
            pass
        return time.perf_counter() - begin, counts[0], counts[1]


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--latency", type=float, default=20, help="ms before each answer (default: %(default)s)")
    args = parser.parse_args()
    unique, count, epochs, rounds = (32, 512, 1, 1) if args.quick else (256, 2048, 1, args.rounds)
    pictures = [packed_bytes(p, resize=288, quality=92)[0] for p in big_pictures(unique)]
    ways = {name: way for name, way in WAYS.items() if not (args.quick and way == Way(0.25, 0))}
    with tempfile.TemporaryDirectory() as root:
        data = Data(Path(root), pictures, count)
        write(data, shards=SHARDS)
        size = sum(path.stat().st_size for path in data.shards.glob("train-*.tar"))
        with serving(data.shards, args.latency / 1000) as (url, counts):
            measured = common.interleaved(
                {name: partial(turn, way, url, counts, size, epochs * count) for name, way in ways.items()}, rounds
            )
    print(
        f"{common.machine()}; {count} pictures in {SHARDS} shards, {size / 1e6:.0f} MB\n{args.latency:g} ms before an "
        f"answer, one epoch, {WORKERS} workers, {common.rounds_said(rounds)}\n"
    )
    rows = []
    for name, turns in measured.items():
        rates = [count * epochs / seconds for seconds, _, _ in turns]
        requests, moved = (median(column) for column in list(zip(*turns, strict=True))[1:])
        spread = f"{common.spread(rates):.0%}"
        rows.append([name, f"{median(rates):.0f}", spread, f"{requests:.0f}", f"{moved / size:.2f}"])
    print(common.table(["way", "images/s", "spread", "requests", "bytes / data set"], rows))
    common.write_json(args.json, latency_ms=args.latency, turns=measured, versions=common.versions("fsspec", "aiohttp"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
