"""Collectives that gradients flow through, for ranks that compute one model together on the same tokens.

Between them activations are of two kinds: alike on all ranks, or each rank's own part (heads, columns). Each of these
functions leads from one to the other, and its gradient back.
"""

from __future__ import annotations

from collections.abc import Callable

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


_Way = Callable[[Tensor, Group, int], Tensor]


class _Along(torch.autograd.Function):
    """`there` along an axis, and its gradient by `back`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group, axis: int, there: _Way, back: _Way) -> Tensor:
        ctx.group, ctx.axis, ctx.back = group, axis, back
        return there(x, group, axis)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.back(gradient, ctx.group, ctx.axis), None, None, None, None


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """x, alike on all ranks, as what each rank's part is computed from: its gradient is the sum of what the parts give
    to it.
    """
    return _SumGradients.apply(x, group)


def sum_over(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, alike on all of them."""
    return _Sum.apply(x, group)


def gather(x: Tensor, group: Group, axis: int = -1) -> Tensor:
    """All ranks' parts, n long along an axis, one behind the other, ranks * n long; alike on all of them."""
    return _Along.apply(x, group, axis, _joined, _own)


def share(x: Tensor, group: Group, axis: int = -1) -> Tensor:
    """This rank's part, n long along an axis, of x, which is ranks * n long and alike on all of them."""
    return _Along.apply(x, group, axis, _own, _joined)


def gather_for_parts(x: Tensor, group: Group, axis: int) -> Tensor:
    """`sum_gradients` of `gather`: all ranks' parts, as what each rank's part of a layer is computed from."""
    return _Along.apply(x, group, axis, _joined, _own_of_sum)


def share_of_sum(x: Tensor, group: Group, axis: int) -> Tensor:
    """`share` of `sum_over`: this rank's part of the sum of all ranks' x.

    Raises ValueError where the axis cannot be divided over the ranks.
    """
    return _Along.apply(x, group, axis, _own_of_sum, _joined)


class SumGradients(nn.Module):
    """`sum_gradients` as a part of a model."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return sum_gradients(x, self.group)


def _own(x: Tensor, group: Group, axis: int) -> Tensor:
    return _parts(x, group, axis)[group.index].contiguous()


def _joined(x: Tensor, group: Group, axis: int) -> Tensor:
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in group.ranks]
    dist.all_gather(parts, x.contiguous(), group=group.handle)
    return torch.cat(parts, axis)


def _own_of_sum(x: Tensor, group: Group, axis: int) -> Tensor:
    parts = [part.contiguous() for part in _parts(x, group, axis)]
    own = torch.empty_like(parts[group.index])
    dist.reduce_scatter(own, parts, group=group.handle)
    return own


def _parts(x: Tensor, group: Group, axis: int) -> tuple[Tensor, ...]:
    if x.shape[axis] % group.size:
        raise ValueError(f"axis {axis} of {list(x.shape)} cannot be divided over {group.size} ranks")
    return x.chunk(group.size, axis)
