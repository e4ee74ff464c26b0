"""Cleaning of captions. What helps one text model harms another (BERT reads commas and stop words, a bag of words does
not), so every step is a switch of its own, and `mlc stats DIR --captions --clean ...` shows what it does to the data.

Each step is a pure function of the text; they run in the fixed order of `SWITCHES`, however they are given: symbols
first, because mojibake hides all else, and mentions before the punctuation that marks them. Packages are imported by
the step that needs them (`pip install "mlc[text]"`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.console import UserError, did_you_mean
from shards.dataset import Index

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
MENTION = re.compile(r"https?://\S+|www\.\S+|(?<![\w@])@\w+", re.IGNORECASE)
OUTER_QUOTE = re.compile(r"(?<![^\W_])['’]|['’](?![^\W_])")  # the apostrophe of "man's" belongs to its word


class _Signs(dict):
    """For str.translate: a character of Unicode's kinds P (punctuation) and S (symbol) becomes a blank."""

    def __missing__(self, code: int) -> int | str:
        self[code] = " " if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_SIGNS = _Signs({ord("'"): "'", ord("’"): "'"})


def _symbols(text: str) -> str:
    """Mojibake, HTML entities, curly quotes, ligatures and control characters put right by ftfy."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # what ftfy would say, at a fiftieth of its time
    return _ftfy().fix_text(text)


def _mentions(text: str) -> str:
    """Without @names and addresses."""
    return MENTION.sub(" ", text)


def _punctuation(text: str) -> str:
    """Without punctuation and symbols of any script; "red-brick" is two words, "man's" one."""
    return OUTER_QUOTE.sub(" ", text).translate(_SIGNS)


def _stopwords(text: str) -> str:
    """Without scikit-learn's English stop words, whatever their case; numbers as far as "twelve" are among them."""
    stop = _stop_words()
    return WORD.sub(lambda word: "" if word[0].lower().replace("'", "").replace("’", "") in stop else word[0], text)


def _lemmas(text: str) -> str:
    """Each word's dictionary form by simplemma's English list: cars -> car, ate -> eat."""
    lemmatize = _lemmatizer()
    return WORD.sub(lambda word: lemmatize(word[0].replace("’", "'")), text)


STEPS: dict[str, Callable[[str], str]] = {
    "symbols": _symbols,
    "mentions": _mentions,
    "punctuation": _punctuation,
    "lower": str.lower,
    "stopwords": _stopwords,
    "lemmas": _lemmas,
}
SWITCHES = tuple(STEPS)


def switches(names: Iterable[str]) -> tuple[str, ...]:
    """Names, alone or several with commas, -> the switches in the order they run, each once.

    Raises:
        UserError: there is no such switch, or its package is missing.
    """
    given = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    for name in given:
        if name not in STEPS:
            raise UserError(f"--clean {name}: no such switch{did_you_mean(name, SWITCHES)} ({', '.join(SWITCHES)})")
    chosen = tuple(name for name in SWITCHES if name in given)
    clean("é", chosen)  # a missing package is told now and not by a worker
    return chosen


def clean(caption: str, chosen: Sequence[str]) -> str:
    """The caption after `switches`; blanks are trimmed and collapsed always."""
    for name in chosen:
        caption = STEPS[name](caption)
    return " ".join(caption.split())


def words(caption: str) -> list[str]:
    """Words of a caption for models without a tokenizer of their own: no punctuation, case as it is."""
    return _punctuation(caption).split()


def split_captions(text: str) -> list[str]:
    """The captions of a sample: the lines of its `.txt` that are not blank."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def most_captions(index: Index) -> int:
    """How many captions a sample has at most, 1 or more; some blank lines count too."""
    lines = pc.count_substring(pc.utf8_trim_whitespace(index.batch.column("caption")), "\n")
    return 1 + (pc.max(lines).as_py() or 0)


def caption_texts(index: Index, rows: np.ndarray | None = None) -> Iterator[str]:
    """What each sample has in its `.txt`, "" for none, in the order of `rows` (all)."""
    column = index.batch.column("caption")
    for start in range(0, len(index) if rows is None else len(rows), 4096):
        part = column.slice(start, 4096) if rows is None else column.take(pa.array(rows[start : start + 4096]))
        yield from part.to_pylist()


# ---- packages ----


@cache
def _ftfy():
    try:
        import ftfy
    except ImportError as error:
        raise _missing("symbols", error) from None
    return ftfy


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # here, because it takes a second to load

    return ENGLISH_STOP_WORDS


@cache
def _lemmatizer() -> Callable[[str], str]:
    try:
        import simplemma
    except ImportError as error:
        raise _missing("lemmas", error) from None
    return lru_cache(65536)(partial(simplemma.Lemmatizer().lemmatize, lang="en"))


def _missing(name: str, error: ImportError) -> UserError:
    return UserError(f'--clean {name} needs a package: pip install "mlc[text]" ({error})')
