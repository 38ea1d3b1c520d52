"""The exact dual form over a group of consecutive chunks (README.md, section 2).

Inside a chunk every token's gradient is taken at the chunk's first weights, so the weights after token t are the first
ones plus a sum of outer products; reads, writes and the chunk's end are then a few matrix products, and no token has
weights of its own. Tensors of a group are [n, N, C, ...]: n chunks of C tokens for N = batch * heads memories. The
state of a layer is one tensor [N, 2 * d_in, d_out], weights above momentum; while a group is computed these two stand
apart. A gate that scales both sides of a product is applied to the narrower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.activations import activate_into, activate_vjp
from kernels.memory.gates import GroupGates
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


class LayerWrites(NamedTuple):
    """What a chunk's tokens write to one layer, and what that was computed from.

    Tensors are [N, C, d] of one chunk, or [n, N, C, d] of a group's.
    """

    inputs: Tensor  # X, the layer's inputs
    outputs: Tensor | None  # X W; None at the last layer, and where a backend has no use for it
    pulled: Tensor | None  # the inner gradient at the activation's output, D being at its input; None as `outputs`
    gradients: Tensor  # D, the inner gradient at the layer's outputs
    steps: Tensor  # theta, [..., C]
    products: Tensor | None = None  # X X^T up to the diagonal, [..., C, C]; None where no step bound needs it

    def chunks(self) -> list[LayerWrites]:
        """Those of each chunk, as views."""
        fields = ([None] * self.inputs.shape[0] if x is None else x.unbind() for x in self)
        return [LayerWrites(*chunk) for chunk in zip(*fields, strict=True)]


class ChunkEnds(NamedTuple):
    """What is left at a chunk's end of its tokens' writes, and of the state it started with; of one chunk or all."""

    lasts: Tensor  # [..., 2, N, C]: the last rows of P and H, for weights and momentum
    a: Tensor  # [..., N, 1, 1], as e and p
    e: Tensor
    p: Tensor

    @classmethod
    def of(cls, gates: GroupGates) -> list[ChunkEnds]:
        """Of each chunk."""
        lasts = torch.stack([gates.write[..., -1, :], gates.momentum_last], dim=1)
        ends = (x[..., -1, None, None] for x in (gates.a, gates.e, gates.p))
        return [cls(*chunk) for chunk in zip(*(x.unbind() for x in (lasts, *ends)), strict=True)]

    def factors(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What weights and momentum have of each token's write in the end, [N, C, 1] each, of the steps [N, C]."""
        return (self.lasts * steps).unsqueeze(-1).unbind()


def add_scaled_product(out: Tensor, x: Tensor, weights: Tensor, scale: Tensor) -> None:
    """`out += scale * (x @ weights)`: [N, C, o], [N, C, i], [N, i, o], and [N, C, 1]."""
    if x.shape[-1] <= weights.shape[-1]:
        out.baddbmm_(x * scale, weights)
    else:
        out.addcmul_(x @ weights, scale)


def add_outer_product(out: Tensor, x: Tensor, gradients: Tensor, scale: Tensor, alpha: float = 1.0) -> None:
    """`out += alpha * x^T @ (scale * gradients)`: [N, i, o], [N, C, i], [N, C, o], and [N, C, 1]."""
    if x.shape[-1] <= gradients.shape[-1]:
        x = x * scale
    else:
        gradients = gradients * scale
    out.baddbmm_(x.mT, gradients, alpha=alpha)


def step_scale(theta: Tensor, eta: Tensor) -> Tensor:
    """c = theta / (1 - eta), of which the overlap in the step bound is a sum."""
    return theta / (1 - eta).clamp_min(MIN_ONE_MINUS_ETA)


def bounded_steps(theta: Tensor, scale: Tensor, products: Tensor, bound: float, out: Tensor) -> None:
    """theta limited by the chunk's overlap of features, to `out`: equal keys can't add up to an unstable step.

    README.md, section 3.

    Args:
        theta, scale, out: [..., C]; scale is `step_scale`'s.
        products: [..., C, C], X X^T up to the diagonal, of one layer's inputs at the chunk's first weights.
        bound: b, the inverse of the largest total step along one direction.
    """
    overlap = (products.abs() @ scale.unsqueeze(-1)).squeeze(-1)
    torch.div(theta, overlap.mul_(bound).clamp_min_(1.0), out=out)


class GroupTrace(NamedTuple):
    """All chunks' states and writes, one entry a layer."""

    states: list[Tensor]  # L, at each chunk's start; here 2 x [n, N, i, o], Triton's kernels have [n, N, 2 * i, o]
    writes: list[LayerWrites]  # L, of [n, N, C, ...]
    end: list[Tensor] | None  # L x [N, 2 * i, o], after the last chunk, if asked for

    def chunks(self, some: slice) -> GroupTrace:
        """Those of some chunks, as views."""
        writes = [LayerWrites(*(None if x is None else x[some] for x in layer)) for layer in self.writes]
        return GroupTrace([states[:, some] for states in self.states], writes, None)


def write_group(
    tokens: GroupTokens,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    with_end: bool,
    for_gradient: bool = False,
) -> GroupTrace:
    """Chunk after chunk: the inner gradients at its first weights, and the state after it. Outside differentiation.

    Args:
        learned: L tensors W_0 [N, i, o]; None when the memory forgets to zero.
        state: L tensors [N, 2 * i, o] at the group's start.
        with_end: also compute the state after the last chunk.
        for_gradient: also keep what the gradient takes: the writes' `outputs`, `pulled` and `products`.
    """
    num_chunks = tokens.k.shape[0]
    states = []
    for s in state:
        weights, momentum = s.chunk(2, dim=1)
        states.append(s.new_empty(2, num_chunks + with_end, *weights.shape))
        states[-1][0, 0], states[-1][1, 0] = weights, momentum
    writes = _room_for_writes(tokens, state, options, for_gradient)
    scale = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        products = own_products(tokens.k, writes[0].products)
        bounded_steps(tokens.theta, scale, products, options.step_bound, writes[0].steps)
    every_layer = [layer.chunks() for layer in writes]
    for index, end in enumerate(ChunkEnds.of(gates)):
        chunk, here = [layer[index] for layer in every_layer], [s[:, index].unbind() for s in states]
        _write_chunk(tokens.v[index], [weights for weights, _ in here], chunk, options)
        if scale is not None:
            for layer in chunk[1:]:
                products = own_products(layer.inputs, layer.products)
                bounded_steps(tokens.theta[index], scale[index], products, options.step_bound, layer.steps)
        if index + 1 < states[0].shape[1]:
            for layer, w0, now, buffer in zip(chunk, learned, here, states, strict=True):
                _advance(layer, end, w0, now, buffer[:, index + 1].unbind())
    after = [torch.cat(s[:, -1].unbind(), dim=1) for s in states] if with_end else None
    return GroupTrace([s[:, :num_chunks] for s in states], writes, after)


def _room_for_writes(
    tokens: GroupTokens, state: Sequence[Tensor], options: MemoryOptions, for_gradient: bool
) -> list[LayerWrites]:
    """Unwritten `LayerWrites` of a group; all chunks share the room of what is not kept."""
    num_chunks, num_memories, size, _ = tokens.k.shape

    def room(width: int, is_kept: bool) -> Tensor:
        shape = (num_memories, size, width)
        return tokens.k.new_empty(num_chunks if is_kept else 1, *shape).expand(num_chunks, *shape)

    layers, is_bounded = [], options.step_bound is not None
    for index, s in enumerate(state):
        hidden = [room(s.shape[2], for_gradient) for _ in range(2)] if index + 1 < len(state) else [None, None]
        inputs = room(s.shape[1] // 2, True) if index else tokens.k
        steps = torch.empty_like(tokens.theta) if is_bounded else tokens.theta
        products = room(size, for_gradient or index == 0) if is_bounded else None
        layers.append(LayerWrites(inputs, *hidden, room(s.shape[2], True), steps, products))
    return layers


def own_products(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T up to the diagonal, [..., C, C], to `out` or a new tensor."""
    return torch.matmul(x, x.mT, out=out).tril_()


def _write_chunk(v: Tensor, weights: Sequence[Tensor], chunk: Sequence[LayerWrites], options: MemoryOptions) -> None:
    """Inner forward and backward pass of one chunk: from its keys, the first layer's inputs, to all but the steps.

    Args:
        v: [N, C, D].
        weights: L tensors [N, i, o].
    """
    for below, above, weight in zip(chunk, chunk[1:], weights, strict=False):
        torch.bmm(below.inputs, weight, out=below.outputs)
        activate_into(above.inputs, below.outputs, options.activation, options.activation_scale)
    if options.objective == "l2":
        torch.baddbmm(v, chunk[-1].inputs, weights[-1], beta=-2, alpha=2, out=chunk[-1].gradients)
    else:
        torch.neg(v, out=chunk[-1].gradients)
    for index in reversed(range(len(chunk) - 1)):
        below, above = chunk[index : index + 2]
        torch.bmm(above.gradients, weights[index + 1].mT, out=below.pulled)
        activate_vjp(below.outputs, below.pulled, options.activation, options.activation_scale, out=below.gradients)


def _advance(
    writes: LayerWrites, end: ChunkEnds, learned: Tensor | None, state: Sequence[Tensor], out: Sequence[Tensor]
) -> None:
    """One layer's weights and momentum after a chunk, [N, i, o] each, written to `out`."""
    (weights, momentum), (new_weights, new_momentum) = state, out
    if learned is None:
        torch.mul(weights, end.a, out=new_weights)
    else:
        torch.lerp(learned, weights, end.a, out=new_weights)
    new_weights.addcmul_(momentum, end.p)
    torch.mul(momentum, end.e, out=new_momentum)
    for part, factor in zip(out, end.factors(writes.steps), strict=True):
        add_outer_product(part, writes.inputs, writes.gradients, factor, alpha=-1)


class LayerRead(NamedTuple):
    """A layer's read-out of a group and what its gradient needs again."""

    inputs: Tensor  # [n, N, M, i]
    scores: Tensor  # [n, N, M, C], inputs against the keys' inputs
    coefficients: Tensor  # [n, N, M, C], P theta
    outputs: Tensor | None  # [n, N, M, o]; None where the gradient does without


def read_layer(
    x: Tensor, gates: GroupGates, learned: Tensor | None, states: Tensor, writes: LayerWrites, with_outputs: bool
) -> LayerRead:
    """One layer's outputs for the last M tokens of each chunk."""
    num_chunks, _, num_queries, _ = x.shape
    scores = x @ writes.inputs.mT
    coefficients = gates.write[..., -num_queries:, :] * writes.steps.unsqueeze(-2)
    if not with_outputs:
        return LayerRead(x, scores, coefficients, None)
    out = x.new_empty(*x.shape[:3], states.shape[-1])
    flat = out.flatten(0, 1)
    flat.baddbmm_((scores * coefficients).flatten(0, 1), writes.gradients.flatten(0, 1), beta=0, alpha=-1)
    a, p = (gate[..., -num_queries:, None] for gate in (gates.a, gates.p))
    for state, gate in zip(states, (a, p), strict=True):
        add_scaled_product(flat, x.flatten(0, 1), state.flatten(0, 1), gate.flatten(0, 1))
    if learned is not None:
        rest = 1 - a
        for index in range(num_chunks):
            add_scaled_product(out[index], x[index], learned, rest[index])
    return LayerRead(x, scores, coefficients, out)


def read_group(
    q: Tensor,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    trace: GroupTrace,
    options: MemoryOptions,
    for_gradient: bool = False,
) -> list[LayerRead]:
    """Read-out of all chunks of a group at once, layer by layer; the last one's outputs are y [n, N, M, D].

    Args:
        for_gradient: the last layer's outputs, which the gradient does without, are not computed.
    """
    reads: list[LayerRead] = []
    x, last = q, len(trace.states) - 1
    for index, (w0, states, writes) in enumerate(zip(learned, trace.states, trace.writes, strict=True)):
        if reads:
            x = torch.empty_like(reads[-1].outputs)
            activate_into(x, reads[-1].outputs, options.activation, options.activation_scale)
        reads.append(read_layer(x, gates, w0, states, writes, index < last or not for_gradient))
    return reads


def inner_gradient_norm(writes: Sequence[LayerWrites]) -> Tensor:
    """Norm of u_t over all layers, [n, N, C]: each layer's gradient is the outer product of its input and its D."""
    pairs = [(state_dtype(layer.inputs), state_dtype(layer.gradients)) for layer in writes]
    squares = [inputs.square().sum(-1) * gradients.square().sum(-1) for inputs, gradients in pairs]
    return torch.stack(squares).sum(0).sqrt()
