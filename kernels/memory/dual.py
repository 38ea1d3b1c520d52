"""The chunked backends: groups of chunks in order; the backward recomputes each group from its first state.

What stays alive between forward and backward is the inputs and one pair of weights and momentum for every group, about
`GROUP_TOKENS` tokens: neither tokens nor chunks own copies of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.chunk import GroupTokens, group_gates, inner_gradient_norm
from kernels.memory.options import MemoryOptions
from kernels.memory.state import MemoryState, state_dtype

# A longer group stores fewer states between forward and backward, and has more chunks' states at once while it runs: at
# 4 heads of 64, depth 2, expansion 4 a state is 1 MB, so 4 KB a token are stored. Over 4,096 tokens of them a forward
# and backward hold at most 69, 66 and 86 MB with 128, 256 and 512; 256 is as fast as 512, on one core and on two.
GROUP_TOKENS = 256


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


def _chunked(x: Tensor, num_chunks: int) -> Tensor:
    """[B, n * C, H, ...] -> [n, B * H, C, ...]."""
    x = x.unflatten(1, (num_chunks, -1))
    return x.movedim((1, 0, 3), (0, 1, 2)).flatten(1, 2)


def _unchunked(x: Tensor, batch_size: int) -> Tensor:
    """[n, B * H, C, ...] -> [B, n * C, H, ...]."""
    return x.unflatten(1, (batch_size, -1)).movedim((0, 1, 2), (1, 0, 3)).flatten(1, 2)


class _Plan(NamedTuple):
    """What is fixed for one call: the groups (whole chunks, and then at most one open chunk), options, depth."""

    backend: GroupBackend
    groups: tuple[Group, ...]
    num_open: int
    options: MemoryOptions
    depth: int
    with_surprise: bool
    keep_states: bool

    def spans(self, group: Group) -> tuple[slice, slice]:
        """Where the group's queries and keys stand; queries start `num_open` tokens later than keys."""
        return slice(group.first_query - self.num_open, group.stop - self.num_open), slice(group.start, group.stop)

    def tokens(self, group: Group, tensors: Sequence[Tensor]) -> GroupTokens:
        """q, k, v, alpha, eta, theta of a group, in the dtype of the arithmetic."""
        queries, keys = self.spans(group)
        pieces = [
            _chunked(x[:, span], group.num_chunks) for x, span in zip(tensors, (queries, *[keys] * 5), strict=True)
        ]
        num_kept = 3 if self.backend.takes_bf16 else 0
        return GroupTokens(*pieces[:num_kept], *(state_dtype(x) for x in pieces[num_kept:]))

    def is_open(self, group: Group) -> bool:
        """Whether the group is a chunk that is not full: it is read and written, but the state stays at its start."""
        return group.size < self.options.chunk_size

    def targets(self, learned: Sequence[Tensor], batch_size: int) -> list[Tensor | None]:
        """What each memory forgets to: W_0 of its head, L x [B * H, i, o], or None for zero."""
        if self.options.forget_to == "zero":
            return [None] * self.depth
        return [w.expand(batch_size, *w.shape).flatten(0, 1) for w in learned]


def _stacked(weights: Sequence[Tensor], momentum: Sequence[Tensor]) -> list[Tensor]:
    """L x [B, H, i, o] of each -> L x [B * H, 2 * i, o], as chunk.py has them."""
    return [torch.cat(pair, dim=2).flatten(0, 1) for pair in zip(weights, momentum, strict=True)]


def _unstacked(state: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """L x [B * H, 2 * i, o] -> L weights and then L momenta [B, H, i, o], each with storage of its own."""
    pairs = [s.unflatten(0, (batch_size, -1)).chunk(2, dim=2) for s in state]
    return [part.clone(memory_format=torch.contiguous_format) for side in zip(*pairs, strict=True) for part in side]


def _group_forward(
    plan: _Plan, tokens: GroupTokens, learned: Sequence[Tensor | None], state: Sequence[Tensor], is_open: bool
) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
    """A group's y [n, N, M, D], surprise [n, N, C] if asked for, and state after it; its trace is gone on return."""
    gates = group_gates(tokens.alpha, tokens.eta)
    trace = plan.backend.write(tokens, gates, learned, state, plan.options, with_end=not is_open)
    y = plan.backend.read(tokens.q, gates, learned, trace, plan.options)
    return y, inner_gradient_norm(trace.writes) if plan.with_surprise else None, trace.end


class _DualForm(torch.autograd.Function):
    """(q, k, v, alpha, eta, theta, W_0 x L, W x L, S x L) -> (y, surprise, W x L, S x L)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, depth = tensors[:6], plan.depth
        batch_size = tokens[0].shape[0]
        learned = plan.targets(tensors[6 : 6 + depth], batch_size)
        state = _stacked(tensors[6 + depth : 6 + 2 * depth], tensors[6 + 2 * depth :])
        y, surprise, boundaries = tokens[0].new_empty(tokens[0].shape), [], []
        for group in plan.groups:
            # The first group's state is an input, saved with the others; only later ones are stored.
            boundaries.append(state if plan.keep_states and boundaries else None)
            out, norm, end = _group_forward(plan, plan.tokens(group, tokens), learned, state, plan.is_open(group))
            y[:, plan.spans(group)[0]] = _unchunked(out, batch_size)
            if norm is not None:
                surprise.append(_unchunked(norm, batch_size))
            state = end or state
        # All through save_for_backward, intermediates too: activation checkpointing can then drop and recompute them.
        ctx.plan, ctx.has_boundary = plan, [boundary is not None for boundary in boundaries]
        ctx.save_for_backward(*tensors, *(s for boundary in boundaries if boundary for s in boundary))
        norms = torch.cat(surprise, dim=1) if surprise else y.new_empty(0)
        ctx.mark_non_differentiable(norms)
        ctx.set_materialize_grads(False)
        return y, norms, *_unstacked(state, batch_size)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor | None, _: None, *grad_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan, depth = ctx.plan, ctx.plan.depth
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        tensors, stored = saved[: 6 + 3 * depth], list(saved[6 + 3 * depth :])
        tokens, learned = tensors[:6], tensors[6 : 6 + depth]
        batch_size = tokens[0].shape[0]
        targets = plan.targets(learned, batch_size)
        grads = [torch.zeros_like(x) for x in tokens]
        grad_learned = [torch.zeros_like(w) for w in learned]
        if grad_y is None:
            grad_y = torch.zeros_like(tokens[0])
        grad_state = None  # where nothing follows from the state after the last token
        if any(grad is not None for grad in grad_end):
            ends = [
                torch.zeros_like(x) if grad is None else grad
                for grad, x in zip(grad_end, tensors[6 + depth :], strict=True)
            ]
            grad_state = _stacked(ends[:depth], ends[depth:])
        for group, has_boundary in zip(reversed(plan.groups), reversed(ctx.has_boundary), strict=True):
            if has_boundary:
                state = stored[-depth:]
                del stored[-depth:]
            else:
                state = _stacked(tensors[6 + depth : 6 + 2 * depth], tensors[6 + 2 * depth :])
            queries, keys = plan.spans(group)
            found = plan.backend.gradients(
                plan.tokens(group, tokens), targets, state, plan.options,
                state_dtype(_chunked(grad_y[:, queries], group.num_chunks)),
                None if plan.is_open(group) else grad_state,
            )  # fmt: skip
            for total, piece, span in zip(grads, found.tokens, (queries, *[keys] * 5), strict=True):
                total[:, span] += _unchunked(piece, batch_size)
            for total, piece in zip(grad_learned, found.learned, strict=True):
                if piece is not None:
                    total += piece.unflatten(0, (batch_size, -1)).sum(0)
            if plan.is_open(group) and grad_state is not None:
                grad_state = [g + later for g, later in zip(found.state, grad_state, strict=True)]
            else:
                grad_state = found.state
            del found, piece  # before the next group's
        return None, *grads, *grad_learned, *_unstacked(grad_state, batch_size)


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
    backend = backend or DualForm()
    plan = _Plan(backend, groups, num_open, options, depth, with_surprise, keep_states=torch.is_grad_enabled())
    learned = [state_dtype(w) for w in weights]
    y, surprise, *end = _DualForm.apply(plan, q, k, v, alpha, eta, theta, *learned, *state.weights, *state.momentum)
    tail = k.shape[1] - k.shape[1] % options.chunk_size
    # Copies: a view would keep the whole sequence alive for as long as the state lives.
    rest = (x[:, tail:].clone() for x in (k, v, alpha, eta, theta))
    new_state = MemoryState(tuple(end[:depth]), tuple(end[depth:]), *rest)
    return y, new_state, surprise[:, num_open:] if with_surprise else None
