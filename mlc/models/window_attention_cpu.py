"""On a CPU a window's scores fit into the cache and a batch's do not, so attention is computed a few windows at a time.

PyTorch's fused CPU kernel has no gradient for a bias, and without it each step over the scores (scale, bias, mask,
softmax and their gradients) goes through memory. Here every chunk of (window, head) pairs goes from the output of the
qkv layer to its result, and back, while it is in the cache; nothing else of the size of q, k or v is ever made.
Written as two operators that torch.compile takes whole.

Forward without gradients and for large windows: PyTorch's fused kernel on each chunk. In training the softmax of a
small window is kept and that of a large one computed again: `RECOMPUTE_ABOVE` tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

RECOMPUTE_ABOVE = 256  # tokens of a window
_SCORES_PER_THREAD = 1 << 19  # two megabytes in float32: what a second-level cache holds
_EPS = 1e-12  # of F.normalize
_NOTHING = 1e-30  # a weight of attention that no sum of float32 can see


@torch.library.custom_op("mlc::window_attention", mutates_args=(), device_types="cpu")
def window_attention(qkv: Tensor, scale: Tensor, bias: Tensor, cosine: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v in every window; q and k of unit length first if `cosine`.

    qkv: [windows, tokens, 3, heads, head_dim]; window w takes the biases of group w % groups.
    scale: [heads], without gradient if not `cosine`.
    bias: float [groups, heads, tokens, tokens], in qkv's type, or float32 where that is a half type.
    keep: also return the softmax [windows, heads, tokens, tokens], for the backward pass; else an empty tensor.

    Returns ([windows, tokens, heads * head_dim], softmax), in qkv's type and bias's.
    """
    windows, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(windows, tokens, heads, dim)
    softmax = bias.new_empty((windows, heads, tokens, tokens) if keep else 0)
    with torch.autocast("cpu", enabled=False):
        for chunk in _chunks(qkv, bias):
            w, h, added = chunk
            q, _ = _rows(qkv, 0, chunk, bias.dtype, scale, cosine)
            k, _ = _rows(qkv, 1, chunk, bias.dtype, None, cosine)
            v, _ = _rows(qkv, 2, chunk, bias.dtype)
            if keep:
                p = _softmax(q, k, added, softmax[w, h].flatten(0, 1))
                o = torch.bmm(p, v.flatten(0, 1)).view_as(q)
            else:
                o = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
            out[w, :, h] = o.transpose(1, 2)
    return out.view(windows, tokens, heads * dim), softmax


@torch.library.custom_op("mlc::window_attention_backward", mutates_args=(), device_types="cpu")
def window_attention_backward(
    grad: Tensor, qkv: Tensor, scale: Tensor, bias: Tensor, softmax: Tensor, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, scale (zeros if not `cosine`) and bias; `grad` is that of the first result."""
    windows, tokens, _, heads, dim = qkv.shape
    grad = grad.reshape(windows, tokens, heads, dim)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
    buffers = bias.new_empty(2, max(1, _pairs(tokens)), tokens, tokens)
    with torch.autocast("cpu", enabled=False):
        for chunk in _chunks(qkv, bias):
            w, h, added = chunk
            q, q_length = _rows(qkv, 0, chunk, bias.dtype, scale, cosine)
            k, k_length = _rows(qkv, 1, chunk, bias.dtype, None, cosine)
            v, _ = _rows(qkv, 2, chunk, bias.dtype)
            o = grad[w, :, h].transpose(1, 2).to(bias.dtype, memory_format=torch.contiguous_format)
            n, shape = q.shape[0] * q.shape[1], q.shape
            p, ds = buffers[0, :n], buffers[1, :n]
            p = softmax[w, h].flatten(0, 1) if softmax.numel() else _softmax(q, k, added, p)
            q, k, v, o = (t.flatten(0, 1) for t in (q, k, v, o))
            grad_qkv[w, :, 2, h] = torch.bmm(p.transpose(1, 2), o).view(shape).transpose(1, 2)
            torch.bmm(o, v.transpose(1, 2), out=ds)
            torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            _add_bias_gradient(grad_bias, ds.view(*shape[:2], tokens, tokens), w, h)
            dq, dk = torch.bmm(ds, k).view(shape), torch.bmm(ds.transpose(1, 2), q).view(shape)
            if cosine:
                grad_scale[h] += _through_length(dq, q.view(shape), q_length, scale[h]).sum((0, 2, 3)) / scale[h]
                _through_length(dk, k.view(shape), k_length)
            else:
                dq *= scale[h].view(-1, 1, 1)
            grad_qkv[w, :, 0, h] = dq.transpose(1, 2)
            grad_qkv[w, :, 1, h] = dk.transpose(1, 2)
    return grad_qkv, grad_scale, grad_bias


# ---- chunks ----------------------------------------------------------------------------------------------------------


def _pairs(tokens: int) -> int:
    return _SCORES_PER_THREAD * torch.get_num_threads() // tokens**2


def _chunks(qkv: Tensor, bias: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(windows, heads, their bias): all heads of several windows or some of one, never past the last group."""
    windows, tokens, _, heads, _ = qkv.shape
    groups = bias.shape[0]
    at_once = max(1, _pairs(tokens) // heads)
    of_heads = heads if at_once > 1 else max(1, min(heads, _pairs(tokens)))
    step = at_once if groups == 1 else min(at_once, groups)
    for cycle in range(0, windows, groups if groups > 1 else windows):
        end = cycle + groups if groups > 1 else windows
        for w in range(cycle, end, step):
            own = slice(0, 1) if groups == 1 else slice(w - cycle, min(w + step, end) - cycle)
            for h in range(0, heads, of_heads):
                yield slice(w, min(w + step, end)), slice(h, h + of_heads), bias[own, h : h + of_heads]


def _rows(
    qkv: Tensor,
    part: int,
    chunk: tuple[slice, slice, Tensor],
    dtype: torch.dtype,
    scale: Tensor | None = None,
    cosine: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q, k or v of a chunk, contiguous [windows, heads, tokens, head_dim], times `scale`. Where `cosine`, they are
    divided by their length as well, and length / scale is the second result."""
    w, h, _ = chunk
    x = qkv[w, :, part, h].transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)
    factor = None if scale is None else scale[h].view(-1, 1, 1)
    if not cosine:
        return (x if factor is None else x.mul_(factor)), None
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_EPS)
    if factor is not None:
        length /= factor
    return x.div_(length), length


def _softmax(q: Tensor, k: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """[windows * heads, tokens, tokens], in `out`."""
    torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=out)
    out.view(*q.shape[:2], *out.shape[1:]).add_(bias)
    # Behind a shift mask of -100 weights are subnormal numbers, with which a product takes ten times as long.
    return F.threshold_(torch.softmax(out, -1, out=out), _NOTHING, 0.0)


def _add_bias_gradient(total: Tensor, ds: Tensor, w: slice, h: slice) -> None:
    groups = total.shape[0]
    if groups > 1:
        total[w.start % groups : w.start % groups + len(ds), h] += ds
    else:
        total[0, h] += ds[0] if len(ds) == 1 else ds.sum(0)


def _through_length(grad: Tensor, unit: Tensor, length: Tensor, scale: Tensor | None = None) -> Tensor:
    """Turns the gradient of x / length into that of x, in place. `unit` is x / length, of length `scale` (or 1).

    Returns the inner products of `grad` and `unit` [windows, heads, tokens, 1].
    """
    along = (grad * unit).sum(-1, keepdim=True)
    grad.addcmul_(unit, along if scale is None else along / scale.view(-1, 1, 1) ** 2, value=-1)
    grad.div_(length)
    return along


# ---- what autograd, torch.compile and the FLOP counter must know -----------------------------------------------------


@window_attention.register_fake
def _(qkv, scale, bias, cosine, keep):
    windows, tokens, _, heads, dim = qkv.shape
    softmax = bias.new_empty((windows, heads, tokens, tokens) if keep else 0)
    return qkv.new_empty(windows, tokens, heads * dim), softmax


@window_attention_backward.register_fake
def _(grad, qkv, scale, bias, softmax, cosine):
    return qkv.new_empty(qkv.shape), torch.empty_like(scale), torch.empty_like(bias)


def _save(ctx, inputs, output):
    qkv, scale, bias, ctx.cosine, _ = inputs
    ctx.save_for_backward(qkv, scale, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    qkv, scale, bias, softmax = ctx.saved_tensors
    return *window_attention_backward(grad, qkv, scale, bias, softmax, ctx.cosine), None, None


window_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.mlc.window_attention)
def _(qkv, *_, out_shape=None, **__):
    windows, tokens, _, heads, dim = qkv
    return 4 * windows * heads * tokens**2 * dim


@register_flop_formula(torch.ops.mlc.window_attention_backward)
def _(grad, qkv, *_, out_shape=None, **__):
    windows, tokens, _, heads, dim = qkv
    return 8 * windows * heads * tokens**2 * dim
