"""Collectives that gradients flow through, for ranks that compute one model together on the same tokens.

Between them activations are of two kinds: alike on all ranks, or each rank's own part (heads, columns). Each of these
functions leads from one to the other, and its gradient back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from parallel.mesh import Group


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy, since others may hold this tensor.
        return ctx.group.all_reduce(gradient.clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _joined(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return _own(gradient, ctx.group), None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _own(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return _joined(gradient, ctx.group), None


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """x, alike on all ranks, as what each rank's part is computed from: its gradient is the sum of what the parts give
    to it.
    """
    return _SumGradients.apply(x, group)


def sum_over(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, alike on all of them."""
    return _Sum.apply(x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """All ranks' parts [..., n] one behind the other [..., ranks * n], alike on all of them."""
    return _Gather.apply(x, group)


def share(x: Tensor, group: Group) -> Tensor:
    """This rank's part [..., n] of x [..., ranks * n], which is alike on all of them."""
    return _Share.apply(x, group)


class SumGradients(nn.Module):
    """`sum_gradients` as a part of a model."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return sum_gradients(x, self.group)


def _own(x: Tensor, group: Group) -> Tensor:
    return x.chunk(group.size, -1)[group.index].contiguous()


def _joined(x: Tensor, group: Group) -> Tensor:
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in group.ranks]
    dist.all_gather(parts, x.contiguous(), group=group.handle)
    return torch.cat(parts, -1)
