"""What only a GPU can show: its attention kernels, its streams, its determinism, and where the host waits for it.

`benchmarks/gpu.sh` runs these first; without CUDA they are skipped.
"""

import copy
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when the device is first used

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import TINY, log_of

from mlc import train
from mlc.config import Config
from mlc.data.dataset import BadSamples, EvalDataset, TrainDataset
from mlc.data.loader import Waiting, load, plan_batches, train_positions
from mlc.data.reader import TarReader
from mlc.data.sources import open_split
from mlc.data.transforms import EvalTransform, TrainTransform, normalize
from mlc.inference import logits_of_rows, tta_views
from mlc.models.build import build_model
from mlc.models.swin_attention import use_fast_attention
from mlc.optim.ema import Ema
from mlc.optim.losses import bce
from mlc.optim.param_groups import param_groups
from mlc.parallel import launch, strategy
from shards.dataset import load_dataset

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SWIN, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
NARROW = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
# 49 tokens, whose masks must be padded; 64; 256 as in the published models. All with shifted windows.
SHAPES = pytest.mark.parametrize("size, window", [(56, 7), (64, 8), (128, 16)])
BOTH = pytest.mark.parametrize("name", [SWIN, SWIN_V2])


@pytest.fixture(autouse=True)
def settings():
    """No TF32 in the patch embedding, whose rounding would hide that of the attention; each test chooses its autocast,
    which Accelerate settles once for a process."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.backends.cudnn.allow_tf32 = kept
    torch.use_deterministic_algorithms(False)


def pair(name, size, window):
    """(timm's model, ours with the same weights), the weights large enough to tell positions and heads apart."""
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=3, img_size=size, window_size=window, drop_path_rate=0.0, **NARROW)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.dim() == 2 else 0.3)
    reference.to(DEVICE)
    return reference, use_fast_attention(copy.deepcopy(reference))


def images(size, seed=1, dtype=torch.float32):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def forward_and_gradients(model, image, *, autocast=False):
    """{name: tensor} of the logits and all gradients."""
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        logits = model.train()(image)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    (logits * torch.arange(1, logits.numel() + 1, device=DEVICE).view_as(logits)).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


# ---- attention -------------------------------------------------------------------------------------------------------


@BOTH
@SHAPES
def test_outputs_and_gradients_are_timms(name, size, window):
    reference, mine = pair(name, size, window)
    expected, found = (forward_and_gradients(model, images(size)) for model in (reference, mine))
    assert found.keys() == expected.keys()
    wrong = {n: float((found[n] - e).abs().max() / e.abs().max().clamp(min=1e-30)) for n, e in expected.items()}
    assert max(wrong.values()) < 5e-4, wrong
    with torch.no_grad():
        logits = [model.eval()(images(size)) for model in (mine, mine, reference)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)  # the second time from the bias that was kept
    torch.testing.assert_close(logits[0], logits[2], rtol=5e-4, atol=5e-4)


@BOTH
@SHAPES
def test_autocast_is_no_further_from_the_truth_than_timm(name, size, window):
    """Mean square over all gradients and logits of four batches; the truth is timm's in float64."""
    reference, mine = pair(name, size, window)
    truths = copy.deepcopy(reference).double()
    error = {"timm": 0.0, "mine": 0.0}
    for seed in range(4):
        truth = forward_and_gradients(truths, images(size, seed, torch.float64))
        for who, model in (("timm", reference), ("mine", mine)):
            found = forward_and_gradients(model, images(size, seed), autocast=True)
            error[who] += sum(float((found[n] - t).square().mean() / t.square().mean()) for n, t in truth.items())
    assert 0 < error["mine"] <= 1.1 * error["timm"]


# ---- the same bits again ---------------------------------------------------------------------------------------------


def trained(name, size, window):
    """The weights after three steps under autocast, with stochastic depth."""
    torch.manual_seed(5)
    kwargs = {**NARROW, "window_size": window}
    model = build_model(
        name=name, num_classes=3, img_size=size, drop_path=0.3, model_kwargs=kwargs, attention="fast"
    ).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for seed in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(images(size, seed))
        bce(logits, torch.ones_like(logits)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@BOTH
@SHAPES
def test_two_trainings_have_the_same_bits(name, size, window):
    torch.use_deterministic_algorithms(True)
    first, second = trained(name, size, window), trained(name, size, window)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_two_runs_write_the_same_log(shards, tmp_path):
    for name in ("a", "b"):
        argv = [*TINY, "--data", str(shards), "--output", str(tmp_path / name), "--experiment", "run", "-b", "8"]
        argv += ["-j", "1", "--max-steps", "4", "--log-interval", "1", "--amp-dtype", "bf16", "--mixup", "0.4"]
        assert train.main([*argv, "--reprob", "0.5", "--clip-grad", "1", "--deterministic"]) == 0
    kept = ("train/loss", "train/grad_norm", "val/loss", "val_ema/map")
    a, b = ([{k: line[k] for k in kept if k in line} for line in log_of(tmp_path / n / "run")] for n in "ab")
    assert a == b and len(a) >= 5


# ---- nobody waits ----------------------------------------------------------------------------------------------------


def stepper(config):
    """A function that trains one step on the next batch, by the parts that mlc/train.py is made of, and reads what has
    arrived of the step before."""
    accelerator = launch.start("bf16" if DEVICE == "cuda" else "none")
    device = accelerator.device
    bare = build_model(name=SWIN_V2, num_classes=3, img_size=64, model_kwargs=NARROW, attention="fast").to(device)
    ema = Ema(bare)

    def optimizer(model):
        return torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, fused=True)

    choice = strategy.Choice(name="ddp")
    divided = strategy.divide(choice, accelerator, bare, ema.module, optimizer, clip=1.0, batch_size=4, accumulation=1)
    batches = Waiting(iter(host_batches(8)), device)
    in_flight = None

    def step(number):
        nonlocal in_flight
        batch = next(batches)
        launch.seed_everything(number)
        image, target, _ = train.prepare(batch, config, MEAN, STD, mixing=True)
        with divided.accumulate(True):
            with accelerator.autocast():
                logits = divided.model(image)
            loss = bce(logits, target).sum() / 12
            divided.backward(loss)
        batches.prepare()
        norm = divided.step()
        ema.update(bare, 0.9)
        arrived = in_flight.read() if in_flight else None
        in_flight = launch.Arriving(torch.stack([loss.detach(), norm.float()]))
        return arrived

    return step


def host_batches(count):
    """Batches as the loader hands them out, in pinned memory where there is a GPU."""
    for number in range(count):
        torch.manual_seed(number)
        batch = {
            "image": torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
            "target": torch.rand(4, 3).round(),
            "position": torch.arange(4 * number, 4 * number + 4),
            "row": torch.arange(4),
        }
        yield {name: tensor.pin_memory() if DEVICE == "cuda" else tensor for name, tensor in batch.items()}


def test_the_host_waits_for_nothing_inside_a_step():
    step = stepper(Config(mixup=0.4, reprob=0.5, data=["unused"]))
    for number in range(3):  # states of the optimizer, constants, workspaces
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(number)[0] for number in range(3, 7)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 < loss < 100 for loss in losses)


# ---- streams ---------------------------------------------------------------------------------------------------------


def busy():
    """Some milliseconds of work for the device, so that copies and host run ahead of it."""
    if DEVICE == "cuda":
        torch.cuda._sleep(20_000_000)


def test_batches_copied_ahead_are_whole_when_they_are_read(shards):
    """While the device is behind, and memory that a batch has left is given to others."""
    stream = TrainDataset.of(open_split(load_dataset(shards), "train"), TrainTransform(size=64), seed=1)
    positions = list(train_positions(0, 240, plan_batches(8, 8, 1, together=1), 0))
    device = torch.device(DEVICE)
    batches = Waiting(load(stream, iter(positions), workers=2, device=device), device)
    seen = []
    for batch in batches:
        busy()
        seen.append((batch["image"].clone(), batch["target"].clone(), batch["position"]))
        batches.prepare()
        batch = None
        torch.full((8, 3, 64, 64), 255, dtype=torch.uint8, device=device)  # where the batch was, if it may
    assert len(seen) == len(positions)
    for asked, (image, target, position) in zip(positions, seen, strict=True):
        expected = stream.__getitems__(asked)
        assert position.tolist() == list(asked)
        assert torch.equal(image.cpu(), expected["image"]) and torch.equal(target.cpu(), expected["target"])


def test_results_fetched_behind_the_device_are_those_of_their_rows(shards):
    index = open_split(load_dataset(shards), "train")
    dataset = EvalDataset(TarReader(index), EvalTransform(size=64))
    torch.manual_seed(0)
    model = build_model(name=SWIN_V2, num_classes=3, img_size=64, model_kwargs=NARROW, attention="fast")
    model.to(DEVICE).eval()
    views = [lambda image: busy() or image, *tta_views("hflip")[1:]]
    settings = {"batch_size": 8, "workers": 2, "mean": MEAN, "std": STD, "bad": BadSamples(0), "views": views}
    accelerator, rows = launch.start("none"), []
    for found, logits in logits_of_rows([model], dataset, accelerator, **settings):
        block = [*found, *[-1] * (8 - len(found))]
        image = normalize(dataset.__getitems__(block)["image"].to(DEVICE), MEAN, STD)
        with torch.no_grad():
            expected = torch.stack([model(image), model(image.flip(-1))], dim=1)[: len(found)]
        assert torch.equal(torch.from_numpy(logits[:, 0]), expected.cpu())
        rows += found.tolist()
    assert rows == list(range(len(index)))
