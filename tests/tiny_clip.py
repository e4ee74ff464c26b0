"""A tiny CLIP and a tiny SigLIP with random weights, laid out on disk as the published ones are: weights, the images'
preprocessing, and CLIP's vocabulary of byte pairs."""

import json
from pathlib import Path

import torch
from tiny_tokenizers import TEXTS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

_SIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SIDE, "image_size": 32, "patch_size": 16}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def clip(folder: Path) -> Path:
    import transformers

    folder.mkdir(parents=True)
    start, end = _byte_pairs(folder)
    text = {**_SIDE, "vocab_size": end + 1, "max_position_embeddings": 20, "bos_token_id": start, "eos_token_id": end}
    text["pad_token_id"] = end
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12)
    _save(transformers.CLIPModel(config), folder, "CLIPImageProcessor")
    return folder


def siglip(folder: Path) -> Path:
    import transformers

    text = {**_SIDE, "vocab_size": 60, "max_position_embeddings": 10, "pad_token_id": 1, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    _save(transformers.SiglipModel(config), folder, "SiglipImageProcessor")
    return folder


def _save(model: torch.nn.Module, folder: Path, processor: str) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": processor,
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _byte_pairs(folder: Path) -> tuple[int, int]:
    """Ids of the tokens that begin and end a text; the end is also what pads, as CLIP has it."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False))
    made.model.save(str(folder))
    path = folder / "vocab.json"
    vocabulary = json.loads(path.read_text())
    for letter in sorted(letters):
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    start, end = len(vocabulary), len(vocabulary) + 1
    path.write_text(json.dumps(vocabulary | {"<|startoftext|>": start, "<|endoftext|>": end}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 20, "tokenizer_class": "CLIPTokenizer"})
    )
    return start, end
