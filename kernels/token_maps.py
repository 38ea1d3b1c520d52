"""What a memory layer does to each token between its products, on a CPU: forward and gradient a piece of tokens at a
time.

Each function is a few passes over its tensors. Whole ones leave a CPU's caches between the passes, and autograd keeps
one for each; here a piece stays in the caches through all of them, and nothing is kept but the inputs. On other
devices, and where torch.compile traces, the plain expressions of model/layers.py run. Gradients of gradients are an
error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import rms_norm, silu

from kernels.closed_form import differentiable_once

PIECE_NUMBERS = 1 << 16
"""Numbers of a tensor in a piece: 256 KB in fp32, and enough for two threads to share."""

UNIT_EPS = 1e-6
"""Under the root of the l2 norm: keeps the gradient finite at zero."""

MEND = "a memory layer on a CPU has none; on other devices its convolutions and norms are plain expressions, which have"


def in_pieces(*tensors: Tensor) -> bool:
    """Whether to go piece by piece: on a CPU, in one precision, not while torch.compile traces."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.device.type == "cpu"
        and all(x.dtype == first.dtype for x in tensors)
    )


def wide(x: Tensor) -> Tensor:
    """x in fp32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """x [..., D] over its l2 norm, in fp32 or better."""
    x_wide = wide(x)
    return (x_wide * _inverse_norm(x_wide)).to(x.dtype)


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()


def causal_convolution(padded: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of padded [B, T + width - 1, C] by weight [width, C] to [B, T, C]."""
    return _Convolution.apply(padded, weight)


def unit_silu(x: Tensor, num_heads: int) -> Tensor:
    """SiLU of x [B, T, H * D], each head over its l2 norm: [B, T, H, D]."""
    return _UnitSilu.apply(x, num_heads)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [B, T, H, D] over D, times weight [H, D]."""
    return _HeadNorm.apply(x, weight, eps)


def _pieces(x: Tensor, num_tokens: int) -> Iterator[slice]:
    """Cuts tokens [B, num_tokens, ...], of which each has as many numbers as x's [B, T, ...]."""
    size = max(1, PIECE_NUMBERS * x.shape[1] // max(x.numel(), 1))
    return (slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        out = padded.new_empty(padded.shape[0], padded.shape[1] - len(weight) + 1, padded.shape[2])
        for piece in _pieces(padded, out.shape[1]):
            part = out[:, piece]
            torch.mul(padded[:, piece], weight[0], out=part)
            for offset in range(1, len(weight)):
                part.addcmul_(padded[:, piece.start + offset : piece.stop + offset], weight[offset])
        return out

    @staticmethod
    @differentiable_once(MEND)
    def backward(ctx: FunctionCtx, saved: tuple[Tensor, Tensor], d_out: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = saved
        d_padded, d_weight = torch.zeros_like(padded), torch.zeros_like(wide(weight))
        for piece in _pieces(padded, d_out.shape[1]):
            part = d_out[:, piece]
            for offset in range(len(weight)):
                seen = slice(piece.start + offset, piece.stop + offset)
                d_padded[:, seen].addcmul_(part, weight[offset])
                d_weight[offset] += (part * padded[:, seen]).sum((0, 1), dtype=d_weight.dtype)
        return d_padded, d_weight.to(weight.dtype)


class _UnitSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.num_heads = num_heads
        out = x.new_empty(*x.shape[:2], num_heads, x.shape[2] // num_heads)
        for piece in _pieces(x, x.shape[1]):
            out[:, piece] = unit(silu(x[:, piece]).unflatten(-1, (num_heads, -1)))
        return out

    @staticmethod
    @differentiable_once(MEND)
    def backward(ctx: FunctionCtx, saved: tuple[Tensor], d_out: Tensor) -> tuple[Tensor, None]:
        (x,) = saved
        d_x = torch.empty_like(x)
        for piece in _pieces(x, x.shape[1]):
            # y = r h with r = (h . h + eps)^-1/2: dh = r (dy - (y . dy) y)
            heads, d_y = wide(silu(x[:, piece])).unflatten(-1, (ctx.num_heads, -1)), wide(d_out[:, piece])
            inverse = _inverse_norm(heads)
            y = heads.mul_(inverse)
            d_heads = torch.addcmul(d_y, y, (y * d_y).sum(-1, keepdim=True), value=-1).mul_(inverse)
            d_x[:, piece] = torch.ops.aten.silu_backward(d_heads.flatten(2).to(x.dtype), x[:, piece])
        return d_x, None


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for piece in _pieces(x, x.shape[1]):
            out[:, piece] = rms_norm(wide(x[:, piece]), x.shape[-1:], None, eps).mul_(wide(weight))
        return out

    @staticmethod
    @differentiable_once(MEND)
    def backward(ctx: FunctionCtx, saved: tuple[Tensor, Tensor], d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = saved
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(wide(weight))
        for piece in _pieces(x, x.shape[1]):
            # n = r x with r = (mean(x^2) + eps)^-1/2: dx = r (dn - mean(n dn) n)
            part, d_y = wide(x[:, piece]), wide(d_out[:, piece])
            inverse = (part.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
            normal = part * inverse
            d_weight += (d_y * normal).sum((0, 1))
            d_normal = d_y * wide(weight)
            mean = (d_normal * normal).mean(-1, keepdim=True)
            d_x[:, piece] = d_normal.addcmul_(normal, mean, value=-1).mul_(inverse)
        return d_x, d_weight.to(weight.dtype), None
