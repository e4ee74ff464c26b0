"""`mlc features`: what frozen encoders make of every sample, once, in one Arrow file, for `mlc train --features FILE`.

A backbone that is not trained computes the same for ever. Its features are a few kilobytes a sample; a head on them
trains in minutes on a CPU, so that heads, losses and fusions can be tried by the dozen.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlc.batch_size import in_prediction
from mlc.captions import MOST
from mlc.config import flag
from mlc.data.captions import EvalCaptions
from mlc.data.dataset import BadSamples, Batch, EvalDataset
from mlc.data.features import write_features
from mlc.data.loader import readers
from mlc.data.reader import TarReader
from mlc.data.remote import open_reader
from mlc.data.sources import open_split
from mlc.data.text import MAX_TOKENS, Tokenizer, load_tokenizer, pretrained_tokenizer
from mlc.data.transforms import EvalTransform, parse_crop
from mlc.inference import View, logits_of_rows, tta_views
from mlc.models.build import on_device
from mlc.models.encoders import Encoders, ImageEncoder, digest, encoders_of_run, image_encoder, text_encoder
from mlc.models.export import exported_crop, load_exported
from mlc.models.fusion import Captions
from mlc.models.text import text_folder
from mlc.parallel import launch
from mlc.predict import add_cache_flags, add_compute_flags, weights_folder
from shards.captions import SWITCHES, switches
from shards.console import Parser, UserError, finite, say
from shards.dataset import load_dataset

DTYPES = {"float32": np.float32, "float16": np.float16}


@launch.peers()
@readers()
@in_prediction()
def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    _refuse(options)
    views = tta_views(options.tta)
    dataset = load_dataset(options.data, cache_dir=options.cache_dir)
    names = [name.strip() for name in options.split.split(",") if name.strip()]
    indexes = {name: open_split(dataset, name) for name in names}

    # ---- Launch: one CPU thread per process, as in prediction
    accelerator = launch.start(options.amp_dtype)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)
    source = open_encoders(options)
    if views[1:] and not source.seeing:
        raise UserError(f"--tta {options.tta} shows several views of an image, and no encoder looks at any")
    told = source.described(options.tta)
    width = sum(encoder["features"] for encoder in told)
    on_device(source.encoders, accelerator.device)

    # ---- Every row once
    found = {}
    bad = BadSamples(options.max_bad_samples)
    for name, index in indexes.items():
        reader = open_reader(index, cache_dir=options.cache_dir, cache_gb=options.cache_gb)
        how = {"views": views, "bad": bad, "title": f"features of {name}"}
        values, seen = encode(source, reader, accelerator, options, width=width, **how)
        found[name] = index, values, seen

    # ---- Write
    if accelerator.is_main_process:
        out = Path(options.out)
        write_features(out, found, data=dataset.fingerprint, encoders=told)
        parts = " + ".join(f"{encoder['features']} of {encoder['name']}" for encoder in told)
        counts = ", ".join(f"{name} {len(index)}" for name, (index, _, _) in found.items())
        say(f"{out}: {counts} samples x {parts}, {options.dtype}, {out.stat().st_size / 1e6:.1f} MB")
    accelerator.end_training()


@dataclass(frozen=True)
class Seeing:
    """An image encoder, and how its images are cut."""

    name: str
    encoder: ImageEncoder
    crop: str
    crop_pct: float


@dataclass(frozen=True)
class Reading:
    """A text encoder, tokens and token_mask -> (words, pooled [B, D]), and how its captions are read."""

    name: str
    encoder: nn.Module
    tokenizer: Tokenizer
    clean: tuple[str, ...]
    pool: str


class Source:
    """What makes the features: of images, of captions, or of both side by side."""

    def __init__(self, seeing: Seeing | None, reading: Reading | None):
        self.seeing, self.reading, text = seeing, reading, None
        if reading:
            empty = reading.tokenizer([""])[0][0].tolist()
            text = Captions(reading.encoder, 0, empty, learned=False)
        self.encoders = Encoders(seeing and seeing.encoder, text).eval().requires_grad_(False)

    def described(self, tta: str) -> list[dict[str, Any]]:
        """Of each encoder what it is, and its number of `features`."""
        told = []
        if self.seeing:
            own = self.seeing.encoder
            with torch.no_grad():
                features = own(torch.zeros(1, 3, own.size, own.size)).shape[1]
            how = {"img_size": own.size, "mean": list(own.mean), "std": list(own.std), "crop": self.seeing.crop}
            how |= {"crop_pct": self.seeing.crop_pct, "tta": tta}
            told.append({"name": self.seeing.name, "features": features, "weights": digest(own.state_dict()), **how})
        if self.reading:
            own, tokenizer = self.reading.encoder, self.reading.tokenizer
            how = {"pool": self.reading.pool, "max_tokens": tokenizer.max_tokens, "clean": list(self.reading.clean)}
            told.append(
                {"name": self.reading.name, "features": own.num_features, "weights": digest(own.state_dict()), **how}
            )
        return told


def encode(
    source: Source,
    reader: TarReader,
    accelerator: Accelerator,
    options: Namespace,
    *,
    width: int,
    views: Sequence[View],
    bad: BadSamples,
    title: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D] of all rows of the reader's split, averaged over the views, zero where the image is bad; bool
    [N], whether it is not), the same on every process.

    Raises:
        UserError: a feature is not a number.
    """
    rows, seeing, captions = np.arange(len(reader)), source.seeing, None
    if source.reading:
        captions = EvalCaptions(reader.index, source.reading.tokenizer, clean=source.reading.clean, most=MOST)
    norm = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    transform = EvalTransform(size=1)
    if seeing:
        norm = {"mean": seeing.encoder.mean, "std": seeing.encoder.std}
        how = {"crop": seeing.crop, "crop_pct": seeing.crop_pct, "mean": norm["mean"]}
        transform = EvalTransform(size=seeing.encoder.size, **how)
    values, seen = np.zeros((len(rows), width), DTYPES[options.dtype]), np.zeros(len(rows), bool)
    for row, found in logits_of_rows(
        [source.encoders],
        EvalDataset(reader, transform, rows, captions=captions, images=seeing is not None),
        accelerator,
        batch_size=options.batch_size,
        workers=options.workers,
        **norm,
        bad=bad,
        views=views,
        title=title,
        answer=_encoded,
    ):
        assert not seen[row].any(), "a row was encoded twice"
        with np.errstate(over="ignore"):
            values[row], seen[row] = found[:, 0].astype(np.float64).mean(1), True
        wrong = ~np.isfinite(values[row]).all(1)
        if wrong.any():
            raise UserError(
                f"{reader.name(int(row[wrong.argmax()]))}: a feature is not a number, or too large for "
                f"{options.dtype}; try --amp-dtype none and --dtype float32"
            )
    return values, seen


def _encoded(encoders: nn.Module, image: Tensor | None, batch: Batch) -> Tensor:
    return encoders(image, *(batch.get(name) for name in ("tokens", "token_mask", "caption_weight")))


# ---- encoders --------------------------------------------------------------------------------------------------------


def open_encoders(options: Namespace) -> Source:
    """What the flags name, on the CPU. Raises UserError."""
    seeing, reading = _of_run(options) if options.run else (None, None)
    if options.model:
        if seeing:
            raise UserError(f"--model {options.model}: --run {options.run} sees images itself; leave one of them out")
        parse_crop(options.val_crop)
        told = {"pretrained": options.pretrained, "path": options.pretrained_path, "img_size": options.img_size}
        encoder = image_encoder(options.model, **told)
        seeing = Seeing(Path(options.model).name, encoder, options.val_crop, options.crop_pct)
    if options.text_model:
        if reading:
            raise UserError(f"--text-model {options.text_model}: --run {options.run} reads captions itself")
        reading = _text(options)
    return Source(seeing, reading)


def _of_run(options: Namespace) -> tuple[Seeing | None, Reading | None]:
    folder = weights_folder(options.run, options.weights)
    model, info = load_exported(folder)
    image, text = encoders_of_run(model, info)
    name, own = Path(options.run).resolve().name, info.get("mlc", {})
    seeing = image and Seeing(name, image, exported_crop(info), info["pretrained_cfg"]["crop_pct"])
    reading = None
    if text is not None:
        tokenizer, pool = load_tokenizer(folder / "text"), getattr(text, "pool_kind", "own")
        reading = Reading(f"{name}'s captions", text, tokenizer, tuple(own.get("clean", ())), pool)
    return seeing, reading


def _text(options: Namespace) -> Reading:
    name = options.text_model
    if name == "bigru":
        raise UserError("--text-model bigru has no published weights; train one and give --run RUN")
    named = Path(name).expanduser()
    tokenizer = pretrained_tokenizer(str(text_folder(named)) if named.is_dir() else name, options.max_tokens)
    encoder = text_encoder(name, options.text_pool, len(tokenizer))
    if encoder.max_tokens and tokenizer.max_tokens > encoder.max_tokens:
        raise UserError(f"--max-tokens {tokenizer.max_tokens}: {name} reads {encoder.max_tokens}")
    pool = getattr(encoder, "pool_kind", "own")
    return Reading(named.name, encoder, tokenizer, switches(options.clean), pool)


# ---- flags -----------------------------------------------------------------------------------------------------------


# What means nothing without another flag: {that: {flag: default}}.
_OF = {
    "model": {"pretrained": False, "pretrained_path": None, "img_size": None, "val_crop": "squish", "crop_pct": 1.0},
    "text_model": {"text_pool": "cls", "max_tokens": MAX_TOKENS, "clean": []},
}


def _refuse(options: Namespace) -> None:
    if not (options.model or options.text_model or options.run):
        raise UserError("name an encoder: --model, --text-model or --run")
    if not options.split.strip(" ,"):
        raise UserError("--split names no split")
    for needed, defaults in _OF.items():
        for name, default in defaults.items():
            if not getattr(options, needed) and getattr(options, name) != default:
                raise UserError(f"{flag(name)} needs {flag(needed)}; a --run brings its own")


def _parser() -> Parser:
    parser = Parser(
        prog="mlc features",
        description="Writes what frozen encoders make of the images and captions of a data set.",
        epilog="example: mlc features --data DIR --split train,val,test --model FOLDER/clip-vit-base-patch16 "
        "--text-model FOLDER/clip-vit-base-patch16 --out features.arrow\n"
        "then:    mlc train --data DIR --features features.arrow --experiment head",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="packed data set: a folder or a URL")
    add("--split", default="train,val", help="its splits, comma-separated (default: train,val)")
    add("--model", default="", metavar="NAME|FOLDER", help="image encoder: a timm name, or one of Hugging Face")
    add("--pretrained", action="store_true", help="timm: with its published weights")
    add("--pretrained-path", metavar="FILE", help="timm: with these weights")
    add("--img-size", type=int, help="timm: pixels of a side (default: what it was trained with)")
    add("--val-crop", default="squish", help="squish, center, pad or if-needed:2 (default: squish)")
    add("--crop-pct", type=finite, default=1.0, help="--val-crop center: share of the short side (default: 1)")
    add("--tta", default="", help="views to average, comma-separated: hflip, scale")
    add("--text-model", default="", metavar="NAME|FOLDER", help="text encoder of Hugging Face, CLIP-like ones included")
    add("--text-pool", choices=("cls", "mean"), default="cls", help="its pooling; CLIP-like ones pool for themselves")
    add("--max-tokens", type=int, default=MAX_TOKENS, help=f"captions are cut to so many tokens ({MAX_TOKENS})")
    add("--clean", action="append", default=[], metavar="a,b,c", help=f"what to clean, of {', '.join(SWITCHES)}")
    add("--run", default="", help="the encoders of a finished run, preprocessing included")
    add("--weights", choices=("best", "last"), default="best", help="which weights of the run (default: best)")
    add("--dtype", choices=DTYPES, default="float32", help="of the file (default: float32)")
    add("--out", required=True, metavar="FILE.arrow", help="file to write")
    add_cache_flags(parser)
    add_compute_flags(parser)
    return parser
