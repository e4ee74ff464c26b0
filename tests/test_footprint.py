"""Counted memory and FLOPs against real passes, PyTorch's memory tracker and closed forms."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from mlc import footprint
from mlc.models.bigru import BiGru
from mlc.models.build import build_model
from mlc.parallel.recompute import recompute

SWIN_V2, SWIN = "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"


def tiny(name: str, attention: str = "timm", **kwargs) -> nn.Module:
    """A Swin of three blocks for images of 64 pixels."""
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depths": (2, 1), "num_heads": (1, 2), "window_size": 8}
    return build_model(name=name, num_classes=5, img_size=64, attention=attention, model_kwargs=shape | kwargs)


def on_a_gpu(module: nn.Module, *shape: int, autocast: torch.dtype | None = None) -> footprint.Pass:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        footprint._fake(module, mode)
        return footprint.trace(module, torch.zeros(*shape, device="cuda"), autocast=autocast)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", SWIN_V2])
def test_what_is_kept_without_memory_is_what_a_real_pass_keeps(name):
    model = build_model(name=name, num_classes=5, img_size=64, attention="timm")
    real = footprint.trace(model, torch.rand(2, 3, 64, 64))
    counted = on_a_gpu(model, 2, 3, 64, 64)
    # A GPU's attention keeps its sums in rows of 32, and a CPU's convolution copies what is not contiguous.
    assert counted.kept == pytest.approx(real.kept, rel=1e-2) and real.kept > 100_000
    assert counted.flops == real.flops


def test_what_is_kept_of_linear_layers_is_their_input():
    """Two layers and a ReLU: the inputs of both, of which the ReLU's output is one; a closed form."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert footprint.trace(model, torch.rand(3, 8)).kept == 4 * 3 * (8 + 16)


def test_what_is_moved_is_what_each_operator_reads_and_writes():
    """A convolution from 3 to 8 channels and a ReLU in place on 16 pixels; flattening is a view. A closed form."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(inplace=True), nn.Flatten())
    few, many = (footprint.trace(model, torch.rand(n, 3, 4, 4)).moved for n in (2, 4))
    assert many - few == 2 * 4 * 16 * ((3 + 8) + (8 + 8))
    assert few - (many - few) == 4 * 3 * 8  # the weights, for a batch of any size


def test_types_are_those_of_autocast_on_a_gpu():
    """Products in bfloat16, layer norm in float32 with its mean and deviation; a CPU's would stay in bfloat16. The
    weights' copies in bfloat16 belong to the weights."""
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    kept = on_a_gpu(model, 3, 8, autocast=torch.bfloat16).kept
    assert kept == 3 * (2 * 8 + 4 * 16 + 4 * 2 + 2 * 16)
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_fast_attention_keeps_what_the_fused_kernel_does(name):
    """Of 6 windows of 64 tokens, 32 channels, one head, in float32: input, qkv, the q and k that the kernel saw, the
    result, and 64 sums; of all windows together the bias."""
    attention = tiny(name, "fast").layers[0].blocks[0].attn
    few, many = (on_a_gpu(attention, windows, 64, 32).kept for windows in (6, 12))
    tokens = 6 * 64
    scaled = {SWIN: 32, SWIN_V2: 2 * 32 + 4}[name]  # only q; or q and k, their lengths and what these were divided by
    expected = 4 * tokens * (32 + 3 * 32 + scaled + 32 + 1)
    assert many - few == pytest.approx(expected, rel=0.02)
    hidden = {SWIN: 0, SWIN_V2: 225 * 512}[name]  # of the position MLP, for every offset in a window
    assert 4 * (64 * 64 + hidden) <= few - expected < 4 * (64 * 64 + hidden) + 20_000


@pytest.mark.parametrize("cell, gates", [("gru", 3), ("lstm", 4)])
def test_a_recurrent_layer_is_counted(cell, gates):
    """Products of words and of the state with the weights of each gate, in both directions; a closed form."""
    model = BiGru(50, dim=12, hidden=16, cell=cell, attention=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        footprint._fake(model, mode)
        tokens = torch.ones(4, 9, dtype=torch.long, device="cuda")
        counted = footprint.trace(model, tokens, tokens.bool())
    assert counted.flops == 2 * 2 * 4 * 9 * gates * 16 * (12 + 16)
    assert counted.kept > 2 * 4 * 4 * 9 * gates * 16  # the gates and more, in float32


@pytest.mark.parametrize("mode", ["none", "all", "every:2", "attention"])
def test_the_peak_is_that_of_a_tracked_step(mode):
    """Forward and backward pass with PyTorch's own memory tracker, gradients there beforehand."""

    def tracked(batch: int) -> int:
        model = tiny(SWIN_V2)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            footprint._fake(model, fake, "cpu")
            recompute(model, mode)
            images = torch.zeros(batch, 3, 64, 64)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                model(images).sum().backward()
            return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    counted = []
    for batch in (8, 16):
        model = tiny(SWIN_V2)
        parts = recompute(model, mode)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            footprint._fake(model, fake)
            counted.append(footprint.peak(model, parts, (torch.zeros(batch, 3, 64, 64, device="cuda"),), None)[0])
    assert counted[1] - counted[0] == pytest.approx(tracked(16) - tracked(8), rel=0.05)


@pytest.mark.parametrize("name", [SWIN_V2, "test_vit", "test_convnext"])
@pytest.mark.parametrize("mode", ["all", "every:2", "attention"])
def test_what_is_computed_again_is_what_a_real_backward_pass_computes_again(name, mode):
    def model() -> nn.Module:
        return tiny(name) if name == SWIN_V2 else build_model(name=name, num_classes=5, img_size=64)

    def flops(mode: str) -> int:
        running = model()
        recompute(running, mode)
        with FlopCounterMode(display=False) as counter:
            running(torch.rand(2, 3, 64, 64)).sum().backward()
        return counter.get_total_flops()

    if (name, mode) == ("test_convnext", "attention"):
        pytest.skip("has none")
    counting = model()
    counted = footprint.peak(counting, recompute(counting, mode), (torch.rand(2, 3, 64, 64),), None)
    assert counted[2] == flops(mode) - flops("none") > 0
    assert all("forward" in vars(part) for part in recompute(model(), mode))


def test_more_is_kept_by_timms_attention_and_less_by_each_mode():
    def kept(**more) -> int:
        return footprint.count(name=SWIN_V2, num_classes=5, img_size=128, amp="bf16", **more).activations

    fast = kept()
    assert kept(attention="timm") > 1.3 * fast
    assert kept(again="all") < kept(again="every:2") < fast and kept(again="attention") < 0.8 * fast


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["fast", "timm"])
def test_on_a_real_gpu(attention):
    """Memory after a forward pass, of which a GPU takes 512 bytes at least for everything."""
    model = build_model(name=SWIN_V2, num_classes=5, img_size=256, attention=attention)
    counted = footprint.count(name=SWIN_V2, num_classes=5, img_size=256, amp="bf16", attention=attention)
    model.cuda()

    def taken(batch: int) -> int:
        image = torch.rand(batch, 3, 256, 256, device="cuda")
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(image)
        after = torch.cuda.memory_allocated()
        logits.sum().backward()
        return after - before

    taken(8)  # what cuBLAS takes once
    assert (taken(16) - taken(8)) / 8 == pytest.approx(counted.activations, rel=0.03)
