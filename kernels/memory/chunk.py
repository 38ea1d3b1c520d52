"""The exact dual form over a group of consecutive chunks (README.md, section 2), from differentiable operations.

Inside a chunk every token's gradient is taken at the chunk's first weights, so the weights after token t are the first
ones plus a sum of outer products; reads, writes and the chunk's end are then a few matrix products, and no token has
weights of its own. Tensors of a group are [B, H, n, C, ...]: n chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.activations import activate, activate_vjp
from kernels.memory.decay import decay_matrix
from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions


class GroupGates(NamedTuple):
    """Products of gates over each chunk: matrices [B, H, n, C, C], vectors [B, H, n, C] (names as in README.md)."""

    write: Tensor  # P = A @ H
    momentum_last: Tensor  # H[C, :]
    a: Tensor
    e: Tensor
    p: Tensor


class ChunkWrites(NamedTuple):
    """What the tokens of one chunk write: for each layer the inputs X, gradients D and steps theta."""

    inputs: list[Tensor]  # L x [B, H, C, d_in]
    gradients: list[Tensor]  # L x [B, H, C, d_out]
    steps: list[Tensor]  # L x [B, H, C]


def group_gates(alpha: Tensor, eta: Tensor) -> GroupGates:
    """Products of the gates; alpha, eta [B, H, n, C]."""
    keep = 1 - alpha
    keeps, momenta = decay_matrix(keep), decay_matrix(eta)
    a = keeps[..., 0] * keep[..., :1]
    e = momenta[..., 0] * eta[..., :1]
    p = (keeps @ e.unsqueeze(-1)).squeeze(-1)
    return GroupGates(keeps @ momenta, momenta[..., -1, :], a, e, p)


def bounded_steps(theta: Tensor, eta: Tensor, inputs: Tensor, bound: float) -> Tensor:
    """theta limited by the chunk's overlap of features: equal keys can't add up to an unstable step.

    README.md, section 3.

    Args:
        theta, eta: [B, H, C].
        inputs: [B, H, C, d], one layer's inputs at the chunk's first weights.
        bound: b, the inverse of the largest total step along one direction.
    """
    scale = theta / (1 - eta).clamp_min(MIN_ONE_MINUS_ETA)
    overlap = ((inputs @ inputs.mT).abs().tril() @ scale.unsqueeze(-1)).squeeze(-1)
    return theta / (bound * overlap).clamp_min(1.0)


def chunk_writes(
    k: Tensor, v: Tensor, eta: Tensor, theta: Tensor, weights: Sequence[Tensor], options: MemoryOptions
) -> ChunkWrites:
    """Inner forward and backward pass of one chunk's keys: k, v [B, H, C, D], gates [B, H, C], weights [B, H, i, o]."""
    inputs, hidden = [k], []
    for weight in weights[:-1]:
        hidden.append(inputs[-1] @ weight)
        inputs.append(activate(hidden[-1], options.activation, options.activation_scale))
    gradient = 2 * (inputs[-1] @ weights[-1] - v) if options.objective == "l2" else -v
    gradients = [gradient]
    for z, weight in zip(reversed(hidden), reversed(weights[1:]), strict=True):
        gradients.append(activate_vjp(z, gradients[-1] @ weight.mT, options.activation, options.activation_scale))
    gradients.reverse()
    if options.step_bound is None:
        steps = [theta] * len(weights)
    else:
        steps = [bounded_steps(theta, eta, x, options.step_bound) for x in inputs]
    return ChunkWrites(inputs, gradients, steps)


def advance(
    writes: ChunkWrites,
    gates: GroupGates,
    index: int,
    learned: Sequence[Tensor],
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    options: MemoryOptions,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum after chunk `index` of the group."""
    write_last = gates.write[:, :, index, -1]
    momentum_last = gates.momentum_last[:, :, index]
    a, e, p = (x[:, :, index, -1, None, None] for x in (gates.a, gates.e, gates.p))
    new_weights, new_momentum = [], []
    for x, d, theta, w0, w, s in zip(*writes, learned, weights, momentum, strict=True):
        both = torch.cat([(write_last * theta).unsqueeze(-1) * d, (momentum_last * theta).unsqueeze(-1) * d], dim=-1)
        to_weights, to_momentum = (x.mT @ both).chunk(2, dim=-1)
        kept = a * w + p * s
        if options.forget_to == "init":
            kept = kept + (1 - a) * w0
        new_weights.append(kept - to_weights)
        new_momentum.append(e * s - to_momentum)
    return new_weights, new_momentum


def read_group(
    q: Tensor,
    writes: Sequence[ChunkWrites],
    gates: GroupGates,
    learned: Sequence[Tensor],
    states: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    options: MemoryOptions,
) -> Tensor:
    """Read-out of all chunks of a group at once: q [B, H, n, M, D] are the queries of each chunk's last M tokens."""
    num_queries = q.shape[-2]
    write = gates.write[..., -num_queries:, :]
    a, p = (x[..., -num_queries:, None] for x in (gates.a, gates.p))
    x = q
    for layer, w0 in enumerate(learned):
        weight = torch.stack([weights[layer] for weights, _ in states], dim=2)
        momentum = torch.stack([momentum[layer] for _, momentum in states], dim=2)
        keys = torch.stack([w.inputs[layer] for w in writes], dim=2)
        gradients = torch.stack([w.gradients[layer] for w in writes], dim=2)
        theta = torch.stack([w.steps[layer] for w in writes], dim=2)
        out = a * (x @ weight) + p * (x @ momentum) - ((x @ keys.mT) * (write * theta.unsqueeze(-2))) @ gradients
        if options.forget_to == "init":
            out = out + (1 - a) * (x @ w0.unsqueeze(1))
        x = out if layer == len(learned) - 1 else activate(out, options.activation, options.activation_scale)
    return x


def run_group(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    learned: Sequence[Tensor],
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    options: MemoryOptions,
    with_surprise: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """One group of chunks.

    Args:
        q: [B, H, n, M, D], queries of the last M <= C tokens of each chunk.
        k, v: [B, H, n, C, D]; alpha, eta, theta: [B, H, n, C].
        learned: L tensors W_0 [H, i, o]; weights, momentum: L tensors [B, H, i, o] at the group's start.
        with_surprise: also return the norm of each token's inner gradient.

    Returns:
        y [B, H, n, M, D], weights and momentum after the group, and surprise [B, H, n, C] or None.
    """
    gates = group_gates(alpha, eta)
    states, writes = [], []
    for index in range(k.shape[2]):
        chunk = (x[:, :, index] for x in (k, v, eta, theta))
        states.append((weights, momentum))
        writes.append(chunk_writes(*chunk, weights, options))
        weights, momentum = advance(writes[-1], gates, index, learned, weights, momentum, options)
    y = read_group(q, writes, gates, learned, states, options)
    surprise = torch.stack([inner_gradient_norm(w) for w in writes], dim=2) if with_surprise else None
    return y, list(weights), list(momentum), surprise


def inner_gradient_norm(writes: ChunkWrites) -> Tensor:
    """Norm of u_t over all layers, [B, H, C]: each layer's gradient is the outer product of its input and its D."""
    squares = [x.square().sum(-1) * d.square().sum(-1) for x, d in zip(writes.inputs, writes.gradients, strict=True)]
    return torch.stack(squares).sum(0).sqrt()
