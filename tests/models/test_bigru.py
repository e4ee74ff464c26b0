"""`bigru` against torch's own layers on packed sequences, and what padding, precision and saving must not change."""

import pytest
import torch
from tiny_text import captions
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mlc.models.bigru import BiGru
from mlc.models.text import build_text_model, layer_scales
from mlc.models.text_export import export_text, load_text
from shards.console import UserError

SMALL = {"dim": 6, "hidden": 5, "dropout": 0.0}


def packed(encoder: BiGru, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(states, last states) of one bidirectional layer of torch's with the same weights."""
    kind = type(encoder.onward)
    both = kind(encoder.onward.input_size, encoder.onward.hidden_size, batch_first=True, bidirectional=True)
    state = {**encoder.onward.state_dict()}
    state |= {f"{name}_reverse": tensor for name, tensor in encoder.back.state_dict().items()}
    both.load_state_dict(state)
    words = pack_padded_sequence(encoder.embedding(tokens), mask.sum(1), batch_first=True, enforce_sorted=False)
    states, last = both(words)
    last = last[0] if isinstance(last, tuple) else last
    return pad_packed_sequence(states, batch_first=True)[0], torch.cat((last[0], last[1]), -1)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_it_is_torchs_layer_on_packed_sequences(cell):
    encoder = BiGru(60, cell=cell, attention=False, **SMALL)
    tokens, mask = captions()
    states, pooled = encoder(tokens, mask)
    expected, last = packed(encoder, tokens, mask)
    torch.testing.assert_close(states[mask], expected[mask])
    torch.testing.assert_close(pooled, last)
    assert encoder.num_features == 10 == pooled.shape[1]


def test_attention_is_its_formula():
    encoder = BiGru(60, **SMALL)
    tokens, mask = captions()
    states, pooled = encoder(tokens, mask)
    pool = encoder.pool
    for row, real, found in zip(states, mask, pooled, strict=True):
        u = torch.tanh(row[real] @ pool.project.weight.T + pool.project.bias)
        torch.testing.assert_close(found, torch.softmax(u @ pool.score.weight[0], 0) @ row[real])


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_padding_and_the_batch_change_nothing(cell, attention):
    encoder = BiGru(60, cell=cell, attention=attention, norm=True, **SMALL).eval()
    tokens, mask = captions()
    more = nn.functional.pad(tokens, (0, 7)), nn.functional.pad(mask, (0, 7))
    (states, pooled), (long, again) = encoder(tokens, mask), encoder(*more)
    torch.testing.assert_close(long[:, :9][mask], states[mask])
    torch.testing.assert_close(again, pooled)
    alone = encoder(tokens[2:3, : mask[2].sum()], mask[2:3, : mask[2].sum()])[1]
    torch.testing.assert_close(alone, pooled[2:3])


def test_word_vectors_to_start_from():
    vectors = torch.randn(60, 7)
    encoder = build_text_model("bigru", vocabulary=60, embeddings=vectors.numpy(), kwargs={"hidden": 5})
    assert torch.equal(encoder.embedding.weight[1:], vectors[1:]) and not encoder.embedding.weight[0].any()
    tokens, mask = captions()
    encoder(tokens, mask)[1].square().sum().backward()
    assert not encoder.embedding.weight.grad[0].any()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    default = build_text_model("bigru", vocabulary=60)
    assert default.embedding.weight.shape == (60, 150) and default.num_features == 256
    assert 0.9 < default.embedding.weight[1:].norm(dim=1).mean() < 1.1
    assert set(layer_scales(default, 0.5).values()) == {1}


def test_it_learns_from_the_order_of_words():
    """Which of two words came first, with words between them; a bag of words cannot know."""
    torch.manual_seed(0)
    encoder = BiGru(10, **SMALL | {"dropout": 0.1}, norm=True)
    classifier = nn.Linear(10, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *classifier.parameters()], lr=2e-2)
    first = torch.rand(64) < 0.5
    tokens = torch.stack([torch.tensor([2, 4, 5, 3, 0] if f else [3, 4, 5, 2, 0]) for f in first])
    mask = tokens > 0
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(classifier(encoder(tokens, mask)[1])[:, 0], first.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_bfloat16_is_near_float32_and_learns(cell):
    encoder = BiGru(60, cell=cell, **SMALL)
    tokens, mask = captions()
    with torch.autocast("cpu", torch.bfloat16):
        _, low = encoder(tokens, mask)
    torch.testing.assert_close(low.float(), encoder(tokens, mask)[1], atol=0.03, rtol=0.03)
    low.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"cell": "lstm", "attention": False, "norm": True}])
def test_saved_it_loads_again(kwargs, tmp_path):
    encoder = BiGru(60, **SMALL, **kwargs)
    encoder(*captions())  # moves the statistics
    encoder.eval()
    export_text(encoder, tmp_path)
    again = load_text(tmp_path)
    assert not again.training and again.settings == encoder.settings
    assert torch.equal(again(*captions())[1], encoder(*captions())[1])
    weights = tmp_path / "text" / "model.safetensors"
    weights.unlink()
    load_text(tmp_path, weights=False)
    with pytest.raises(UserError, match=r"model.safetensors: missing or damaged"):
        load_text(tmp_path)
    export_text(BiGru(61, **SMALL, **kwargs), tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "text" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit the config\.json beside it"):
        load_text(tmp_path)
