"""The chunked backend in PyTorch: groups of chunks in order; the backward recomputes each group from its first state.

What stays alive between forward and backward is the inputs and one pair of weights and momentum for every group, about
`GROUP_TOKENS` tokens: neither tokens nor chunks own copies of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.memory.chunk import run_group
from kernels.memory.options import MemoryOptions
from kernels.memory.state import MemoryState, state_dtype

# A longer group stores fewer states and has a larger backward graph: at 4 heads of 64, depth 2, expansion 4 a state is
# 1 MB, so 2 KB a token.
GROUP_TOKENS = 512


class Group(NamedTuple):
    """A run of equal chunks: tokens [start, start + num_chunks * size) of the keys, queries from `first_query` on."""

    start: int
    num_chunks: int
    size: int
    first_query: int

    @property
    def stop(self) -> int:
        return self.start + self.num_chunks * self.size


def plan_groups(num_open: int, num_tokens: int, chunk_size: int) -> Iterator[Group]:
    """Cuts the keys (open chunk, then new tokens) into groups: the chunk that was open, whole chunks, the rest."""
    total = num_open + num_tokens
    start = 0
    if num_open:
        start = min(chunk_size, total)
        yield Group(0, 1, start, num_open)
    per_group = max(1, GROUP_TOKENS // chunk_size)
    while total - start >= chunk_size:
        num_chunks = min(per_group, (total - start) // chunk_size)
        yield Group(start, num_chunks, chunk_size, start)
        start += num_chunks * chunk_size
    if start < total:
        yield Group(start, 1, total - start, start)


def _chunked(x: Tensor, start: int, num_chunks: int, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, n, size, ...] of the tokens from `start` on, in the dtype of the arithmetic."""
    x = state_dtype(x[:, start : start + num_chunks * size])
    return x.unflatten(1, (num_chunks, size)).movedim(3, 1)


def _unchunked(x: Tensor) -> Tensor:
    """[B, H, n, C, ...] -> [B, n * C, H, ...]."""
    return x.movedim(1, 3).flatten(1, 2)


class _Plan(NamedTuple):
    """What is fixed for one call: the groups (whole chunks, and then at most one open chunk), options, depth."""

    groups: tuple[Group, ...]
    num_open: int
    options: MemoryOptions
    depth: int
    with_surprise: bool
    keep_states: bool

    def slices(self, group: Group, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Chunked q, k, v, alpha, eta, theta of a group; q starts `num_open` tokens later than the keys."""
        num_queries = (group.stop - group.first_query) // group.num_chunks
        q = _chunked(tensors[0], group.first_query - self.num_open, group.num_chunks, num_queries)
        return [q, *(_chunked(x, group.start, group.num_chunks, group.size) for x in tensors[1:])]

    def is_open(self, group: Group) -> bool:
        """Whether the group is a chunk that is not full: it is read and written, but the state stays at its start."""
        return group.size < self.options.chunk_size


class _DualForm(torch.autograd.Function):
    """(q, k, v, alpha, eta, theta, W_0 x L, W x L, S x L) -> (y, surprise, W x L, S x L)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, depth = tensors[:6], plan.depth
        learned, weights, momentum = (list(tensors[6 + i * depth : 6 + (i + 1) * depth]) for i in range(3))
        first = (weights, momentum)
        y, surprise, boundaries = tokens[0].new_empty(tokens[0].shape), [], []
        for group in plan.groups:
            # The first group's state is an input, saved with the others; only later ones are stored.
            boundaries.append((weights, momentum) if plan.keep_states and boundaries else None)
            out, new_weights, new_momentum, norm = run_group(
                *plan.slices(group, tokens), learned, weights, momentum, plan.options, plan.with_surprise
            )
            y[:, group.first_query - plan.num_open : group.stop - plan.num_open] = _unchunked(out)
            if norm is not None:
                surprise.append(_unchunked(norm))
            if not plan.is_open(group):
                weights, momentum = new_weights, new_momentum
        # All through save_for_backward, intermediates too: activation checkpointing can then drop and recompute them.
        ctx.plan, ctx.has_boundary = plan, [boundary is not None for boundary in boundaries]
        ctx.save_for_backward(*tensors, *(x for boundary in boundaries if boundary for pair in boundary for x in pair))
        end = [w.clone() if w is old else w for w, old in zip(weights + momentum, first[0] + first[1], strict=True)]
        norms = torch.cat(surprise, dim=1) if surprise else y.new_empty(0)
        ctx.mark_non_differentiable(norms)
        return y, norms, *end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor, _: Tensor, *grad_state: Tensor
    ) -> tuple[Tensor | None, ...]:
        plan, depth = ctx.plan, ctx.plan.depth
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        tensors, stored = saved[: 6 + 3 * depth], list(saved[6 + 3 * depth :])
        tokens, learned, first = tensors[:6], tensors[6 : 6 + depth], tensors[6 + depth :]
        grads = [torch.zeros_like(x) for x in tokens]
        grad_learned = [torch.zeros_like(w) for w in learned]
        grad_state = list(grad_state)
        for group, has_boundary in zip(reversed(plan.groups), reversed(ctx.has_boundary), strict=True):
            state = first
            if has_boundary:
                state = stored[-2 * depth :]
                del stored[-2 * depth :]
            queries = slice(group.first_query - plan.num_open, group.stop - plan.num_open)
            keys = slice(group.start, group.stop)
            pieces = [tokens[0][:, queries], *(x[:, keys] for x in tokens[1:])]
            grad_y_group = grad_y[:, queries]
            into_tokens, into_learned, into_state = _group_backward(
                plan, group, pieces, learned, state, grad_y_group, grad_state
            )
            for total, piece, where in zip(grads, into_tokens, (queries, *[keys] * 5), strict=True):
                total[:, where] += piece
            for total, piece in zip(grad_learned, into_learned, strict=True):
                total += piece
            grad_state = into_state
        return None, *grads, *grad_learned, *grad_state


def _group_backward(
    plan: _Plan,
    group: Group,
    tokens: Sequence[Tensor],
    learned: Sequence[Tensor],
    state: Sequence[Tensor],
    grad_y: Tensor,
    grad_state: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Recomputes one group with a graph and returns the gradients of its tokens, of W_0 and of its first state."""
    depth = plan.depth
    leaves = [x.detach().requires_grad_() for x in (*tokens, *learned, *state)]
    with torch.enable_grad():
        num_queries = (group.stop - group.first_query) // group.num_chunks
        q = _chunked(leaves[0], 0, group.num_chunks, num_queries)
        rest = [_chunked(x, 0, group.num_chunks, group.size) for x in leaves[1:6]]
        y, weights, momentum, _ = run_group(
            q, *rest, leaves[6 : 6 + depth], leaves[6 + depth : 6 + 2 * depth], leaves[6 + 2 * depth :], plan.options
        )
        outputs, cotangents = [_unchunked(y)], [grad_y.to(y.dtype)]
        if not plan.is_open(group):
            outputs += [*weights, *momentum]
            cotangents += grad_state
    # A dot objective doesn't look at the weights, an open chunk changes none: such leaves get no gradient here.
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    into_state = grads[6 + depth :]
    if plan.is_open(group):
        into_state = [g + later for g, later in zip(into_state, grad_state, strict=True)]
    return grads[:6], grads[6 : 6 + depth], into_state


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
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """`neural_memory` by the chunked dual form, with `state` given; see `kernels.memory.interface`."""
    num_open, num_tokens, depth = state.num_open, q.shape[1], len(weights)
    if num_open:
        k, v, alpha, eta, theta = (
            torch.cat([old.to(new.dtype), new], dim=1)
            for old, new in zip(
                (state.k, state.v, state.alpha, state.eta, state.theta), (k, v, alpha, eta, theta), strict=True
            )
        )
    groups = tuple(plan_groups(num_open, num_tokens, options.chunk_size))
    plan = _Plan(groups, num_open, options, depth, with_surprise, keep_states=torch.is_grad_enabled())
    learned = [state_dtype(w) for w in weights]
    y, surprise, *end = _DualForm.apply(plan, q, k, v, alpha, eta, theta, *learned, *state.weights, *state.momentum)
    tail = k.shape[1] - k.shape[1] % options.chunk_size
    # Copies: a view would keep the whole sequence alive for as long as the state lives.
    rest = (x[:, tail:].clone() for x in (k, v, alpha, eta, theta))
    new_state = MemoryState(tuple(end[:depth]), tuple(end[depth:]), *rest)
    return y, new_state, surprise[:, num_open:] if with_surprise else None
