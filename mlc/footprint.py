"""What a model costs in memory and FLOPs, counted without a GPU and almost without memory.

The model runs forward on fake tensors that say they lie on a GPU: autocast chooses what it chooses there, every
storage that autograd would keep for the backward pass counts once, and what each operator reads and writes is added
up. Attention that a GPU does in a fused kernel keeps what PyTorch's memory-efficient one does: q, k, v, the result, the
logarithm of the softmax's sums, and the mask.

Two batches are counted, because position biases of Swin are kept once for all images: what grows with the batch stands
apart from what does not. Not counted are the gradients and buffers that live for a moment in the backward pass, and
what torch.compile would keep, whose partitioner wants a real device.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp.decompositions import gru_impl, lstm_impl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mlc.models.build import build_model
from mlc.models.fusion import Fused
from mlc.models.text import build_text_model
from mlc.parallel.recompute import recompute
from mlc.parallel.strategy import AUTOCAST, blocks

_FEW, _MANY = 2, 4  # images; batch norm wants more than one
_RECURRENT = {torch.gru: gru_impl, torch.lstm: lstm_impl}


@dataclass(frozen=True)
class Costs:
    """Of a model and one image, with captions one image and its caption.

    Attributes:
        parameters, trainable, largest: numbers of parameters: all, those that learn, those of the largest block or,
            where these are more, those that are in none, such as word embeddings.
        flops, recomputed: FLOPs of a forward pass, and of what the backward pass computes again.
        activations, shared: bytes at the peak of the backward pass: of each image, and of a micro-batch of any size.
        moved, moved_again: bytes of activations that the operators of a forward pass read and write, and those of
            what is computed again.
    """

    parameters: int
    trainable: int
    largest: int
    flops: int
    activations: int
    shared: int = 0
    recomputed: int = 0
    moved: int = 0
    moved_again: int = 0


@dataclass(frozen=True)
class Text:
    """Captions of `max_tokens` tokens; `text_model` and `fusion` as in `Config`, the fusion `none` being the captions
    alone; `vocabulary`: words of `bigru`."""

    text_model: str
    fusion: str = "none"
    max_tokens: int = 64
    vocabulary: int | None = None

    def model(self, image: nn.Module | None, num_classes: int) -> Fused:
        vocabulary = self.vocabulary if self.text_model == "bigru" else None
        encoder = build_text_model(self.text_model, pretrained=False, vocabulary=vocabulary)
        return Fused(image, encoder, fusion=self.fusion, num_classes=num_classes, empty=[0])


def count(
    *,
    name: str,
    num_classes: int,
    img_size: int,
    amp: str = "none",
    attention: str = "fast",
    again: str = "none",
    text: Text | None = None,
) -> Costs:
    """The costs of a timm model; amp: bf16, fp16 or none; attention: as in `build_model`; again: as in `recompute`;
    text: captions beside the images, or alone.

    Raises:
        UserError: an impossible model or mode.
    """
    images = text is None or text.fusion != "none"
    model = build_model(name=name, num_classes=num_classes, img_size=img_size, attention=attention) if images else None
    model = text.model(model, num_classes) if text else model
    parts = recompute(model, again)

    def batch(size: int) -> tuple[Tensor | None, ...]:
        image = torch.zeros(size, 3, img_size, img_size, device="cuda") if images else None
        if text is None:
            return (image,)
        tokens = torch.ones(size, text.max_tokens, dtype=torch.long, device="cuda")
        return image, tokens, tokens.bool()

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _fake(model, mode)
        few, many = (peak(model, parts, batch(size), AUTOCAST.get(amp)) for size in (_FEW, _MANY))
    each = [(m - f) // (_MANY - _FEW) for f, m in zip(few, many, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    return Costs(
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max([parameters - sum(inside), *inside]),
        activations=each[0],
        shared=few[0] - _FEW * each[0],
        flops=each[1],
        recomputed=each[2],
        moved=each[3],
        moved_again=each[4],
    )


def peak(
    model: nn.Module, parts: Sequence[nn.Module], batch: tuple[Tensor | None, ...], autocast: torch.dtype | None
) -> tuple[int, int, int, int, int]:
    """(bytes kept at the worst moment, FLOPs of the forward pass, FLOPs computed again, bytes moved by the forward
    pass, bytes moved again) of one batch, the arguments of the model.

    parts: what `recompute` has returned. Each has its own activations again when its turn comes in the backward pass,
    and a gradient as large as the largest of them, beside what was kept by all that came before it.
    """
    again = [vars(part).pop("forward") for part in parts]
    plain = trace(model, *batch, parts=parts, autocast=autocast)
    for part, forward in zip(parts, again, strict=True):
        part.forward = forward
    if not parts:
        return plain.kept, plain.flops, 0, plain.moved, 0
    less = trace(model, *batch, parts=parts, autocast=autocast)
    worst = max(
        own.kept + own.largest + now.before + now.kept for own, now in zip(plain.regions, less.regions, strict=True)
    )
    again = [sum(region.flops for region in plain.regions), sum(region.moved for region in plain.regions)]
    return max(less.kept, worst), plain.flops, again[0], plain.moved, again[1]


# ---- one forward pass ------------------------------------------------------------------------------------------------


@dataclass
class Region:
    """A module in a forward pass: bytes kept before it, bytes it keeps itself and of these the largest tensor, and its
    FLOPs and bytes moved up to the last tensor that it keeps, behind which nothing is computed again."""

    before: int
    flops_before: int
    moved_before: int
    kept: int = 0
    largest: int = 0
    flops: int = 0
    moved: int = 0


@dataclass
class Pass:
    """Bytes that a forward pass keeps for the backward pass beside the weights, its FLOPs, and the bytes that its
    operators read and write."""

    kept: int = 0
    flops: int = 0
    moved: int = 0
    regions: list[Region] = field(default_factory=list)


def trace(
    model: nn.Module, *batch: Tensor | None, parts: Sequence[nn.Module] = (), autocast: torch.dtype | None = None
) -> Pass:
    """Runs `model` forward, on fake or real tensors of any device, the last of which there is; a storage counts once.

    Weights in low precision, of which autocast makes one copy a step, belong to the weights. `parts` get regions, in
    the order in which they run; they must not be nested.
    """
    weights = _Weights(model)
    kept: dict[int, int] = {}
    held: list[torch.UntypedStorage] = []
    regions: list[Region] = []
    inside: list[Region] = []  # one, or none
    counter, traffic = FlopCounterMode(display=False), _Traffic()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        fresh = storage._cdata not in kept and storage._cdata not in weights.storages
        if fresh:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)  # an address is only a name while nobody else can get it
        for region in inside:
            region.flops = counter.get_total_flops() - region.flops_before
            region.moved = traffic.moved - region.moved_before
            region.kept += storage.nbytes() * fresh
            region.largest = max(region.largest, storage.nbytes() * fresh)
        return tensor

    def enter(*_) -> None:
        inside.append(Region(sum(kept.values()), counter.get_total_flops(), traffic.moved))
        regions.append(inside[0])

    def leave(*_) -> None:
        inside.pop()

    hooks = [hook for p in parts for hook in (p.register_forward_pre_hook(enter), p.register_forward_hook(leave))]
    with (
        _autocast(batch[-1].device.type, autocast),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        _Kernels(),
        weights,
        counter,
        traffic,
    ):
        model(*batch)
    for hook in hooks:
        hook.remove()
    return Pass(sum(kept.values()), counter.get_total_flops(), traffic.moved, regions)


class _Weights(TorchDispatchMode):
    """Storages of weights, buffers and the copies that autocast makes of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.storages = {storage._cdata for storage in self._held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.storages:
            self._held.append(out.untyped_storage())
            self.storages.add(self._held[-1]._cdata)
        return out


class _Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each a kernel of its own, as without a compiler; a view moves nothing."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        there = {t.untyped_storage()._cdata for t in read}
        view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in there for t in written)
        if written and not view:  # nothing is written by a question, such as for the device
            self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))
        return out


class _Kernels(TorchFunctionMode):
    """Fake tensors have no kernels to choose from: PyTorch would take attention to pieces, and ask for cuDNN where a
    recurrent layer is better taken to pieces, whose gates are what cuDNN keeps of it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _RECURRENT and isinstance(args[0], torch._subclasses.FakeTensor):
            return _RECURRENT[func](*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and isinstance(args[0], torch._subclasses.FakeTensor):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast also where there is no such device, which torch.autocast refuses."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA is not available")
            yield
    finally:
        if not torch.autocast_decrement_nesting():
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def _fake(model: nn.Module, mode: FakeTensorMode, device: str = "cuda") -> None:
    """Weights and buffers without memory, on a GPU that need not be there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty_like(mode.from_tensor(parameter.detach()), device=device)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(mode.from_tensor(buffer), device=device))
        if isinstance(module, nn.RNNBase):  # which keeps lists of its weights, and would lay them out for cuDNN
            with torch.backends.cudnn.flags(enabled=False):
                module._init_flat_weights()
