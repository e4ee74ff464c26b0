"""Each head against its formula written plainly, and on backbones of every kind of feature map."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ml_decoder as timm_ml_decoder
from torch import nn

from mlc.models.build import build_model
from mlc.models.export import export, load_exported
from mlc.models.heads import LABEL_HEADS, classifier_prefixes, feature_map, init_head_bias
from mlc.models.label_attention import Csra, MlDecoder, Query2Label, sine_positions
from mlc.models.label_relations import Gcn, Lstm, label_graph
from mlc.optim.ema import Ema
from mlc.parallel.compiler import compile_blocks
from mlc.parallel.recompute import recompute
from mlc.parallel.strategy import blocks
from shards.console import UserError

SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
SMALL = {  # arguments that make a head quick
    "mlp": {"hidden": 8},
    "ml_decoder": {"dim": 16, "hidden": 8},
    "query2label": {"dim": 8, "heads": 2},
    "csra": {"heads": 2},
    "lstm": {"embed": 4, "hidden": 6},
    "gcn": {"embed": 4, "hidden": 8},
}
BACKBONES = {  # name: (image size, arguments that make it small)
    "swin_tiny_patch4_window7_224": (32, SWIN),
    "swinv2_tiny_window8_256": (32, SWIN),
    "test_vit": (32, {"depth": 2}),
    "deit_tiny_patch16_224": (32, {"depth": 1, "embed_dim": 24, "num_heads": 3}),
    "vit_small_r26_s32_224": (64, {"depth": 1, "embed_dim": 24, "num_heads": 3}),
    "resnet18": (64, {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)}),
    "test_efficientnet": (64, {}),
    "test_convnext": (64, {}),
    "legacy_seresnext50_32x4d": (64, {"layers": (1, 1, 1, 1)}),
    "pnasnet5large": (64, {}),
    "inception_resnet_v2": (96, {}),
}
LARGE = {"pnasnet5large": ("csra",), "inception_resnet_v2": ("mlp",)}
COUNTS = np.array([[10, 6, 0], [6, 8, 1], [0, 1, 5]])


def build(head: str, name="swinv2_tiny_window8_256", seed=0, **more) -> nn.Module:
    torch.manual_seed(seed)
    size, kwargs = BACKBONES[name]
    return build_model(
        name=name,
        num_classes=3,
        img_size=size,
        head=head,
        head_kwargs=SMALL[head],
        cooccurrence=COUNTS,
        model_kwargs=kwargs,
        **more,
    )


def spoilt(head: nn.Module) -> nn.Module:
    """With no parameter zero or one, so that none can be left out unseen; in eval mode."""
    torch.manual_seed(1)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head.eval()


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_mlp(act):
    head = spoilt(LABEL_HEADS["mlp"](6, 3, hidden=5, act=act, dropout=0.5))
    x = torch.randn(4, 6)
    hidden = getattr(F, act)(x @ head.fc1.weight.t() + head.fc1.bias)
    torch.testing.assert_close(head(x), hidden @ head.fc2.weight.t() + head.fc2.bias)


@pytest.mark.parametrize("groups", [-1, 2])
def test_ml_decoder_is_timms(groups):
    head = spoilt(MlDecoder(6, 3, groups=groups, dim=16, hidden=2048))
    reference = timm_ml_decoder.MLDecoder(3, groups, 16, 6).eval()
    layer, own = reference.decoder.layers[0], head.layer
    pairs = {
        reference.embed_standart: head.project,
        layer.norm1: head.norm,
        layer.norm2: own.norms[0],
        layer.norm3: own.norms[1],
        layer.linear1: own.fc1,
        layer.linear2: own.fc2,
    }
    for theirs, mine in pairs.items():
        theirs.load_state_dict(mine.state_dict())
    layer.multihead_attn = reference_attention(own.attentions["map"], batch_first=False)
    reference.decoder = layer  # PyTorch's TransformerDecoder wants layers of its own kind
    with torch.no_grad():
        reference.query_embed.weight.copy_(head.query)
        reference.duplicate_pooling.copy_(head.weight)
        reference.duplicate_pooling_bias.copy_(head.bias)
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(head(x), reference(x.permute(0, 3, 1, 2)))


def test_sine_positions_are_detrs():
    position = sine_positions(3, 5, 8)
    assert position.shape == (3, 5, 8)
    for row in range(3):
        for column in range(5):
            for i in range(4):
                for half, at in ((0, (row + 1) / 3), (4, (column + 1) / 5)):
                    angle = 2 * np.pi * at / 10000 ** (2 * (i // 2) / 4)
                    expected = np.cos(angle) if i % 2 else np.sin(angle)
                    assert position[row, column, half + i].item() == pytest.approx(expected, abs=1e-6)


def reference_attention(own, batch_first=True):
    """torch's MultiheadAttention with the same weights."""
    attention = nn.MultiheadAttention(own.q.in_features, own.heads, batch_first=batch_first)
    state = {
        "in_proj_weight": torch.cat([own.q.weight, own.k.weight, own.v.weight]),
        "in_proj_bias": torch.cat([own.q.bias, own.k.bias, own.v.bias]),
        "out_proj.weight": own.out.weight,
        "out_proj.bias": own.out.bias,
    }
    attention.load_state_dict(state)
    return attention


@pytest.mark.parametrize("self_attention", [False, True])
def test_query2label_is_detrs_transformer_and_a_classifier_per_query(self_attention):
    head = spoilt(Query2Label(6, 3, dim=8, heads=2, feedforward=12, self_attention=self_attention))
    image = torch.randn(2, 3, 5, 6)
    x = head.project(image).flatten(1, 2)
    place = sine_positions(3, 5, 8).flatten(0, 1)
    assert (len(head.encoder), len(head.decoder)) == (1, 2)
    for layer in head.encoder:
        x = layer.norms[0](x + reference_attention(layer.attentions["self"])(x + place, x + place, x)[0])
        x = layer.norms[1](x + layer.fc2(F.relu(layer.fc1(x))))
    y = torch.zeros(2, 3, 8)
    for layer in head.decoder:
        norms = iter(layer.norms)
        if self_attention:
            queries = y + head.query
            y = next(norms)(y + reference_attention(layer.attentions["self"])(queries, queries, y)[0])
        y = next(norms)(y + reference_attention(layer.attentions["map"])(y + head.query, x + place, x)[0])
        y = next(norms)(y + layer.fc2(F.relu(layer.fc1(y))))
    y = F.layer_norm(y, (8,), head.norm.weight, head.norm.bias)
    torch.testing.assert_close(head(image), torch.einsum("bcd,cd->bc", y, head.weight) + head.bias)


@pytest.mark.parametrize("heads, temperatures", [(1, [1]), (2, [1, 99]), (4, [1, 2, 4, 99]), (6, [1, 2, 3, 4, 5, 99])])
def test_csra(heads, temperatures):
    head = spoilt(Csra(6, 3, heads=heads, lam=0.4))
    x = torch.randn(2, 4, 5, 6)
    expected = torch.zeros(2, 3)
    for weight, temperature in zip(head.weight, temperatures, strict=True):
        for b in range(2):
            for c in range(3):
                score = x[b].flatten(0, 1) @ weight[c] / weight[c].norm()  # one per place
                share = (score * temperature).exp() / (score * temperature).exp().sum()
                attended = score.max() if temperature == 99 else (score * share).sum()
                expected[b, c] += score.mean() + 0.4 * attended
    torch.testing.assert_close(head(x), expected)


def test_lstm_starts_as_linear():
    head, x = Lstm(6, 3), torch.randn(4, 6)
    torch.testing.assert_close(head(x), head.linear(x), rtol=0, atol=0)


def test_lstm_walks_in_both_directions():
    head, x = spoilt(Lstm(6, 3, embed=4, hidden=5)), torch.randn(2, 6)
    cells = []
    for suffix in ("", "_reverse"):
        cell = nn.LSTMCell(5, 5)
        cell.load_state_dict({key: getattr(head.lstm, f"{key}_l0{suffix}") for key in cell.state_dict()})
        cells.append(cell)
    logits = head.linear(x)
    states = [[None] * 3, [None] * 3]
    for cell, order, found in zip(cells, (range(3), reversed(range(3))), states, strict=True):
        memory = None
        for label in order:
            memory = cell(torch.cat([logits[:, label, None], head.embedding[label].expand(2, -1)], 1), memory)
            found[label] = memory[0]
    correction = [head.correction(torch.cat(both, 1))[:, 0] for both in zip(*states, strict=True)]
    torch.testing.assert_close(head(x), logits + torch.stack(correction, 1))


def test_the_label_graph_by_the_papers_equations():
    tau, p = 0.5, 0.2
    a = np.zeros((3, 3))
    for i in range(3):
        neighbours = [j for j in range(3) if j != i and COUNTS[i, j] / COUNTS[i, i] >= tau]
        for j in neighbours:
            a[i, j] = p / len(neighbours)
        a[i, i] = 1 - p
    assert (a > 0).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    d = np.diag(a.sum(1) ** -0.5)
    np.testing.assert_allclose(label_graph(COUNTS, tau, p).numpy(), d @ a @ d, rtol=1e-6)
    assert torch.isfinite(label_graph(np.zeros((3, 3)), tau, p)).all()  # classes that no sample has


def test_gcn():
    head = spoilt(Gcn(6, 3, cooccurrence=COUNTS, embed=4, hidden=5))
    x = torch.randn(2, 3, 3, 6)
    hidden = F.leaky_relu(head.graph @ head.embedding @ head.weight1, 0.2)
    classifiers = head.graph @ hidden @ head.weight2
    pooled = F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1)
    torch.testing.assert_close(head(x), pooled @ classifiers.t())


# ---- on backbones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", LABEL_HEADS)
@pytest.mark.parametrize("name", BACKBONES)
def test_every_head_learns_on_every_kind_of_backbone(name, head):
    if head not in LARGE.get(name, LABEL_HEADS):
        pytest.skip("a large backbone: one head tells")
    model, size = build(head, name), BACKBONES[name][0]
    image = torch.randn(2, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):  # an LSTM's correction begins at zero, and only then has a gradient to hand on
        optimizer.zero_grad()
        logits = model(image)
        assert logits.shape == (2, 3)
        (logits - torch.tensor([1.0, -1.0, 2.0])).square().sum().backward()
        optimizer.step()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in idle if "label_head" in name]
    assert not any(p.grad is None for p in model.parameters() if p.requires_grad)  # DDP waits for each of them


@pytest.mark.parametrize("name, side", [("swinv2_tiny_window8_256", 4), ("test_vit", 2), ("resnet18", 2)])
def test_the_map_is_in_its_place(name, side):
    """A head that gives back a corner of the map sees what changed in that corner of the image most."""
    model, size = build("csra", name).eval(), BACKBONES[name][0]
    image = torch.randn(1, 3, size, size)
    other = image.clone()
    other[:, :, : size // side, -(size // side) :] += 3.0
    with torch.no_grad():
        maps = [
            feature_map(model, type(model).forward_head(model, model.forward_features(x), True)) for x in (image, other)
        ]
    change = (maps[1] - maps[0]).norm(dim=-1)[0]
    assert change.shape == (side, side) and change.argmax().item() == side - 1


@pytest.mark.parametrize("head", LABEL_HEADS)
def test_a_copy_has_its_own_head(head):
    model = build(head).eval()
    ema, image = Ema(model), torch.randn(2, 3, 32, 32)
    before = model(image)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.testing.assert_close(ema.module(image), before)
    assert not torch.allclose(model(image), before)
    ema.update(model, 0.0)
    torch.testing.assert_close(ema.module(image), model(image))


@pytest.mark.parametrize("head", LABEL_HEADS)
def test_bfloat16_autocast_and_recomputation(head):
    model, image = build(head), torch.randn(2, 3, 32, 32)
    model.label_head.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image)
    torch.testing.assert_close(logits.float(), model(image), rtol=0.1, atol=0.1)
    assert not any(part is inside for part in blocks(model) for inside in model.label_head.modules())
    grads = []
    for again in (False, True):
        if again:
            recompute(model, "all")
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_a_compiled_backbone():
    model, image = build("query2label", "test_vit").eval(), torch.randn(2, 3, 32, 32)
    expected = model(image)
    compile_blocks(model)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", LABEL_HEADS)
def test_an_export_comes_back(tmp_path, head):
    model = build(head)
    spoilt(model)
    export(
        model,
        tmp_path,
        architecture="swinv2_tiny_window8_256",
        model_args={**SWIN, "img_size": 32},
        num_classes=3,
        label_names=["a", "b", "c"],
        img_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        extra={},
    )
    again, config = load_exported(tmp_path)
    assert config["mlc"]["head"] == head and config["mlc"]["head_kwargs"] == SMALL[head]
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["mlp", "ml_decoder", "query2label", "lstm"])
def test_the_untrained_model_predicts_the_prior(head):
    model = build(head).eval()
    init_head_bias(model, np.array([0.75, 0.01, 0.3]))
    probability = model(torch.randn(4, 3, 32, 32)).sigmoid()
    torch.testing.assert_close(probability, torch.tensor([[0.75, 0.01, 0.3]]).expand(4, 3))


@pytest.mark.parametrize("head", ["csra", "gcn"])
def test_a_head_without_bias_refuses_the_prior(head):
    with pytest.raises(UserError, match="--head-bias zero"):
        init_head_bias(build(head), np.full(3, 0.5))


def test_names_of_the_classifier():
    assert classifier_prefixes(build("csra")) == ("label_head.",)
    for head in ("linear", "extra_linear"):
        model = build_model(name="swinv2_tiny_window8_256", num_classes=3, img_size=32, head=head, model_kwargs=SWIN)
        assert classifier_prefixes(model) == ("head.fc.",)
    assert classifier_prefixes(timm.create_model("deit_tiny_distilled_patch16_224")) == ("head.", "head_dist.")


@pytest.mark.parametrize(
    "head, kwargs, says",
    [
        ("mlp", {"hiden": 3}, "did you mean hidden"),
        ("linear", {"hidden": 3}, "takes none"),
        ("mlp", {"act": "tanh"}, "choose gelu or relu"),
        ("csra", {"heads": 3}, "choose one of 1, 2, 4, 6, 8"),
        ("query2label", {"dim": 6}, "multiple of 4"),
        ("gcn", {"tau": 2}, "tau 2 must be in"),
        ("lstm", {"hidden": "wide"}, "--head lstm with hidden=wide"),
        ("ml_decoder", {"dim": 20}, "--head ml_decoder with dim=20"),
    ],
)
def test_mistakes_are_one_line(head, kwargs, says):
    with pytest.raises(UserError, match=says):
        build_model(name="test_resnet", num_classes=3, head=head, head_kwargs=kwargs)


def test_a_backbone_without_a_map_says_so():
    model = build_model(name="deit_tiny_distilled_patch16_224", num_classes=3, head="csra", model_kwargs={"depth": 1})
    with pytest.raises(UserError, match="looks at places"):
        model(torch.randn(1, 3, 224, 224))


# ---- weights of a file -----------------------------------------------------------------------------------------------


def test_a_files_classifier_is_left_out_and_named(tmp_path, capsys):
    source = build_model(name="test_resnet", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_model(name="test_resnet", num_classes=3, head="csra", pretrained_path=tmp_path / "w.pth")
    assert "7 outputs, this model has 3 and --head csra: a new classifier is trained" in capsys.readouterr().err
    torch.testing.assert_close(model.bn1.weight, source.bn1.weight)
    torch.testing.assert_close(model.conv1[0].weight, source.conv1[0].weight)


def test_weights_of_the_same_head_load_whole_and_of_another_without(tmp_path, capsys):
    source = build("lstm")
    torch.save(spoilt(deepcopy(source)).state_dict(), tmp_path / "w.pth")
    again = build("lstm", seed=5, pretrained_path=tmp_path / "w.pth").eval()
    assert capsys.readouterr().err == ""
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(image), spoilt(deepcopy(source))(image))
    build("mlp", pretrained_path=tmp_path / "w.pth")
    assert "of another --head" in capsys.readouterr().err
