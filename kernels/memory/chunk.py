"""The exact dual form over a group of consecutive chunks (README.md, section 2).

Inside a chunk every token's gradient is taken at the chunk's first weights, so the weights after token t are the first
ones plus a sum of outer products; reads, writes and the chunk's end are then a few matrix products, and no token has
weights of its own. Tensors of a group are [n, N, C, ...]: n chunks of C tokens for N = batch * heads memories. The
state of a layer is one tensor [N, 2 * d_in, d_out], weights above momentum, so that a product with both is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.activations import activate, activate_vjp
from kernels.memory.decay import decay_matrix
from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions
from kernels.memory.state import state_dtype


class GroupTokens(NamedTuple):
    """The tokens of a group; a chunk that was open has its last M <= C tokens' queries only."""

    q: Tensor  # [n, N, M, D]
    k: Tensor  # [n, N, C, D]
    v: Tensor  # [n, N, C, D]
    alpha: Tensor  # [n, N, C]
    eta: Tensor  # [n, N, C]
    theta: Tensor  # [n, N, C]


class GroupGates(NamedTuple):
    """Products of gates over each chunk: matrices [n, N, C, C], vectors [n, N, C] (names as in README.md)."""

    write: Tensor  # P = A @ H
    momentum_last: Tensor  # H[C, :]
    a: Tensor
    e: Tensor
    p: Tensor


class LayerWrites(NamedTuple):
    """What a chunk's tokens write to one layer, and what that was computed from.

    Tensors are [N, C, d] of one chunk, or [n, N, C, d] of a group's.
    """

    inputs: Tensor  # X, the layer's inputs
    outputs: Tensor | None  # X @ W; None where a backend has no use for it
    pulled: Tensor | None  # the inner gradient at the activation's output, D being at its input; None at the last layer
    gradients: Tensor  # D, the inner gradient at the layer's outputs
    steps: Tensor  # theta, [..., C]


def group_gates(alpha: Tensor, eta: Tensor) -> GroupGates:
    """Products of the gates; alpha, eta [n, N, C]. From differentiable operations."""
    keep = 1 - alpha
    keeps, momenta = decay_matrix(keep), decay_matrix(eta)
    a = keeps[..., 0] * keep[..., :1]
    e = momenta[..., 0] * eta[..., :1]
    p = (keeps @ e.unsqueeze(-1)).squeeze(-1)
    return GroupGates(keeps @ momenta, momenta[..., -1, :].clone(), a, e, p)  # a view would keep all of H alive


def step_scale(theta: Tensor, eta: Tensor) -> Tensor:
    """c = theta / (1 - eta), of which the overlap in the step bound is a sum."""
    return theta / (1 - eta).clamp_min(MIN_ONE_MINUS_ETA)


def bounded_steps(theta: Tensor, eta: Tensor, inputs: Tensor, bound: float) -> Tensor:
    """theta limited by the chunk's overlap of features: equal keys can't add up to an unstable step.

    README.md, section 3.

    Args:
        theta, eta: [N, C].
        inputs: [N, C, d], one layer's inputs at the chunk's first weights.
        bound: b, the inverse of the largest total step along one direction.
    """
    overlaps = (inputs @ inputs.mT).abs_().tril_()
    overlap = (overlaps @ step_scale(theta, eta).unsqueeze(-1)).squeeze(-1)
    return theta / (bound * overlap).clamp_min(1.0)


def chunk_writes(
    k: Tensor, v: Tensor, eta: Tensor, theta: Tensor, weights: Sequence[Tensor], options: MemoryOptions
) -> list[LayerWrites]:
    """Inner forward and backward pass of one chunk's keys: k, v [N, C, D], gates [N, C], weights L x [N, i, o]."""
    inputs, outputs = [k], []
    for weight in weights[:-1]:
        outputs.append(inputs[-1] @ weight)
        inputs.append(activate(outputs[-1], options.activation, options.activation_scale))
    outputs.append(inputs[-1] @ weights[-1])
    gradients = [2 * (outputs[-1] - v) if options.objective == "l2" else -v]
    pulled: list[Tensor | None] = [None]
    for z, weight in zip(reversed(outputs[:-1]), reversed(weights[1:]), strict=True):
        pulled.append(gradients[-1] @ weight.mT)
        gradients.append(activate_vjp(z, pulled[-1], options.activation, options.activation_scale))
    if options.step_bound is None:
        steps = [theta] * len(weights)
    else:
        steps = [bounded_steps(theta, eta, x, options.step_bound) for x in inputs]
    return [
        LayerWrites(*each) for each in zip(inputs, outputs, reversed(pulled), reversed(gradients), steps, strict=True)
    ]


def scaled_inputs(inputs: Tensor, steps: Tensor, write_last: Tensor, momentum_last: Tensor) -> Tensor:
    """A chunk's inputs times what is left of their writes at its end, in the weights and in the momentum.

    Args:
        inputs: [N, C, d_in].
        steps, write_last, momentum_last: [N, C]; the last two are the last rows of P and H.

    Returns:
        [N, C, 2 * d_in]: the chunk adds `-result^T D` to the layer's state.
    """
    return torch.cat([inputs * (last * steps).unsqueeze(-1) for last in (write_last, momentum_last)], dim=-1)


def advance(
    writes: LayerWrites, gates: GroupGates, index: int, learned: Tensor | None, state: Tensor, out: Tensor
) -> None:
    """One layer's state after chunk `index` of the group, [N, 2 * i, o], written to `out`."""
    a, e, p = (x[index, :, -1, None, None] for x in (gates.a, gates.e, gates.p))
    weights, momentum = state.chunk(2, dim=1)
    new_weights, new_momentum = out.chunk(2, dim=1)
    torch.mul(weights, a, out=new_weights)
    new_weights.addcmul_(momentum, p)
    if learned is not None:
        new_weights.addcmul_(learned, 1 - a)
    torch.mul(momentum, e, out=new_momentum)
    scaled = scaled_inputs(writes.inputs, writes.steps, gates.write[index, :, -1], gates.momentum_last[index])
    out.baddbmm_(scaled.mT, writes.gradients, alpha=-1)


class GroupTrace(NamedTuple):
    """All chunks' states and writes, one entry a layer."""

    states: list[Tensor]  # L x [n, N, 2 * i, o], at each chunk's start
    writes: list[LayerWrites]  # L, of [n, N, C, ...]
    end: list[Tensor] | None  # L x [N, 2 * i, o], after the last chunk, if asked for


def write_group(
    tokens: GroupTokens,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    with_end: bool,
) -> GroupTrace:
    """Chunk after chunk: the inner gradients at its first weights, and the state after it.

    Args:
        learned: L tensors W_0 [N, i, o]; None when the memory forgets to zero.
        state: L tensors [N, 2 * i, o] at the group's start.
        with_end: also compute the state after the last chunk.
    """
    num_chunks = tokens.k.shape[0]
    states = [s.new_empty(num_chunks, *s.shape) for s in state]
    for buffer, s in zip(states, state, strict=True):
        buffer[0] = s
    end = [torch.empty_like(s) for s in state] if with_end else None
    chunks = []
    for index in range(num_chunks):
        weights = [buffer[index].chunk(2, dim=1)[0] for buffer in states]
        chunk = (x[index] for x in (tokens.k, tokens.v, tokens.eta, tokens.theta))
        chunks.append(chunk_writes(*chunk, weights, options))
        following = [buffer[index + 1] for buffer in states] if index + 1 < num_chunks else end
        if following is not None:
            for layer, w0, buffer, out in zip(chunks[-1], learned, states, following, strict=True):
                advance(layer, gates, index, w0, buffer[index], out)
    writes = [
        LayerWrites(*(None if field[0] is None else torch.stack(field) for field in zip(*layer, strict=True)))
        for layer in zip(*chunks, strict=True)
    ]
    return GroupTrace(states, writes, end)


class LayerRead(NamedTuple):
    """A layer's read-out of a group and what its gradient needs again."""

    inputs: Tensor  # [n, N, M, i]
    mixed: Tensor  # [n, N, M, 2 * i], the inputs times a beside the inputs times p
    scores: Tensor  # [n, N, M, C], inputs against the keys' inputs
    coefficients: Tensor  # [n, N, M, C], P theta
    outputs: Tensor  # [n, N, M, o]


def times_learned(x: Tensor, learned: Tensor) -> Tensor:
    """x [n, N, M, i] @ W_0 [N, i, o], without a copy of W_0 for every chunk."""
    return (x.transpose(0, 1).flatten(1, 2) @ learned).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def read_layer(x: Tensor, gates: GroupGates, learned: Tensor | None, states: Tensor, writes: LayerWrites) -> LayerRead:
    """One layer's outputs for the last M tokens of each chunk."""
    num_queries = x.shape[-2]
    a, p = (gate[..., -num_queries:, None] for gate in (gates.a, gates.p))
    mixed = torch.cat([x * a, x * p], dim=-1)
    scores = x @ writes.inputs.mT
    coefficients = gates.write[..., -num_queries:, :] * writes.steps.unsqueeze(-2)
    out = mixed @ states
    if learned is not None:
        out.addcmul_(times_learned(x, learned), 1 - a)
    out.view(-1, *out.shape[2:]).baddbmm_(
        (scores * coefficients).flatten(0, 1), writes.gradients.flatten(0, 1), alpha=-1
    )
    return LayerRead(x, mixed, scores, coefficients, out)


def read_group(
    q: Tensor, gates: GroupGates, learned: Sequence[Tensor | None], trace: GroupTrace, options: MemoryOptions
) -> list[LayerRead]:
    """Read-out of all chunks of a group at once, layer by layer; the last one's outputs are y [n, N, M, D]."""
    reads: list[LayerRead] = []
    for w0, states, writes in zip(learned, trace.states, trace.writes, strict=True):
        x = activate(reads[-1].outputs, options.activation, options.activation_scale) if reads else q
        reads.append(read_layer(x, gates, w0, states, writes))
    return reads


def inner_gradient_norm(writes: Sequence[LayerWrites]) -> Tensor:
    """Norm of u_t over all layers, [n, N, C]: each layer's gradient is the outer product of its input and its D."""
    pairs = [(state_dtype(layer.inputs), state_dtype(layer.gradients)) for layer in writes]
    squares = [inputs.square().sum(-1) * gradients.square().sum(-1) for inputs, gradients in pairs]
    return torch.stack(squares).sum(0).sqrt()
