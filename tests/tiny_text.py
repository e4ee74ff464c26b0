"""Tiny encoders with random weights in the layout that Hugging Face's hub has them in: with the heads they were
pretrained with, whose weights an encoder must do without."""

from pathlib import Path

import torch

_COMMON = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_BERT = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 40}
_DISTILBERT = {"vocab_size": 60, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48}
_DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_relative_positions": -1,
}
KINDS = {  # name: (model_type, configuration, the class whose files the hub has)
    "bert": ("bert", _BERT, "BertForPreTraining"),
    "albert": ("albert", {**_BERT, "embedding_size": 16, "num_hidden_layers": 3}, "AlbertForPreTraining"),
    "deberta-v3": ("deberta-v2", {**_BERT, **_DEBERTA_V3}, "DebertaV2ForMaskedLM"),
    "distilbert": ("distilbert", {**_DISTILBERT, "max_position_embeddings": 40}, "DistilBertForMaskedLM"),
    "minilm": ("bert", {**_BERT, "num_attention_heads": 8}, "BertModel"),
    "roberta": ("roberta", {**_BERT, "pad_token_id": 1, "max_position_embeddings": 42}, "RobertaForMaskedLM"),
}


def tiny(kind: str, folder: Path, seed: int = 0, **changes) -> Path:
    """`folder/KIND` with `config.json` and `model.safetensors`."""
    import transformers

    model_type, settings, published = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, published)(config)
    for parameter in model.parameters():  # the published initialisation is so small that much of it is nothing
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / kind)
    return folder / kind


def captions(rows: int = 4, length: int = 9, pad: int = 0, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of captions of unlike lengths, one of them as long as the batch and one of a single token."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, 1, *torch.randint(2, length, (rows - 2,), generator=random).tolist()])
    mask = torch.arange(length) < lengths[:, None]
    return torch.randint(4, 60, (rows, length), generator=random).where(mask, pad), mask
