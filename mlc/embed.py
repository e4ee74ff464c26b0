"""Word vectors trained on the captions of a data set, for `--text-model bigru --embeddings`: in a file by `mlc embed`,
or when the run begins.

Small collections of captions have words and meanings that no published vectors know. gensim trains them; one thread and
a seed make the same file every time. Files are word2vec's own text or binary format, so that other programs read them,
and theirs (word2vec, fastText, GloVe) serve here.
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlc.data.captions import cleaned
from mlc.data.order import uniform
from mlc.data.sampler import Rows
from mlc.data.text import Words
from shards.captions import SWITCHES, switches, words
from shards.console import Parser, UserError, did_you_mean, say
from shards.dataset import load_dataset, open_index
from shards.files import check_download, whole

KINDS = ("fasttext", "word2vec-skipgram", "word2vec-cbow")
NGRAMS = 200_000  # rows for fastText's pieces of words; its own 2,000,000 are for a whole language, and gigabytes
SUFFIXES = {".vec": False, ".txt": False, ".bin": True}  # binary?
FASTTEXT = (793712314).to_bytes(4, "little")  # how a model begins that fastText's own program saved


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    _binary(out)
    chosen = switches(options.clean)
    dataset = load_dataset(options.data)
    sentences = [words(caption) for caption in cleaned(open_index(dataset, options.split), chosen)]
    vectors = train_embeddings(
        sentences,
        options.kind,
        dim=options.dim,
        epochs=options.epochs,
        window=options.window,
        min_count=options.min_count,
        seed=options.seed,
    )
    with whole(out) as building:
        vectors.save_word2vec_format(str(building), binary=_binary(out))
    say(f"{out}: {len(vectors)} words x {options.dim}, {options.kind}, from {len(sentences)} captions")


def train_embeddings(
    sentences: Sequence[Sequence[str]],
    kind: str,
    *,
    dim: int,
    epochs: int = 10,
    window: int = 5,
    min_count: int = 1,
    seed: int = 0,
):
    """gensim's KeyedVectors of the words that come at least `min_count` times; the same at every call.

    fastText (Bojanowski et al. 2017) is trained by skip-gram; word2vec (Mikolov et al. 2013) by skip-gram or CBOW.

    Raises:
        UserError: gensim is missing, or no word is left.
    """
    if not any(sentences):
        raise UserError("there is no word in the captions, so nothing to train; `mlc stats DIR --captions` shows them")
    models = _gensim()
    common = {"vector_size": dim, "window": window, "min_count": min_count, "epochs": epochs, "seed": seed}
    common |= {"sentences": sentences, "workers": 1, "sg": int(kind != "word2vec-cbow")}
    common["sample"] = 0  # leaving out frequent words is meant for billions of words; few are left of short captions
    try:
        model = models.FastText(bucket=NGRAMS, **common) if kind == "fasttext" else models.Word2Vec(**common)
    except RuntimeError as error:  # "you must first build vocabulary before training the model"
        raise UserError(f"no word comes --min-count {min_count} times in the captions ({error})") from None
    return model.wv


def read_embeddings(
    source: str | Path, vocabulary: Words, *, parts: Iterable[Rows] = (), clean: Sequence[str] = (), dim: int = 150
) -> tuple[np.ndarray, float]:
    """(float32 [V, D], share of the words that have a vector) for the ids of a vocabulary.

    source: a file in word2vec's text or binary format, GloVe's text (which has no first line) or fastText's own `.bin`;
    or one of KINDS, trained as `mlc embed` does by default, with `dim` numbers a word, on the captions of `parts`.

    A word that has no vector is looked for in lower case. PAD is zero; UNK and words that are not found are uniform
    with the standard deviation of the others, and always the same.

    Raises:
        UserError: the file is missing, damaged or of another kind, or has none of the words.
    """
    if source in KINDS:
        texts = (text for rows in parts for text in cleaned(rows.index, clean, rows.rows))
        vectors = train_embeddings([words(text) for text in texts], source, dim=dim)
    else:
        vectors = _read(Path(source))
    rows = {number: _vector(vectors, word) for number, word in enumerate(vocabulary.words, 2)}
    rows = {number: vector for number, vector in rows.items() if vector is not None}
    if not rows:
        raise UserError(f"--embeddings {source}: it has none of the {len(vocabulary.words)} words of the captions")
    places, dim = np.array(list(rows)), vectors.vector_size
    found = np.stack(list(rows.values())).astype(np.float32)
    if not np.isfinite(found).all():
        raise UserError(f"--embeddings {source}: some of its vectors are not finite; make it anew")
    noise = uniform(0, np.arange(len(vocabulary))[:, None], np.arange(dim)) * 2 - 1
    matrix = (noise * math.sqrt(3) * found.std()).astype(np.float32)
    matrix[places], matrix[vocabulary.pad] = found, 0
    return matrix, len(rows) / len(vocabulary.words)


# ---- files -----------------------------------------------------------------------------------------------------------


def _binary(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected .vec or .txt (text) or .bin (binary), as word2vec writes them")
    return SUFFIXES[path.suffix]


def _read(path: Path):
    """gensim's KeyedVectors of a file."""
    if path.suffix not in SUFFIXES:
        kinds = f"{', '.join(KINDS)}{did_you_mean(str(path), KINDS)}"
        raise UserError(f"--embeddings {path}: expected .vec, .txt or .bin, or one of {kinds}")
    models, binary = _gensim(), _binary(path)
    check_download(path, "--embeddings")
    with _damage(path):
        with path.open("rb") as file:
            first = file.readline(1_000_000)
        if first.startswith(FASTTEXT):
            return models.fasttext.load_facebook_vectors(str(path))
        header = first.split()
        if binary or len(header) == 2:
            _check_header(header, path.stat().st_size, binary)
        return models.KeyedVectors.load_word2vec_format(
            str(path), binary=binary, no_header=len(header) != 2 and not binary, unicode_errors="replace"
        )


def _check_header(header: Sequence[bytes], size: int, binary: bool) -> None:
    """A wrong first line must not take all of the memory."""
    count, dim = map(int, header)
    if not (count > 0 < dim and count * dim * (4 if binary else 2) <= size):
        raise ValueError(f"{count} words x {dim} do not fit a file of {size} bytes")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # fed with damage, a parser that checks little raises anything
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--embeddings {path} cannot be read as word vectors ({reason}); `mlc embed` writes such files"
        ) from None


def _vector(vectors, word: str) -> np.ndarray | None:
    for name in (word, word.lower()):
        if name in vectors:
            return vectors[name]
    return None


def _gensim():
    try:
        from gensim import models
    except ImportError as error:
        raise UserError(f'word embeddings need a package: pip install "mlc[text]" ({error})') from None
    return models


# ---- flags -----------------------------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(
        prog="mlc embed",
        description="Trains word vectors on the captions of a data set, for --text-model bigru.",
        epilog="example: mlc embed --data DIR --kind fasttext --clean punctuation,lower,stopwords,lemmas --out "
        "words.vec\nTrain with the same --clean.",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder or URL of a packed data set")
    add("--split", default="train", help="its split (train)")
    add("--kind", choices=KINDS, default=KINDS[0], help="fasttext is skip-gram with pieces of words (fasttext)")
    add("--dim", type=_at_least_one, default=150, help="numbers a word (150)")
    add("--epochs", type=_at_least_one, default=10, help="passes over the captions (10)")
    add("--window", type=_at_least_one, default=5, help="words on each side that belong together (5)")
    add("--min-count", type=_at_least_one, default=1, help="leave out words that come less often (1)")
    add("--seed", type=int, default=0, help="(0)")
    add("--clean", action="append", default=[], metavar="a,b,c", help=f"what to clean, of {', '.join(SWITCHES)}")
    add("--out", required=True, metavar="FILE.vec|FILE.bin", help="word2vec's text or binary format, by its ending")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)
