"""Tokenizers of a few dozen pieces, trained on the spot and laid out on disk as the published models are: BERT's and
DistilBERT's vocab.txt, RoBERTa's vocab.json and merges.txt, ALBERT's spiece.model, DeBERTa-v3's spm.model."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "a palace with something red",
    "a blue zero and an orange seven",
    "something black and a one, written over a flower",
    "Five numbers, a white one among them",
    "I can see a yellow eight",
)


def _configs(folder: Path, model_type: str, **settings) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, **settings}))


def word_pieces(folder: Path, texts: Iterable[str] = TEXTS, *, cased: bool = False, model_type: str = "bert") -> Path:
    """BERT, DistilBERT, MiniLM."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    ids = made.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.get)) + "\n", encoding="utf-8")
    _configs(folder, model_type, do_lower_case=not cased)
    return folder


def byte_pairs(folder: Path, texts: Iterable[str] = TEXTS) -> Path:
    """RoBERTa."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.model.save(str(folder))
    _configs(folder, "roberta")
    return folder


def sentence_pieces(folder: Path, kind: str, texts: Iterable[str] = TEXTS) -> Path:
    """ALBERT (`albert`) or DeBERTa-v3 (`deberta-v2`, as its configuration says)."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "albert":
        name = "spiece"
        more = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>", "unk_piece": "<unk>"}
        more |= {"control_symbols": ["[CLS]", "[SEP]"], "user_defined_symbols": ["[MASK]"]}
    else:
        name = "spm"
        more = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
        more |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / name),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **more,
    )
    (folder / f"{name}.vocab").unlink()
    _configs(folder, kind, do_lower_case=kind == "albert")
    return folder


MAKERS = {
    "bert-uncased": word_pieces,
    "bert-cased": lambda folder: word_pieces(folder, cased=True),
    "distilbert": lambda folder: word_pieces(folder, model_type="distilbert"),
    "roberta": byte_pairs,
    "albert": lambda folder: sentence_pieces(folder, "albert"),
    "deberta-v3": lambda folder: sentence_pieces(folder, "deberta-v2"),
}
