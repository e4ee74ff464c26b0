import copy
import pickle

import pytest
import timm
import torch
from timm.models import swin_transformer_v2

from mlc.models import swin_attention, window_attention_cpu
from mlc.models.build import build_model
from mlc.models.swin_attention import use_fast_attention
from mlc.optim.ema import Ema
from mlc.parallel.strategy import blocks

VARIANTS = timm.list_models(["swin_*", "swinv2_*"], exclude_filters="swinv2_cr_*")
SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
BOTH = pytest.mark.parametrize("name", [SWIN, SWIN_V2])
NARROW = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}
ON_CPU = window_attention_cpu.window_attention


@pytest.fixture(autouse=True, params=["cpu kernel", "sdpa"])
def path(request, monkeypatch):
    """Both ways through `attend`: the CPU's operator, and scaled_dot_product_attention as on a GPU."""
    if request.param == "sdpa":
        monkeypatch.setattr(swin_attention, "_CHUNKED", ())
    return request.param


def pair(name=SWIN_V2, *, dtype=torch.float32, **given):
    """(timm's model, ours with the same weights), both with weights large enough to tell them apart."""
    return twins(name, dtype, **{"img_size": 32, "window_size": 4, **NARROW, **given})


def twins(name, dtype, **given):
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=3, **given)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.dim() == 2 else 0.3)
    reference.to(dtype)
    return reference, use_fast_attention(copy.deepcopy(reference))


def images(size=32, batch=2, dtype=torch.float32):
    sides = size if isinstance(size, tuple) else (size, size)
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(1)).to(dtype)


def forward_and_gradients(model, image, autocast=False):
    """{name: tensor} of the logits and all gradients."""
    image = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.train()(image)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    (logits * torch.arange(1, logits.numel() + 1).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "image": image.grad, **gradients}


def errors(found, expected):
    """{name: largest error, as a share of the largest value}."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - e).abs().max() / e.abs().max().clamp(min=1e-30)) for name, e in expected.items()}


def assert_same(mine, reference, image, tolerance):
    found, expected = (forward_and_gradients(model, image) for model in (mine, reference))
    wrong = {name: error for name, error in errors(found, expected).items() if error > tolerance}
    assert not wrong
    with torch.no_grad():
        logits = [model.eval()(image) for model in (mine, mine, reference)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)  # the second time from the bias that was kept
    torch.testing.assert_close(logits[0], logits[2], rtol=tolerance, atol=tolerance)


# ---- equality with timm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gives_timms_results_and_gradients(name):
    """With their own windows, on the smallest image that has shifted ones; narrower and with fewer blocks."""
    narrow = {"embed_dim": 4, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
    layers = timm.create_model(name, **narrow).layers
    size = 8 * max(stage.blocks[0].window_size[0] for stage in layers)
    reference, mine = twins(name, torch.float64, img_size=size, **narrow)
    assert any(any(block.shift_size) for stage in mine.layers for block in stage.blocks)
    assert all(type(block) in swin_attention._FAST.values() for stage in mine.layers for block in stage.blocks)
    assert_same(mine, reference, images(size, batch=1, dtype=torch.float64), 1e-10)


@BOTH
@pytest.mark.parametrize(
    "size, window",
    [(32, 4), (28, 7), (50, 4), ((48, 20), 4), (32, 16), (72, 12)],
    ids=["even", "49 tokens", "padded", "oblong", "window > resolution", "144 tokens"],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)], ids=["fp64", "fp32"])
def test_any_size_and_window(name, size, window, dtype, tolerance):
    reference, mine = pair(name, dtype=dtype, img_size=size, window_size=window)
    assert_same(mine, reference, images(size, dtype=dtype), tolerance)


@BOTH
def test_windows_above_the_size_whose_softmax_is_kept(name, monkeypatch):
    reference, mine = pair(name, dtype=torch.float64)
    monkeypatch.setattr(swin_attention, "RECOMPUTE_ABOVE", 8)
    assert_same(mine, reference, images(dtype=torch.float64), 1e-10)


@BOTH
@pytest.mark.parametrize("scores", [1, 400, 600, 1200])
def test_the_size_of_a_chunk_changes_nothing(name, scores, monkeypatch):
    """From one head at a time to several windows, ends that no chunk divides included."""
    monkeypatch.setattr(window_attention_cpu, "_SCORES_PER_THREAD", scores // torch.get_num_threads() or 1)
    reference, mine = pair(name, dtype=torch.float64, img_size=44)
    assert_same(mine, reference, images(44, batch=3, dtype=torch.float64), 1e-10)


@BOTH
@pytest.mark.parametrize("always_partition", [False, True])
def test_set_input_size(name, always_partition):
    reference, mine = pair(name, dtype=torch.float64)
    for size, window in ((64, 8), (24, 4), (32, 4)):
        image = images(size, dtype=torch.float64)
        for model in (reference, mine):
            with torch.no_grad():
                model.eval()(images(model.patch_embed.img_size[0], dtype=torch.float64))  # a bias of the old size
            model.set_input_size(img_size=size, window_size=window, always_partition=always_partition)
            model.zero_grad()
        assert_same(mine, reference, image, 1e-10)


@BOTH
def test_a_mask_made_in_the_forward_pass(name):
    reference, mine = pair(name, dtype=torch.float64, dynamic_img_size=True, strict_img_size=False)
    for size in (32, (40, 24)):
        for model in (reference, mine):
            model.zero_grad()
        assert_same(mine, reference, images(size, dtype=torch.float64), 1e-10)


@BOTH
def test_gradient_checkpointing(name):
    reference, mine = pair(name, dtype=torch.float64)
    mine.set_grad_checkpointing(True)
    assert_same(mine, reference, images(dtype=torch.float64), 1e-10)


@BOTH
def test_stochastic_depth_draws_the_same_blocks(name):
    models = pair(name, drop_path_rate=0.5)
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(forward_and_gradients(model, images(batch=4)))
    assert max(errors(results[1], results[0]).values()) < 2e-4


@BOTH
def test_autocast_is_no_further_from_float32_than_timm(name):
    """Root mean square over all gradients and logits of four batches."""
    reference, mine = pair(name, img_size=64, window_size=8)
    error = {"timm": 0.0, "mine": 0.0}
    for seed in range(4):
        image = images(64) + seed / 4
        reference.zero_grad()
        truth = forward_and_gradients(copy.deepcopy(reference).double(), image.double())
        for who, model in (("timm", reference), ("mine", mine)):
            model.zero_grad()
            found = forward_and_gradients(model, image, autocast=True)
            error[who] += sum(float((found[k] - t).square().mean() / t.square().mean()) for k, t in truth.items())
    assert error["mine"] <= 1.05 * error["timm"]
    assert error["mine"] > 0


@BOTH
def test_two_runs_are_identical(name):
    _, mine = pair(name)
    first, second = (forward_and_gradients(copy.deepcopy(mine), images()) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("tokens, groups, heads", [(9, 1, 2), (16, 3, 2)])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_operator(tokens, groups, heads, cosine, keep):
    """Against finite differences, and as torch.compile wants it."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(6, tokens, 3, heads, 4).double(), torch.randn(groups, heads, tokens, tokens).double()
    scale = torch.tensor([2.0, 5.0]).double()
    qkv.requires_grad_(), bias.requires_grad_(), scale.requires_grad_(cosine)

    def attend(*inputs):
        return ON_CPU(*inputs, cosine, keep)[0]

    assert torch.autograd.gradcheck(attend, (qkv, scale, bias), fast_mode=True)
    torch.library.opcheck(ON_CPU, (qkv, scale, bias, cosine, keep), test_utils=("test_schema", "test_faketensor"))


def test_dropout_of_attention_keeps_the_mean():
    _, mine = pair(attn_drop_rate=0.5, img_size=16, depths=(1, 1))
    attention = mine.layers[0].blocks[0].attn
    x = torch.randn(1, 16, 16)
    with torch.no_grad():
        expected = attention.eval()(x)
        drawn = torch.stack([attention.train()(x) for _ in range(2000)])
    assert drawn.std(0).min() > 0
    assert (drawn.mean(0) - expected).abs().max() < 6 * (drawn.std(0) / 2000**0.5).max()


# ---- the bias that is kept -------------------------------------------------------------------------------------------


def logits_of(model):
    with torch.no_grad():
        return model(images())


def made(monkeypatch):
    """A list that grows with every position bias that is computed."""
    calls, compute = [], swin_attention._by_position
    monkeypatch.setattr(swin_attention, "_by_position", lambda *a: calls.append(1) or compute(*a))
    return calls


@BOTH
def test_evaluation_makes_a_bias_once_and_training_every_time(name, monkeypatch):
    calls = made(monkeypatch)
    _, mine = pair(name)
    mine.eval()
    for _ in range(3):
        logits_of(mine)
    assert len(calls) == 4  # blocks
    mine.train()
    for _ in range(2):
        mine(images())
    assert len(calls) == 4 + 2 * 4


def step(model):
    model.train()(images()).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    model.eval()


def load(model):
    model.load_state_dict({k: v + 0.3 for k, v in model.state_dict().items()})


def average(model):
    Ema.update(type("", (), {"module": model})(), copy.deepcopy(model).requires_grad_(False).apply(shift), 0.5)


def shift(module):
    for parameter in module.parameters(recurse=False):
        parameter.data += 0.3


def through_float64(model):
    model.double()
    shift(model)
    for module in model.modules():
        shift(module)
    model.float()


@BOTH
@pytest.mark.parametrize("change", [step, load, average, through_float64], ids=lambda f: f.__name__)
def test_a_change_of_weights_is_seen(name, change):
    reference, mine = pair(name)
    before = logits_of(mine.eval())
    change(mine)
    after = logits_of(mine)
    assert (after - before).abs().max() > 1e-2
    reference.load_state_dict(mine.state_dict())
    torch.testing.assert_close(after, logits_of(reference.eval()), rtol=2e-4, atol=2e-4)


def test_inference_mode_leaves_nothing_that_autograd_refuses():
    _, mine = pair()
    mine.eval().requires_grad_(False)
    with torch.inference_mode():
        mine(images())
    image = images().requires_grad_()
    mine(image).sum().backward()
    assert image.grad.abs().max() > 0


@BOTH
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_weights_of_their_own(name, clone):
    _, mine = pair(name)
    before = logits_of(mine.eval())
    twin = clone(mine)
    torch.testing.assert_close(logits_of(twin), before, rtol=0, atol=0)
    load(twin)
    assert (logits_of(twin) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(mine), before, rtol=0, atol=0)


# ---- as a part of timm's model ---------------------------------------------------------------------------------------


@BOTH
def test_weights_load_both_ways(name):
    reference, mine = pair(name)
    assert [*mine.state_dict()] == [*reference.state_dict()]
    other = timm.create_model(name, num_classes=3, img_size=32, window_size=4, **NARROW)
    theirs = use_fast_attention(copy.deepcopy(other))
    other.load_state_dict(mine.state_dict())
    theirs.load_state_dict(reference.state_dict())
    torch.testing.assert_close(logits_of(other.eval()), logits_of(theirs.eval()), rtol=1e-4, atol=1e-4)


def test_build_model_takes_it_or_timms():
    given = {"name": SWIN_V2, "num_classes": 3, "img_size": 32, "model_kwargs": {**NARROW, "window_size": 4}}
    fast, timms = (build_model(**given, attention=which).layers[0].blocks[0] for which in ("fast", "timm"))
    assert type(fast) is swin_attention.FastSwinV2Block and type(timms) is swin_transformer_v2.SwinTransformerV2Block
    assert isinstance(fast, swin_transformer_v2.SwinTransformerV2Block)
    assert type(use_fast_attention(timm.create_model("test_vit"))) is type(timm.create_model("test_vit"))


@BOTH
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_compiles_whole(name, shifted):
    reference, mine = pair(name, dtype=torch.float64)
    block, twin = mine.layers[0].blocks[shifted], reference.layers[0].blocks[shifted]
    block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    for training in (True, False):
        for module in (block, twin):
            module.train(training)
        found, expected = block(x), twin(x)
        torch.testing.assert_close(found, expected)
    found.sum().backward(), expected.sum().backward()
    for mine, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_compiled_blocks_see_new_weights_and_are_not_compiled_again():
    reference, mine = pair(depths=(2,), num_heads=(2,))
    for block in blocks(mine):  # as `compile_blocks`, without minutes of code generation
        block.forward = torch.compile(block.forward, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counts = []
    for _ in range(3):
        mine.train()(images()).sum().backward()
        logits_of(mine.eval())
        load(mine)
        reference.load_state_dict(mine.state_dict())
        torch.testing.assert_close(logits_of(mine), logits_of(reference.eval()), rtol=2e-4, atol=2e-4)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < counts[0] == counts[1] == counts[2]


def test_a_whole_model_compiles():
    reference, mine = pair()
    logits_of(mine.eval())  # leaves a bias that the compiled model must not use
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    logits_of(compiled)
    load(mine)
    reference.load_state_dict(mine.state_dict())
    torch.testing.assert_close(logits_of(compiled), logits_of(reference.eval()), rtol=2e-4, atol=2e-4)
