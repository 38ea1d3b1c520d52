"""What each token did to a memory, as norms: how surprising it was, and how far it moved the weights.

From the writes that the dual form computes, so it is what the model does, and no token's weights are formed: what a
token changes is a sum of the chunk's outer products, of its offset and of its momentum, and the norm of that sum is a
quadratic form of their products with each other (C x C in a chunk of C tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.chunk import GroupTokens, LayerWrites, inner_gradient_norm, write_group
from kernels.memory.dual import chunked, plan_groups, stacked, unchunked
from kernels.memory.gates import GatesForGradient, group_gates
from kernels.memory.options import MemoryOptions
from kernels.memory.state import MemoryState, state_dtype


class TokenNorms(NamedTuple):
    """Of every token and head, [B, T, H]; Frobenius norms over all layers of the memory's network together."""

    surprise: Tensor
    """Norm of u_t, the gradient of the token's inner loss at the weights of its chunk's start: momentary surprise."""
    momentum: Tensor
    """Norm of S_t: past and momentary surprise together, as the token adds them to the weights."""
    change: Tensor
    """Norm of W_t - W_{t-1}: what the token wrote, and what was forgotten at it."""


@torch.no_grad()
def token_norms(
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: Sequence[Tensor],
    state: MemoryState | None,
    options: MemoryOptions,
) -> TokenNorms:
    """The norms for tokens that `neural_memory` is given with the same arguments and options.

    Args:
        k, v: [B, T, H, D], T >= 1.
        alpha, eta, theta: [B, T, H].
        weights: W_0, L tensors [H, d_in, d_out].
        state: where an earlier piece of the sequence ended; None for a beginning.

    Returns:
        Surprise in the dtype of the memory's arithmetic, the others in float64: they are roots of differences.
    """
    batch_size, num_tokens = k.shape[:2]
    if state is None:
        state = MemoryState.initial(weights, batch_size, k.dtype)
    num_open = state.num_open
    before = (state.k, state.v, state.alpha, state.eta, state.theta)
    tokens = [
        state_dtype(torch.cat([old.to(new.dtype), new], dim=1))
        for old, new in zip(before, (k, v, alpha, eta, theta), strict=True)
    ]
    initial = [state_dtype(w).expand(batch_size, *w.shape).flatten(0, 1) for w in weights]
    learned = initial if options.forget_to == "init" else [None] * len(weights)
    groups = tuple(plan_groups(num_open, num_tokens, options.chunk_size))
    carried, found = stacked(state.weights, state.momentum), []
    for (num_chunks, size), *pieces in zip(
        groups, *(x.split([n * c for n, c in groups], dim=1) for x in tokens), strict=True
    ):
        keys, *others = (chunked(x, num_chunks) for x in pieces)
        group = GroupTokens(keys, keys, *others)
        products = GatesForGradient.of(group.alpha.double(), group.eta.double())
        gates = group_gates(group.alpha, group.eta)
        trace = write_group(group, gates, learned, carried, options, with_end=size == options.chunk_size)
        squares = [
            _squares(writes, start, w0, products, group)
            for writes, start, w0 in zip(trace.writes, trace.states, learned, strict=True)
        ]
        momentum, change = (torch.stack(of).sum(0).clamp_min(0.0).sqrt() for of in zip(*squares, strict=True))
        norms = (inner_gradient_norm(trace.writes), momentum, change)
        found.append([unchunked(x, batch_size) for x in norms])
        carried = trace.end or carried
    return TokenNorms(*(torch.cat(parts, dim=1)[:, num_open:] for parts in zip(*found, strict=True)))


def _squares(
    writes: LayerWrites, start: Tensor, learned: Tensor | None, products: GatesForGradient, group: GroupTokens
) -> tuple[Tensor, Tensor]:
    """Squared norms of S_t and of W_t - W_{t-1} in one layer, [n, N, C] each, float64.

    Both are sums of the chunk's first momentum S, of its offset V = W - W_0 (or W, where the memory forgets to zero)
    and of the outer products x_i d_i^T of its tokens, with the factors of README.md, section 2.
    """
    x, d, steps = writes.inputs.double(), writes.gradients.double(), writes.steps.double()
    offset, momentum = (writes.weights(part.double()) for part in start.unbind(2))
    offset = offset if learned is None else offset - learned.double()
    (write, _, a, e, p), (_, momenta) = products
    by_step = steps.unsqueeze(-2)
    # S_t = e_t S - sum_i H[t,i] theta_i x_i d_i^T; W_t = ... + a_t V + p_t S - sum_i P[t,i] theta_i x_i d_i^T
    of_momentum = (torch.zeros_like(e), e, -momenta.mT * by_step)
    of_change = (_differences(a, 1.0), _differences(p, 0.0), _differences(-write * by_step, 0.0, dim=-2))
    gram = (x @ x.mT) * (d @ d.mT)
    with_offset, with_momentum = (((x @ part) * d).sum(-1) for part in (offset, momentum))
    pairs = [(left * right).sum((-2, -1)).unsqueeze(-1) for left, right in
             ((offset, offset), (offset, momentum), (momentum, momentum))]  # fmt: skip

    def square(c_offset: Tensor, c_momentum: Tensor, c_tokens: Tensor) -> Tensor:
        outer = ((c_tokens @ gram) * c_tokens).sum(-1)
        crossed = c_offset * _times(c_tokens, with_offset) + c_momentum * _times(c_tokens, with_momentum)
        own = c_offset**2 * pairs[0] + 2 * c_offset * c_momentum * pairs[1] + c_momentum**2 * pairs[2]
        return outer + 2 * crossed + own

    return square(*of_momentum), square(*of_change)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[..., C, C] times [..., C]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _differences(x: Tensor, before: float, dim: int = -1) -> Tensor:
    """From each token to the next along `dim`; `before`: the value before the first."""
    first = torch.full_like(x.narrow(dim, 0, 1), before)
    return x.diff(dim=dim, prepend=first)
