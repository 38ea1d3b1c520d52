"""Sequence parallelism: every row of tokens shared by ranks that hold the same parameters.

Each rank embeds, normalises, feeds forward and scores its own stretch of every row. Where tokens look at each other, in
attention, memory and its convolutions, it goes over by an all-to-all from all heads of its stretch to all tokens of its
heads, and back behind it (Ulysses, arXiv 2309.14509). So nothing is talked about inside a scan over tokens, there is no
halo, and states are of this rank's heads. What all tokens of a head share (learned initial memories, convolutions,
persistent tokens) every rank holds whole and uses its heads' part of; its gradient is the sum over the ranks.

With tensor ranks too, those divide the heads first, and sequence ranks what each of them holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model import TitansLM
from model.attention import AttentionLayer
from model.gates import Gates
from model.memory import MemoryLayer
from parallel.mesh import Group

TOKENS, HEADS = 1, 2
"""The axes of [B, T, H, ...], or [B, T, channels of heads]."""


def split_over_sequence_ranks(model: TitansLM, group: Group) -> None:
    """Have a model, in place, compute this rank's part of every row. All ranks give it the same whole rows.

    The sum of losses, each token's losses and scores, and logits are those of this rank's stretch, zeros elsewhere:
    their sum over the ranks is of the whole rows. The state is that of this rank's heads. Parameters stay whole (or,
    behind `split_over_tensor_ranks`, the slices they are).

    Raises:
        ValueError: a mac, or heads that do not divide (`parallel.layout_rules` says so of a recipe).
    """
    _require_divisible(model, group)
    model.to_stretch = OwnStretch(group)
    model.to_rows = StretchInRows(group)
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            module.to_heads, module.to_tokens = to_heads(group), to_tokens(group)
            module.own = _part(module.q.out_features, group)
            module.num_heads //= group.size
        elif isinstance(module, MemoryLayer):
            _split_memory(module, group)


class OwnStretch(nn.Module):
    """Whole rows [B, T] to this rank's stretch of them [B, T / ranks]."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, rows: Tensor) -> Tensor:
        """Raises ValueError where the stretches would differ in length."""
        length, ranks = rows.shape[TOKENS], self.group.size
        if length % ranks:
            raise ValueError(
                f"rows of {length} tokens cannot be shared by parallel.sequence {ranks} ranks, each of which takes a "
                f"stretch of the same length: give rows, or pieces of them, of a multiple of {ranks} tokens"
            )
        return rows.chunk(ranks, TOKENS)[self.group.index]


class StretchInRows(nn.Module):
    """What is said of each token of the stretch [B, T / ranks, ...] in its place, zeros elsewhere: [B, T, ...]."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, stretch: Tensor) -> Tensor:
        """[B, t, ...] to [B, ranks * t, ...]."""
        elsewhere = torch.zeros_like(stretch)
        return torch.cat([stretch if i == self.group.index else elsewhere for i in range(self.group.size)], TOKENS)


class Exchange(nn.Module):
    """`exchange` as a part of a model."""

    def __init__(self, group: Group, give: int, take: int) -> None:
        super().__init__()
        self.group, self.give, self.take = group, give, take

    def forward(self, x: Tensor) -> Tensor:
        """The axis `give` over the number of ranks, the axis `take` times it."""
        return exchange(x, self.group, self.give, self.take)


def to_heads(group: Group) -> Exchange:
    """All heads of this rank's stretch [B, T / ranks, H, ...] to all tokens of its heads [B, T, H / ranks, ...]."""
    return Exchange(group, HEADS, TOKENS)


def to_tokens(group: Group) -> Exchange:
    """The way back: [B, T, H / ranks, ...] to [B, T / ranks, H, ...]."""
    return Exchange(group, TOKENS, HEADS)


class GatesToHeads(nn.Module):
    """`to_heads` of all gates at once."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, gates: Gates) -> Gates:
        """[B, T / ranks, H] each to [B, T, H / ranks]."""
        return Gates(*exchange(torch.stack(gates, -1), self.group, HEADS, TOKENS).unbind(-1))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group, give: int, take: int) -> Tensor:
        ctx.group, ctx.give, ctx.take = group, give, take
        sent = x.unflatten(give, (group.size, -1)).movedim(give, 0).contiguous()
        received = torch.empty_like(sent)
        # As bytes: they are only moved, and which dtypes gloo takes here depends on torch's version.
        dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=group.handle)
        return received.movedim(0, take).flatten(take, take + 1)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradient, ctx.group, ctx.take, ctx.give), None, None, None


def exchange(x: Tensor, group: Group, give: int, take: int) -> Tensor:
    """Each rank cuts its x along the axis `give`, gives the r-th part to rank r, and lays what it takes one behind the
    other along the axis `take`. A collective, forward and backward; differentiable as often as one likes.
    """
    return _Exchange.apply(x, group, give, take)


def _split_memory(layer: MemoryLayer, group: Group) -> None:
    for stream in (layer.q, layer.k, layer.v):
        stream.to_heads = to_heads(group)
        if stream.convolution is not None:
            stream.convolution.own = _part(stream.convolution.weight.shape[1], group)
        stream.activation.num_heads //= group.size
    layer.gates_to_heads = GatesToHeads(group)
    layer.core.own = _part(len(layer.core.initial_0), group)
    layer.output.to_tokens = to_tokens(group)


def _part(count: int, group: Group) -> slice:
    """This rank's of so many heads, or channels of them."""
    size = count // group.size
    return slice(group.index * size, (group.index + 1) * size)


def _require_divisible(model: TitansLM, group: Group) -> None:
    if model.config.variant == "mac":
        raise ValueError("a mac reads its segments one after another: its rows cannot be shared by sequence ranks")
    for module in model.modules():
        heads = module.num_heads if isinstance(module, AttentionLayer) else None
        heads = len(module.core.initial_0) if isinstance(module, MemoryLayer) else heads
        if heads is not None and heads % group.size:
            raise ValueError(f"{heads} heads cannot be divided over {group.size} sequence ranks")
