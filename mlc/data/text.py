"""Captions -> token ids, in the loader's workers: Hugging Face's fast tokenizers, and a vocabulary of whole words.

A tokenizer turns texts into (tokens int64 [B, L], mask bool [B, L]), padded to the longest of the batch; where the mask
is True is a token. A text that is empty still has one token, so that no softmax over places is ever empty. It is saved
into the run and loaded again from there, so that a model never meets another numbering than its own.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.captions import words
from shards.console import UserError
from shards.files import check_downloads, disk_errors, download_problem, whole
from shards.json_text import to_json

PAD, UNK = 0, 1  # of a word vocabulary
VOCABULARY = "vocabulary.json"
MAX_TOKENS = 64
MOST_WORDS = 50_000
Tokens = tuple[np.ndarray, np.ndarray]


class Tokenizer(Protocol):
    """What both kinds have. `pad`, `unk`, `mask`: ids, `mask` for a word that is hidden; `special`: ids that are no
    words; `starts`: whether each text begins with a special token; `max_tokens`: longest row."""

    pad: int
    unk: int
    mask: int
    special: np.ndarray
    starts: bool
    max_tokens: int

    def __call__(self, texts: Sequence[str]) -> Tokens: ...

    def __len__(self) -> int: ...

    def save(self, folder: str | Path) -> None: ...


# ---- whole words -----------------------------------------------------------------------------------------------------


class Words:
    """Whole words of the cleaned captions, for `bigru` and word embeddings: 0 is PAD, 1 UNK, then the words."""

    pad, unk, mask = PAD, UNK, UNK
    special = np.array([PAD])
    starts = False

    def __init__(self, names: Sequence[str], max_tokens: int = MAX_TOKENS):
        self.words, self.max_tokens = list(names), max_tokens
        self._ids = {word: number for number, word in enumerate(self.words, 2)}

    @classmethod
    def of(
        cls,
        captions: Iterable[str],
        *,
        min_count: int = 1,
        most: int = MOST_WORDS,
        max_tokens: int = MAX_TOKENS,
    ) -> "Words":
        """The words that the cleaned training captions have `min_count` times, the `most` frequent of them, most
        frequent first. Raises UserError where there is none."""
        counts = Counter(word for caption in captions for word in words(caption))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        kept = [word for word, count in ranked[:most] if count >= min_count]
        if not kept:
            raise UserError(
                f"no word comes {min_count} times in the training captions after cleaning, so there is no vocabulary; "
                "`mlc stats DIR --captions --clean ...` shows what is left of them"
            )
        return cls(kept, max_tokens)

    def __len__(self) -> int:
        return len(self.words) + 2

    def __call__(self, texts: Sequence[str]) -> Tokens:
        found = [[self._ids.get(word, UNK) for word in words(text)[: self.max_tokens]] for text in texts]
        return _padded(found, PAD, UNK)

    def save(self, folder: str | Path) -> None:
        with whole(Path(folder) / VOCABULARY) as building:
            content = {"max_tokens": self.max_tokens, "words": self.words}
            building.write_text(to_json(content, ensure_ascii=False, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Words":
        """Raises UserError for a file that `save` did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names, most = content["words"], int(content["max_tokens"])
            if not isinstance(names, list) or not all(isinstance(word, str) for word in names) or most < 1:
                raise ValueError("words must be texts")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = download_problem(path) or error
            raise UserError(f"{path} is no vocabulary of words ({reason}); copy it again from the run") from None
        return cls(names, most)


def _padded(rows: Sequence[Sequence[int]], pad: int, unk: int) -> Tokens:
    """Rows of ids -> tokens and mask [B, longest]; a row without any has one `unk`."""
    lengths = np.array([max(1, len(row)) for row in rows], np.int64)
    tokens = np.full((len(rows), lengths.max(initial=1)), pad, np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
        if not row:
            tokens[place, 0] = unk
    return tokens, np.arange(tokens.shape[1]) < lengths[:, None]


# ---- pieces of words -------------------------------------------------------------------------------------------------


class Pieces:
    """A fast tokenizer of Hugging Face: the numbering that a pretrained encoder was trained with."""

    def __init__(self, fast, max_tokens: int):
        """`fast`: a PreTrainedTokenizerFast with tokens for padding and for the unknown."""
        self._fast, self.max_tokens = fast, max_tokens
        self.pad, self.unk = fast.pad_token_id, fast.unk_token_id
        self.mask = self.unk if fast.mask_token_id is None else fast.mask_token_id
        self.special = np.array(sorted(fast.all_special_ids))
        self._ready()

    def _ready(self) -> None:
        """A worker has one core; threads of this process would not survive the fork into it, and would warn of it."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._backend = self._fast.backend_tokenizer
        self._backend.no_padding()
        self._backend.enable_truncation(self.max_tokens)
        empty = self._backend.encode("").ids
        self.starts = bool(empty) and self._backend.encode("a").ids[0] == empty[0]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._ready()

    def __len__(self) -> int:
        return len(self._fast)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        return _padded([found.ids for found in self._backend.encode_batch_fast(list(texts))], self.pad, self.unk)

    def save(self, folder: str | Path) -> None:
        """Hugging Face's own files; their `model_max_length` says how many tokens the model was trained with."""
        self._fast.model_max_length = self.max_tokens
        with disk_errors(Path(folder)):
            self._fast.save_pretrained(str(folder))


# ---- by name ---------------------------------------------------------------------------------------------------------


def pretrained_tokenizer(name: str, max_tokens: int = MAX_TOKENS) -> Pieces:
    """The tokenizer of a Hugging Face model, by its folder or its name on the hub.

    Raises:
        UserError: there is none, it cannot be had without network, or it is not fast.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f'--text-model {name} needs a package: pip install "mlc[text]" ({error})') from None
    folder = Path(name).expanduser()
    if folder.is_dir():
        own = r"(tokenizer|vocab|merges|special).*\.(json|txt)|.*\.model"
        check_downloads(folder, own, "--text-model")
    try:
        if folder.is_dir():
            fast = AutoTokenizer.from_pretrained(str(folder))
            if not _has_vocabulary(fast, lambda file: (folder / file).exists()):
                raise OSError("no vocabulary")
        else:
            _refuse_path(name)
            fast = _from_hub(AutoTokenizer, name)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"--text-model {name}: no tokenizer ({_first_line(error)}){_need(folder)}") from None
    _refuse_unusable(name, fast)
    return Pieces(fast, min(max_tokens, fast.model_max_length))


def load_tokenizer(folder: str | Path, max_tokens: int | None = None) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder, with its own `max_tokens` or another. Raises UserError."""
    folder = Path(folder)
    if (folder / VOCABULARY).exists():
        found: Tokenizer = Words.load(folder / VOCABULARY)
        return Words(found.words, max_tokens) if max_tokens else found
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, so no tokenizer")
    found = pretrained_tokenizer(str(folder), max_tokens=2**31)
    return Pieces(found._fast, max_tokens) if max_tokens else found


def numbering(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that number the same words alike: a model of one reads the tokens of the other."""
    names = tokenizer.words if isinstance(tokenizer, Words) else sorted(tokenizer._fast.get_vocab().items())
    return hashlib.sha256(to_json(names).encode()).hexdigest()[:16]


def _from_hub(auto, name: str):
    """From the local cache; else over the network, if a first question does not show that there is none, or no such
    model: the library itself would try six times before it says so."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        fast = auto.from_pretrained(name, local_files_only=True)
        if _has_vocabulary(fast, lambda file: isinstance(try_to_load_from_cache(name, file), str)):
            return fast
    except (OSError, ValueError):
        pass
    if constants.HF_HUB_OFFLINE:
        raise OSError("not in the local cache, and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of httpx or the hub, by version; all mean the same here
        raise OSError(f"not in the local cache, and the hub says: {_first_line(error)}") from None
    return auto.from_pretrained(name)


def _refuse_path(name: str) -> None:
    """A folder that is not there must not be looked for on the hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise OSError("no such folder")


def _need(folder: Path) -> str:
    """What to do about it."""
    if folder.is_dir():
        return "; a model's folder has tokenizer.json, or the vocabulary of its architecture, beside config.json"
    return "; give the folder of a model: where there is network, `hf download NAME --local-dir DIR`"


def _has_vocabulary(fast, there: Callable[[str], bool]) -> bool:
    """Whether a file is `there` that a tokenizer's words come from: without any, the library may make one up that knows
    special tokens and nothing else."""
    names = list(getattr(fast, "vocab_files_names", {}).values())
    return not names or any(map(there, names))


def _refuse_unusable(name: str, fast) -> None:
    if not getattr(fast, "is_fast", False):
        raise UserError(f"--text-model {name}: its tokenizer is not a fast one; save it with tokenizer.json beside it")
    for what in ("pad_token_id", "unk_token_id"):
        if getattr(fast, what) is None:
            raise UserError(f"--text-model {name}: its tokenizer has no {what.removesuffix('_id')}; use an encoder's")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
