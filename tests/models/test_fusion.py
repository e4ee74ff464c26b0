"""Each fusion against its formula written plainly, on backbones of every kind of map, and as the house asks for it."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_fusion import BACKBONES, EMPTY, MASK, TOKENS, TinyText, build, image_model, images, spoilt
from torch import nn

from mlc.models.features import PooledFeatures
from mlc.models.freeze import freeze
from mlc.models.fusion import FUSIONS, Captions, Fused, check_fusion
from mlc.models.fusion_kinds import Bilinear, Concat, CrossAttention, Early, Gated, Late, mixed
from mlc.models.heads import classifier_prefixes, init_head_bias, timm_classifiers
from mlc.optim.ema import Ema
from mlc.optim.param_groups import param_groups
from mlc.parallel import compiler
from mlc.parallel.recompute import recompute
from mlc.parallel.strategy import blocks
from shards.console import UserError

# ---- formulas --------------------------------------------------------------------------------------------------------


def test_concat_and_bilinear_are_the_reports():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    concat, bilinear = spoilt(Concat(3)), spoilt(Bilinear(3))
    w, b = concat.linear.weight, concat.linear.bias
    torch.testing.assert_close(concat(x, y), x @ w[:, :3].t() + y @ w[:, 3:].t() + b)
    w, b = bilinear.bilinear.weight, bilinear.bilinear.bias
    plain = torch.stack([torch.stack([x[n] @ w[k] @ y[n] + b[k] for k in range(3)]) for n in range(4)])
    torch.testing.assert_close(bilinear(x, y), plain)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_late_is_the_logit_of_the_average(share):
    x, y = torch.randn(4, 3, dtype=torch.float64) * 3, torch.randn(4, 3, dtype=torch.float64) * 3
    p = share * x.sigmoid() + (1 - share) * y.sigmoid()
    late = Late(3, share=share)
    torch.testing.assert_close(late(x, y, torch.ones(4, 1)).double(), p.logit(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(late(x, y, torch.zeros(4, 1)).double(), x, rtol=1e-5, atol=1e-5)


def test_late_is_exact_and_differentiable_where_probabilities_are_one():
    x = torch.tensor([[60.0, -80.0, 300.0]], requires_grad=True)
    logits = Late(3)(x, x, torch.ones(1, 1))
    torch.testing.assert_close(logits, x)
    logits.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(1, 3))


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("norm", [True, False])
def test_early(norm, hidden):
    fusion = spoilt(Early(6, 4, 3, width=8, hidden=hidden, norm=norm)).train()
    x, y = torch.randn(7, 6), torch.randn(7, 4)
    both = []
    for value, (linear, batch_norm, _) in ((x, fusion.image), (y, fusion.text)):
        z = value @ linear.weight.t() + linear.bias
        if norm:
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * batch_norm.weight + batch_norm.bias
        both.append(z.clamp_min(0))
    z = torch.cat(both, 1)
    if hidden:
        z = (z @ fusion.mlp[0].weight.t() + fusion.mlp[0].bias).clamp_min(0)
    torch.testing.assert_close(fusion(x, y), z @ fusion.classifier.weight.t() + fusion.classifier.bias)


def test_gated():
    fusion = spoilt(Gated(6, 4, 3, width=8))
    x, y = torch.randn(5, 6), torch.randn(5, 4)
    z = torch.sigmoid(torch.cat([x, y], 1) @ fusion.gate.weight.t())
    h = z * torch.tanh(x @ fusion.image.weight.t()) + (1 - z) * torch.tanh(y @ fusion.text.weight.t())
    torch.testing.assert_close(fusion(x, y), h @ fusion.classifier.weight.t() + fusion.classifier.bias)


def test_cross_attention_is_torchs_and_does_not_see_padding():
    fusion = spoilt(CrossAttention(6, 4, 3, width=8, heads=2, hidden=5))
    places, words, mask = torch.randn(2, 3, 2, 6), torch.randn(2, 4, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]) > 0
    reference, own = nn.MultiheadAttention(8, 2, batch_first=True).eval(), fusion.attention
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([own.q.weight, own.k.weight, own.v.weight]))
        reference.in_proj_bias.copy_(torch.cat([own.q.bias, own.k.bias, own.v.bias]))
        reference.out_proj.load_state_dict(own.out.state_dict())
    x = fusion.image(places.reshape(2, 6, 6))
    w = fusion.norm_text(fusion.text(words))
    x = x + reference(fusion.norm1(x), w, w, key_padding_mask=~mask)[0]
    x = x + fusion.fc2(F.gelu(fusion.fc1(fusion.norm2(x))))
    expected = fusion.classifier(fusion.norm(x).mean(1))
    torch.testing.assert_close(fusion(places, words, mask), expected)
    longer = F.pad(words, (0, 0, 0, 3), value=9.0), F.pad(mask, (0, 3))
    torch.testing.assert_close(fusion(places, *longer), expected)


# ---- captions that are not there -------------------------------------------------------------------------------------


def test_a_learned_vector_stands_for_an_empty_caption():
    text = spoilt(Captions(TinyText(), 3, EMPTY, learned=True))
    words, pooled, there = text(TOKENS, MASK)
    assert there[:, 0].tolist() == [1, 0, 1, 1]
    expected_words, expected = text.encoder(TOKENS, MASK)
    torch.testing.assert_close(pooled[[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=0)
    torch.testing.assert_close(words[[0, 2, 3]], expected_words[[0, 2, 3]], rtol=0, atol=0)
    assert torch.equal(pooled[1], text.no_caption) and torch.equal(words[1], text.no_caption.expand(5, -1))


@pytest.mark.parametrize("tokens", [[[1, 2, 4]], [[1, 3]], [[2]], [[1, 2, 2]]])
def test_what_only_looks_like_an_empty_caption(tokens):
    text = Captions(TinyText(), 3, EMPTY, learned=True)
    tokens = torch.tensor(tokens)
    assert text(tokens, torch.ones_like(tokens) > 0)[2].item() == 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_captions_at_all_are_empty_ones(fusion):
    model = spoilt(build(fusion))
    empty = torch.tensor([EMPTY]).expand(4, -1)
    expected = model(images(), empty, torch.ones_like(empty) > 0)
    torch.testing.assert_close(model(images()), expected)
    padded = F.pad(empty, (0, 3)), F.pad(torch.ones_like(empty) > 0, (0, 3))
    torch.testing.assert_close(model(images(), *padded), expected)
    with torch.no_grad():
        for parameter in model.text.encoder.parameters():
            parameter.add_(1.0)  # what it says about nothing does not count
    torch.testing.assert_close(model(images()), expected)


def test_late_answers_by_the_image_where_there_is_no_caption():
    model = spoilt(build("late"))
    torch.testing.assert_close(model(images()), model.image(images()), rtol=1e-4, atol=1e-5)


# ---- the whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_gradient_reaches_every_parameter(name, fusion):
    """Mixed or not, and with a caption that was dropped: DDP waits for each of them."""
    model = spoilt(build(fusion, name)).train()
    image = images(name) if fusion != "none" else None
    mix = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]), torch.tensor([[0.6, 0.4], [0.6, 0.4], [1, 0], [1, 0]])
    for shares in (None, mix):
        model.zero_grad()
        logits = model(image, TOKENS, MASK, shares)
        assert logits.shape == (4, 3)
        (logits * torch.randn(4, 3)).sum().backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        # A bias before a batch norm, or one that all keys share, changes nothing.
        harmless = ("fusion.image.0.bias", "fusion.text.0.bias", "attn.qkv.bias", "attention.k.bias")
        assert not [n for n in idle if "relative_position" not in n and not n.endswith(harmless)], idle
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_all_captions_dropped_leaves_no_parameter_without_gradient(fusion):
    model = build(fusion).train()
    empty = torch.tensor([EMPTY]).expand(4, -1)
    model(images(), empty, torch.ones_like(empty) > 0).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_names_and_what_is_the_classifier(fusion):
    model = build(fusion)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} <= {"image", "text", "fusion"}
    expected = {
        "none": ("text.classifier.",),
        "concat": ("fusion.", "text.classifier.", "image.head.fc."),
        "bilinear": ("fusion.", "text.classifier.", "image.head.fc."),
        "late": ("text.classifier.", "image.head.fc."),
    }
    assert classifier_prefixes(model) == expected.get(fusion, ("fusion.",))
    everything = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for n, p in model.named_parameters() if n.startswith(classifier_prefixes(model)))
    assert freeze(deepcopy(model), "backbone") == everything - heads
    if fusion != "none":
        frozen = freeze(model, r"^image\.")
        assert 0 < frozen == sum(p.numel() for p in model.image.parameters())
        assert all(p.requires_grad for p in model.text.parameters())


def test_learning_rates_of_layers_and_what_is_not_decayed():
    model = build("concat")
    plain = image_model()
    own = {id(p): g for g in param_groups(model, 0.1, layer_decay=0.5) for p in g["params"]}
    names = dict(model.named_parameters())
    found = {n: (own[id(p)]["lr_scale"], own[id(p)]["weight_decay"]) for n, p in names.items()}
    alone = {id(p): g for g in param_groups(plain, 0.1, layer_decay=0.5) for p in g["params"]}
    for name, parameter in plain.named_parameters():
        group = alone[id(parameter)]
        assert found[f"image.{name}"] == (group["lr_scale"], group["weight_decay"]), name
    assert all(found[n][0] == 1 for n in names if n.startswith(("text.", "fusion.")))
    assert any("cpb_mlp" in n for n in model.no_weight_decay())
    assert found["text.no_caption"] == (1, 0) and found["text.classifier.weight"] == (1, 0.1)
    early = build("early", "test_vit")
    scales = {
        n: g["lr_scale"]
        for g in param_groups(early, 0.1, layer_decay=0.5)
        for n, p in early.named_parameters()
        for q in g["params"]
        if p is q
    }
    assert scales["fusion.classifier.weight"] == 1 and scales["image.norm.weight"] == 0.5
    assert scales["image.blocks.0.attn.qkv.weight"] == 0.25 and scales["image.patch_embed.proj.weight"] == 0.125
    factors = param_groups(model, 0.0, lr_mult={"^text": 2.0, "^image": 0.1})
    assert {g["lr_scale"] for g in factors} == {2.0, 0.1, 1.0}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_untrained_model_predicts_the_prior(fusion):
    model, prior = build(fusion).eval(), torch.tensor([0.75, 0.01, 0.3])
    init_head_bias(model, prior.numpy())
    torch.testing.assert_close(model(images(), TOKENS, MASK).sigmoid(), prior.expand(4, 3))


def test_what_train_reads_of_a_model():
    for fusion in FUSIONS:
        model = build(fusion)
        assert len(model.pretrained_cfg["mean"]) == len(model.pretrained_cfg["std"]) == 3
        classifiers = model.get_classifier()
        classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
        ids = {id(p) for m in classifiers for p in m.parameters()}
        assert ids <= {id(p) for n, p in model.named_parameters() if n.startswith(classifier_prefixes(model))} and ids
    assert timm_classifiers(build("concat")) == ("image.head.fc.",)
    assert build("concat", head="csra").head_spec["head"] == "csra" and not build("none").head_spec


@pytest.mark.parametrize("fusion, width", [("none", 10), ("concat", 32), ("early", 32), ("cross-attention", 32)])
def test_features_for_distillation_are_the_images(fusion, width):
    model = build(fusion).eval()
    features = PooledFeatures(model)
    model(images(), TOKENS, MASK)
    assert features.take().shape == (4, width)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_blocks_copies_recomputation_and_bfloat16(fusion):
    model = build(fusion).eval()
    parts = blocks(model)
    assert {id(layer) for layer in model.text.encoder.layers} <= {id(part) for part in parts}
    assert len(parts) == 2 + (0 if fusion == "none" else len(blocks(model.image)))
    ema, before = Ema(model), model(images(), TOKENS, MASK)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.testing.assert_close(ema.module(images(), TOKENS, MASK), before)
    ema.update(model, 0.0)
    now = model(images(), TOKENS, MASK)
    torch.testing.assert_close(ema.module(images(), TOKENS, MASK), now)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images(), TOKENS, MASK).float(), now, rtol=0.1, atol=0.2)
    grads = []
    for again in (False, True):
        if again:
            assert len(recompute(model, "all")) == len(parts)
        model.zero_grad()
        model(images(), TOKENS, MASK).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_compiled_blocks_serve_captions_of_every_length(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model, plain = (build("concat", "test_vit") for _ in range(2))
    compilations = compiler.Compilations()
    compiler.compile_blocks(model)
    for length in (5, 3, 4):
        tokens = TOKENS[:, :length]
        found, expected = (m(images("test_vit"), tokens, tokens > 0) for m in (model, plain))
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        assert bool(compilations.new()) == (length == 5)


def test_a_label_head_under_fused_logits():
    model = build("concat", head="csra").eval()
    assert classifier_prefixes(model)[2] == "image.label_head."
    assert not any(part is inside for part in blocks(model) for inside in model.image.label_head.modules())
    x = model.image(images())
    expected = model.fusion(x, model.text.classifier(model.text.encoder(TOKENS, MASK)[1]))
    torch.testing.assert_close(model(images(), TOKENS, MASK)[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: check_fusion("concatenate", {}), "did you mean concat"),
        (lambda: check_fusion("early", {"widht": 3}), "did you mean width"),
        (lambda: check_fusion("concat", {"width": 3}), "it takes none"),
        (lambda: Fused(None, TinyText(), fusion="early", num_classes=3, empty=EMPTY), "needs an image model"),
        (lambda: Fused(image_model(), TinyText(), fusion="none", num_classes=3, empty=EMPTY), "is the text alone"),
        (lambda: build("gated", head="csra"), "--head linear"),
        (
            lambda: Fused(
                image_model(),
                TinyText(),
                fusion="cross-attention",
                num_classes=3,
                empty=EMPTY,
                fusion_kwargs={"width": 9},
            ),
            "multiple of heads",
        ),
        (
            lambda: Fused(
                image_model(), TinyText(), fusion="late", num_classes=3, empty=EMPTY, fusion_kwargs={"share": 2}
            ),
            "must be in 0..1",
        ),
    ],
)
def test_mistakes_are_one_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


# ---- mixing ----------------------------------------------------------------------------------------------------------


def test_mixed_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    mix = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    assert mixed(x, mix).tolist() == [[0.75, 2.5], [0.0, 10.0]]
    assert mixed(x, None) is x


def test_mixing_of_a_linear_encoder_by_hand():
    """Word w is the vector (w, w^2): two captions of one word each, a quarter of the other in the first."""
    model = Fused(None, TinyText(), fusion="none", num_classes=2, empty=[1])

    class Words(nn.Module):
        def forward(self, tokens, token_mask):
            x = torch.stack([tokens, tokens**2], -1).float()
            return x, x[:, 0]

    model.text.encoder = Words()
    model.text.no_caption = nn.Parameter(torch.zeros(2))
    model.text.classifier = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.text.classifier.weight)
    tokens = torch.tensor([[2], [4]])
    mix = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    logits = model(None, tokens, tokens > 0, mix)
    assert logits.tolist() == [[2.5, 7.0], [3.5, 13.0]]


@pytest.mark.parametrize("fusion", ["concat", "bilinear", "none"])
def test_features_mixed_are_logits_mixed(fusion):
    model = spoilt(build(fusion))
    lam = torch.tensor([0.3, 0.3, 0.9, 0.9])[:, None]
    mix = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]), torch.cat([lam, 1 - lam], 1)
    said = model.text.classifier(model.text(TOKENS, MASK)[1])
    said = lam * said + (1 - lam) * said[[1, 0, 3, 2]]
    expected = said if fusion == "none" else model.fusion(model.image(images()), said)
    torch.testing.assert_close(model(images(), TOKENS, MASK, mix), expected)


def test_cross_attention_mixes_what_was_found_in_each_caption():
    model = spoilt(build("cross-attention"))
    fusion = model.fusion
    mix = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]), torch.tensor([[0.7, 0.3]] * 2 + [[1.0, 0.0]] * 2)
    words, pooled, _ = model.text(TOKENS, MASK)
    words, pooled = (fusion.norm_text(fusion.text(x)) for x in (words, pooled))
    x = fusion.image(model.image(images()).flatten(1, 2))
    rows = []
    for n, m in ((0, 1), (1, 0)):
        q = fusion.norm1(x[n : n + 1])
        heard = [torch.cat([words[k, : MASK[k].sum()], pooled[k, None]])[None] for k in (n, m)]
        found = [fusion.attention(q, caption, caption) for caption in heard]
        y = x[n] + 0.7 * found[0] + 0.3 * found[1]
        y = y + fusion.fc2(F.gelu(fusion.fc1(fusion.norm2(y))))
        rows.append(fusion.classifier(fusion.norm(y).mean(1)))
    logits = model(images(), TOKENS, MASK, mix)
    torch.testing.assert_close(logits[:2], torch.cat(rows))
    torch.testing.assert_close(logits[2:], model(images(), TOKENS, MASK)[2:])


def test_late_mixes_the_captions_that_are_there():
    """The second caption is empty: its partner's 30 % speak alone, for 30 % of the text's half."""
    model = spoilt(build("late"))
    mix = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]]), torch.tensor([[0.7, 0.3]] * 4)
    p_image = model.image(images())[1].sigmoid()
    p_text = model.text.classifier(model.text.encoder(TOKENS, MASK)[1][0]).sigmoid()
    expected = (1 - 0.5 * 0.3) * p_image + 0.5 * 0.3 * p_text
    torch.testing.assert_close(model(images(), TOKENS, MASK, mix)[1].sigmoid(), expected)
