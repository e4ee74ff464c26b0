"""timm's Swin and SwinV2 spend half of their time beside the matrix products: on scores that no fused kernel sees, on
copies of windows, and on a position bias that is made anew in every block and forward pass.

`use_fast_attention` gives a model's blocks the classes below. Parameters, buffers, state-dict keys, `set_input_size`,
gradient checkpointing and results (up to rounding) are timm's.

- On a GPU the scores go to PyTorch's memory-efficient kernel; bias and shift mask are one float mask that broadcasts
  over the batch. On a CPU see `window_attention_cpu.py`.
- Where the bias needs a gradient it is part of every forward pass, so that DDP, FSDP2, ZeRO, gradient checkpointing and
  torch.compile need to know nothing; but it is cheap, with its sigmoid on the small table. In evaluation it is kept
  until a weight changes.

swinv2_cr_* of timm is another architecture and stays as it is.
"""

import math

import torch
import torch.nn.functional as F
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlc.models.window_attention_cpu import RECOMPUTE_ABOVE, window_attention

_CHUNKED = ("cpu",)  # devices whose attention is `window_attention`
_MAX_LOGIT_SCALE = math.log(1 / 0.01)  # SwinV2, section 3.2: tau is not smaller than 0.01


def use_fast_attention(model: nn.Module) -> nn.Module:
    """Turns timm's Swin and SwinV2 blocks in `model` into fast ones, in place; other models are left as they are."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
    return model


class _FastBlock:
    """What both versions of a block share."""

    # (what it was made of, the bias): kept in evaluation. Never saved, copied or compiled.
    _kept: tuple[tuple, Tensor] | None = None

    def __call__(self, *args, **kwargs):
        # Before the hooks: FSDP2 and ZeRO-3 have not gathered the weights yet, which shows that they are in charge.
        # Outside of the compiled `forward`: the versions of weights must not become constants of a graph.
        self._refresh()
        return super().__call__(*args, **kwargs)

    def _refresh(self) -> None:
        if self.training or torch.compiler.is_compiling() or self.dynamic_mask or not _can_keep(self.attn):
            self._kept = None
            return
        dtype = _score_dtype(self.attn.qkv.weight)
        sources = [*self.attn.bias_sources(), *([] if self.attn_mask is None else [self.attn_mask])]
        made_of = (dtype, *((source, source._version, source.data_ptr()) for source in sources))
        if self._kept is None or not _same(self._kept[0], made_of):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = made_of, self.attn.bias(self.attn_mask)

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]: shift, cut into windows, attention, and back. No copies without a need."""
        batch, height, width, channels = x.shape
        (wh, ww), shift = self.window_size, self.shift_size
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        below, right = -height % wh, -width % ww
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        rows, columns = (height + below) // wh, (width + right) // ww
        windows = x.reshape(batch, rows, wh, columns, ww, channels).transpose(2, 3).reshape(-1, wh * ww, channels)
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = self.attn(windows, mask, bias=None if self._kept is None else self._kept[1])
        x = windows.reshape(batch, rows, columns, wh, ww, channels).transpose(2, 3)
        x = x.reshape(batch, height + below, width + right, channels)
        if below or right:
            x = x[:, :height, :width]
        return torch.roll(x, shift, (1, 2)) if any(shift) else x


class FastSwinBlock(_FastBlock, v1.SwinTransformerBlock):
    pass


class FastSwinV2Block(_FastBlock, v2.SwinTransformerV2Block):
    pass


class _FastAttention:
    """What both versions of window attention share."""

    cosine: bool

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[windows, tokens, C] -> [windows, tokens, C]; mask [groups, tokens, tokens], added to the scores.

        bias: what `self.bias(mask)` returned, where that is known already.
        """
        if bias is None:
            bias = self.bias(mask)
        qkv = self._qkv(x).unflatten(-1, (3, self.num_heads, -1))
        p = self.attn_drop.p if self.training else 0.0
        x = attend(qkv, self._scale(qkv), bias, cosine=self.cosine, dropout=p)
        return self.proj_drop(self.proj(x))

    def bias(self, mask: Tensor | None) -> Tensor:
        """Position bias plus mask: [groups or 1, heads, tokens, tokens], as the kernels want it."""
        bias = _by_position(self._table(), self.window_size, self.relative_position_index)[None]
        if mask is not None:
            bias = bias + mask[:, None].to(bias.dtype)
        return _for_kernel(bias, _score_dtype(self.qkv.weight))


class FastWindowAttention(_FastAttention, v1.WindowAttention):
    cosine = False

    def bias_sources(self) -> tuple[Tensor, ...]:
        return (self.relative_position_bias_table,)

    def _table(self) -> Tensor:
        return _at_least_float(self.relative_position_bias_table)

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _scale(self, qkv: Tensor) -> Tensor:
        return torch.full((self.num_heads,), self.scale, device=qkv.device, dtype=_wide(qkv.dtype))


class FastCosineAttention(_FastAttention, v2.WindowAttention):
    cosine = True

    def bias_sources(self) -> tuple[Tensor, ...]:
        return (*self.cpb_mlp.parameters(), self.relative_coords_table)

    def _table(self) -> Tensor:
        # 16 sigmoid(x) = 8 tanh(x / 2) + 8, and softmax does not see the 8: half the rounding error in bfloat16.
        with torch.autocast(self.relative_coords_table.device.type, enabled=False):
            coordinates = self.relative_coords_table.to(self.cpb_mlp[0].weight.dtype)
            return 8 * torch.tanh(_at_least_float(self.cpb_mlp(coordinates)) / 2)

    def _qkv(self, x: Tensor) -> Tensor:
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def _scale(self, qkv: Tensor) -> Tensor:
        return _at_least_float(self.logit_scale).clamp(max=_MAX_LOGIT_SCALE).exp().flatten()


_FAST = {
    v1.WindowAttention: FastWindowAttention,
    v2.WindowAttention: FastCosineAttention,
    v1.SwinTransformerBlock: FastSwinBlock,
    v2.SwinTransformerV2Block: FastSwinV2Block,
}


# ---- attention -------------------------------------------------------------------------------------------------------


def attend(qkv: Tensor, scale: Tensor, bias: Tensor, *, cosine: bool, dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T + bias) v in every window; q and k of unit length first if `cosine`.

    qkv: [windows, tokens, 3, heads, head_dim]; window w takes the biases of group w % groups.
    scale: [heads]. bias: [groups, heads, tokens, tokens]. Returns [windows, tokens, heads * head_dim].
    """
    if qkv.device.type in _CHUNKED and not dropout:
        keep = torch.is_grad_enabled() and qkv.shape[1] <= RECOMPUTE_ABOVE
        return window_attention(qkv, scale.to(bias.dtype), bias, cosine, keep)[0]
    windows, tokens, _, heads, dim = qkv.shape
    groups = bias.shape[0]
    # The kernels take four dimensions and a mask that broadcasts over the first: windows with biases of their own
    # become heads.
    q, k, v = (
        qkv.view(-1, groups, tokens, 3, heads, dim).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        if groups > 1
        else qkv.permute(2, 0, 3, 1, 4)
    ).unbind(0)
    factor = scale.repeat(groups).view(-1, 1, 1)
    if cosine:
        factor = factor / _length(q)
        k = (k / _length(k)).to(v.dtype)
    q = (q * factor).to(v.dtype)
    mask = bias.flatten(0, 1)[None].to(q.dtype)
    # Of the fused kernels only the memory-efficient one has a gradient for a mask. cuDNN's, which PyTorch prefers on a
    # Hopper GPU, reads a mask of another type than q's as if it were of that type.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return x.unflatten(1, (groups, heads)).transpose(2, 3).reshape(windows, tokens, heads * dim)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype)).clamp_min(1e-12)


# ---- position bias ---------------------------------------------------------------------------------------------------


def _by_position(table: Tensor, window: tuple[int, int], index: Tensor) -> Tensor:
    """[..., heads] of all relative positions -> [heads, tokens, tokens]: entry (i, j) is that of position i - j.

    The same as timm's `table[index]`. On a CPU with heads first, which makes both directions fast; elsewhere without
    an index, whose gradient is slow, and on a GPU not reproducible unless slower still: sliding windows over the table
    turned by 180 degrees hold, for the last token first, the biases to all tokens.
    """
    h, w = window
    if table.device.type in _CHUNKED:
        by_head = table.reshape(-1, table.shape[-1]).t().contiguous()
        return by_head.index_select(1, index.flatten()).view(-1, h * w, h * w)
    table = table.reshape(2 * h - 1, 2 * w - 1, -1).permute(2, 0, 1)
    return table.flip(1, 2).unfold(1, h, 1).unfold(2, w, 1).flip(1, 2).reshape(-1, h * w, h * w)


def _for_kernel(bias: Tensor, dtype: torch.dtype) -> Tensor:
    bias = bias.to(dtype)
    short = -bias.shape[-1] % 8
    if bias.is_cuda and short:  # the memory-efficient kernel reads rows that begin at multiples of 8 elements
        return F.pad(bias, (0, short))[..., :-short]
    return bias


def _score_dtype(weight: Tensor) -> torch.dtype:
    """Of the mask: a GPU's kernel wants q's, which autocast decides; on a CPU it is added in float32 or wider."""
    device = weight.device.type
    if device == "cpu":
        return _wide(weight.dtype)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(_wide(x.dtype))


def _can_keep(attention: _FastAttention) -> bool:
    """Whether the bias has no gradient now and its sources know when they change (not so where FSDP2 or ZeRO-3 gathers
    weights, nor in inference mode's tensors)."""
    sources = attention.bias_sources()
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return False
    return not any(isinstance(s, DTensor) or hasattr(s, "ds_id") or s.is_inference() for s in sources)


def _same(then: tuple, now: tuple) -> bool:
    return (
        then[0] == now[0]
        and len(then) == len(now)
        and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(then[1:], now[1:], strict=True))
    )
