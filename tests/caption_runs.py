"""Short runs with captions, for several tests."""

import csv
from pathlib import Path

import numpy as np
import torch
from conftest import TINY
from safetensors.torch import load_file
from tiny_text import tiny
from tiny_tokenizers import MAKERS

SMALL = {
    "early": ["--fusion-kwargs", "width=8", "hidden=8"],
    "gated": ["--fusion-kwargs", "width=8"],
    "cross-attention": ["--fusion-kwargs", "width=8", "heads=2", "hidden=8", "dropout=0"],
}
BIGRU = ["--text-model", "bigru", "--text-kwargs", "dim=12", "hidden=6", "dropout=0"]
NO_DROPOUT = ["--text-kwargs", "hidden_dropout_prob=0", "attention_probs_dropout_prob=0"]


def hub_folder(kind: str, folder: Path) -> Path:
    """A folder as `hf download` leaves it, encoder and tokenizer; kind: a name of tiny_tokenizers.MAKERS."""
    encoder = kind.removesuffix("-cased").removesuffix("-uncased")
    place = tiny(encoder, folder, vocab_size=200, max_position_embeddings=80, hidden_dropout_prob=0.1)
    config = (place / "config.json").read_text()
    MAKERS[kind](place)
    (place / "config.json").write_text(config)
    return place


def argv(shards, folder, fusion: str, *more: str, name: str = "run") -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", name, "-b", "8", "-j", "0"]
    steps = ["--max-steps", "2", "--log-interval", "1", "--eval-every", "2st", "--lr", "1e-3", "--mixup", "0.4"]
    return [*TINY, *short, *steps, "--fusion", fusion, *SMALL.get(fusion, []), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def table(path: Path) -> np.ndarray:
    with path.open() as file:
        return np.array([[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
