"""The chunked backends: groups of chunks in order; the backward recomputes each group from its first state.

What stays alive between forward and backward is the inputs and one pair of weights and momentum for every group, about
`GROUP_TOKENS` tokens: neither tokens nor chunks own copies of the weights. Each group's is freed when its backward is
done, while the tokens' gradients grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.autocast import outside_autocast
from kernels.closed_form import differentiable_once
from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.chunk import GroupTokens, inner_gradient_norm
from kernels.memory.gates import group_gates
from kernels.memory.options import MemoryOptions
from kernels.memory.state import MemoryState, state_dtype

# A longer group stores fewer states between forward and backward, and has more chunks' states at once while it runs: at
# 4 heads of 64, depth 2, expansion 4 a state is 1 MB, so 4 KB a token are stored, until a group's backward is done.
GROUP_TOKENS = 256


def plan_groups(num_open: int, num_tokens: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Cuts the keys (open chunk, then new tokens) into groups: the chunk that was open, whole chunks, the rest.

    Yields:
        The chunks of a group and the tokens of each of them.
    """
    rest = num_open + num_tokens
    if num_open:
        size = min(chunk_size, rest)
        yield 1, size
        rest -= size
    per_group = max(1, GROUP_TOKENS // chunk_size)
    while rest >= chunk_size:
        num_chunks = min(per_group, rest // chunk_size)
        yield num_chunks, chunk_size
        rest -= num_chunks * chunk_size
    if rest:
        yield 1, rest


def chunked(x: Tensor, num_chunks: int) -> Tensor:
    """[B, n * C, H, ...] -> [n, B * H, C, ...]."""
    x = x.unflatten(1, (num_chunks, -1))
    return x.movedim((1, 0, 3), (0, 1, 2)).flatten(1, 2).contiguous()


def unchunked(x: Tensor, batch_size: int) -> Tensor:
    """[n, B * H, C, ...] -> [B, n * C, H, ...]."""
    return x.unflatten(1, (batch_size, -1)).movedim((0, 1, 2), (1, 0, 3)).flatten(1, 2)


class _Call(NamedTuple):
    """What is fixed for one group."""

    backend: GroupBackend
    options: MemoryOptions
    num_chunks: int
    is_open: bool
    """Whether the group is a chunk that is not full: it is read and written, but the state stays at its start."""
    with_surprise: bool

    def tokens(self, tensors: Sequence[Tensor]) -> GroupTokens:
        """q, k, v, alpha, eta, theta of the group, [B, tokens, H, ...], in the dtype of the arithmetic."""
        pieces = [chunked(x, self.num_chunks) for x in tensors]
        num_kept = 3 if self.backend.takes_bf16 else 0
        return GroupTokens(*pieces[:num_kept], *(state_dtype(x) for x in pieces[num_kept:]))


def stacked(weights: Sequence[Tensor], momentum: Sequence[Tensor]) -> list[Tensor]:
    """L x [B, H, i, o] of each -> L x [B * H, 2 * i, o], as a group has them."""
    return [torch.cat(pair, dim=2).flatten(0, 1) for pair in zip(weights, momentum, strict=True)]


def _unstacked(state: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """L x [B * H, 2 * i, o] -> L weights and then L momenta [B, H, i, o], each with storage of its own."""
    pairs = [s.unflatten(0, (batch_size, -1)).chunk(2, dim=2) for s in state]
    return [part.clone(memory_format=torch.contiguous_format) for side in zip(*pairs, strict=True) for part in side]


class _Group(torch.autograd.Function):
    """(q, k, v, alpha, eta, theta, targets x L, state x L) -> (y, surprise, state x L but of an open chunk).

    Tokens are [B, tokens of the group, H, ...], a target is what a memory forgets to, W_0 [B * H, i, o], or None for
    zero. A function of its own for each group: what it stores is freed as soon as its own backward is done.
    """

    @staticmethod
    @outside_autocast
    def forward(
        ctx: torch.autograd.function.FunctionCtx, call: _Call, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        depth = (len(tensors) - 6) // 2
        targets, state = tensors[6 : 6 + depth], tensors[6 + depth :]
        tokens, batch_size = call.tokens(tensors[:6]), tensors[0].shape[0]
        gates = group_gates(tokens.alpha, tokens.eta)
        trace = call.backend.write(tokens, gates, targets, state, call.options, with_end=not call.is_open)
        y = unchunked(call.backend.read(tokens.q, gates, targets, trace, call.options), batch_size)
        surprise = unchunked(inner_gradient_norm(trace.writes), batch_size) if call.with_surprise else None
        # All through save_for_backward: activation checkpointing can then drop and recompute it.
        ctx.call = call
        ctx.save_for_backward(*tensors)
        if surprise is not None:
            ctx.mark_non_differentiable(surprise)
        ctx.set_materialize_grads(False)
        return y.to(tensors[0].dtype), surprise, *(trace.end or ())

    @staticmethod
    @differentiable_once("neural_memory has them with backend='reference', token by token")
    @outside_autocast
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        tensors: tuple[Tensor | None, ...],
        d_y: Tensor | None,
        _: None,
        *d_end: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        call, depth = ctx.call, (len(tensors) - 6) // 2
        targets, state, batch_size = tensors[6 : 6 + depth], tensors[6 + depth :], tensors[0].shape[0]
        if d_y is None:
            d_y = torch.zeros_like(tensors[0])
        if any(d is not None for d in d_end):
            d_end = [torch.zeros_like(s) if d is None else d for d, s in zip(d_end, state, strict=True)]
        else:
            d_end = None  # where nothing follows from the state after the group
        found = call.backend.gradients(
            call.tokens(tensors[:6]), targets, state, call.options, state_dtype(chunked(d_y, call.num_chunks)), d_end
        )
        d_tokens = (unchunked(d, batch_size).to(x.dtype) for d, x in zip(found.tokens, tensors[:6], strict=True))
        return None, *d_tokens, *found.learned, *found.state


def neural_memory_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: Sequence[Tensor],
    state: MemoryState,
    options: MemoryOptions,
    with_surprise: bool = False,
    backend: GroupBackend | None = None,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """`neural_memory` in chunks, with `state` given, by PyTorch if not told otherwise; see `interface.py`."""
    num_open, num_tokens, depth = state.num_open, q.shape[1], len(weights)
    if num_open:
        k, v, alpha, eta, theta = (
            torch.cat([old.to(new.dtype), new], dim=1)
            for old, new in zip(
                (state.k, state.v, state.alpha, state.eta, state.theta), (k, v, alpha, eta, theta), strict=True
            )
        )
    groups = tuple(plan_groups(num_open, num_tokens, options.chunk_size))
    keys = [num_chunks * size for num_chunks, size in groups]
    queries = [keys[0] - num_open, *keys[1:]]
    pieces = [q.split(queries, dim=1), *(x.split(keys, dim=1) for x in (k, v, alpha, eta, theta))]
    batch_size = q.shape[0]
    targets: list[Tensor | None] = [None] * depth
    if options.forget_to == "init":
        targets = [state_dtype(w).expand(batch_size, *w.shape).flatten(0, 1) for w in weights]
    carried, reads, surprises = stacked(state.weights, state.momentum), [], []
    for (num_chunks, size), *tokens in zip(groups, *pieces, strict=True):
        call = _Call(backend or DualForm(), options, num_chunks, size < options.chunk_size, with_surprise)
        y, surprise, *end = _Group.apply(call, *tokens, *targets, *carried)
        carried = end or carried
        reads.append(y)
        surprises.append(surprise)
    end = _unstacked(carried, batch_size)
    tail = k.shape[1] - k.shape[1] % options.chunk_size
    # Copies: a view would keep the whole sequence alive for as long as the state lives.
    rest = (x[:, tail:].clone() for x in (k, v, alpha, eta, theta))
    new_state = MemoryState(tuple(end[:depth]), tuple(end[depth:]), *rest)
    return torch.cat(reads, dim=1), new_state, torch.cat(surprises, dim=1)[:, num_open:] if with_surprise else None
