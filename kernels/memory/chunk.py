"""The exact dual form over a group of consecutive chunks (README.md, section 2).

Inside a chunk every token's gradient is taken at the chunk's first weights, so the weights after token t are the first
ones plus a sum of outer products; reads, writes and the chunk's end are then a few matrix products, and no token has
weights of its own. Tensors of a group are [n, N, C, ...]: n chunks of C tokens for N = batch * heads memories. The
state of a layer is one tensor [N, 2 * d_in, d_out], weights above momentum. While a group is computed it is "turned",
[N, 2, narrow, wide]: a layer with d_in > d_out has both transposed. So weights and momentum lie side by side along the
narrower width, where gates are applied, and one product serves both.
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

    @property
    def narrows(self) -> bool:
        """Whether the layer's weights are transposed in a group: d_in > d_out."""
        return self.inputs.shape[-1] > self.gradients.shape[-1]

    def sides(self) -> tuple[Tensor, Tensor]:
        """Inputs and inner gradients, the narrower first: the write to the turned weights is `narrow^T wide`."""
        return (self.gradients, self.inputs) if self.narrows else (self.inputs, self.gradients)

    def weights(self, turned: Tensor) -> Tensor:
        """[..., i, o] of one part of a turned state, as a view."""
        return turned.mT if self.narrows else turned

    def chunks(self) -> list[LayerWrites]:
        """Those of each chunk, as views."""
        fields = ([None] * self.inputs.shape[0] if x is None else x.unbind() for x in self)
        return [LayerWrites(*chunk) for chunk in zip(*fields, strict=True)]


class ChunkEnds(NamedTuple):
    """What is left at a chunk's end of its tokens' writes, and of the state it started with; of one chunk or all."""

    lasts: Tensor  # [..., N, C, 2]: the last rows of P and H, for weights and momentum
    a: Tensor  # [..., N, 1, 1], as e, p and rest, 1 - a
    e: Tensor
    p: Tensor
    rest: Tensor

    @classmethod
    def of(cls, gates: GroupGates) -> list[ChunkEnds]:
        """Of each chunk."""
        lasts = torch.stack([gates.write[..., -1, :], gates.momentum_last], dim=-1)
        ends = [x[..., -1, None, None] for x in (gates.a, gates.e, gates.p)]
        return [cls(*chunk) for chunk in zip(*(x.unbind() for x in (lasts, *ends, 1 - ends[0])), strict=True)]

    def factors(self, steps: Tensor) -> Tensor:
        """What weights and momentum have of each token's write in the end, [N, C, 2], of the steps [N, C]."""
        return self.lasts * steps.unsqueeze(-1)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Each of `factors` [N, C, f] times x [N, C, d], side by side: [N, C, f * d]."""
    return (x.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def turned(x: Tensor, parts: int) -> Tensor:
    """`parts` matrices above each other, [N, parts * i, o], as [N, parts, narrow, wide], a view."""
    x = x.unflatten(1, (parts, -1))
    return x.mT if x.shape[-2] > x.shape[-1] else x


def turned_back(x: Tensor, narrows: bool) -> Tensor:
    """[N, parts, narrow, wide] as [N, parts * i, o]; in memory of its own where it is transposed."""
    return (x.mT if narrows else x).flatten(1, 2)


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

    states: list[Tensor]  # L, at each chunk's start: [n, N, 2, narrow, wide]; of Triton's kernels [n, N, 2 * i, o]
    writes: list[LayerWrites]  # L, of [n, N, C, ...]
    end: list[Tensor] | None  # L x [N, 2 * i, o], after the last chunk, if asked for
    learned: Sequence[Tensor | None] = ()  # W_0, turned, where states are; None when the memory forgets to zero


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
    learned = [None if w0 is None else turned(w0, 1).squeeze(1).contiguous() for w0 in learned]
    num_chunks, states = tokens.k.shape[0], []
    for start in (turned(s, 2) for s in state):
        states.append(start.new_empty(num_chunks + with_end, *start.shape))
        states[-1][0] = start
    writes = _room_for_writes(tokens, state, options, for_gradient)
    scale = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        products = own_products(tokens.k, writes[0].products)
        bounded_steps(tokens.theta, scale, products, options.step_bound, writes[0].steps)
    every_layer = [layer.chunks() for layer in writes]
    for index, end in enumerate(ChunkEnds.of(gates)):
        chunk = [layer[index] for layer in every_layer]
        weights = [layer.weights(s[index, :, 0]) for layer, s in zip(chunk, states, strict=True)]
        _write_chunk(tokens.v[index], weights, chunk, options)
        if scale is not None:
            for layer in chunk[1:]:
                products = own_products(layer.inputs, layer.products)
                bounded_steps(tokens.theta[index], scale[index], products, options.step_bound, layer.steps)
        if index + 1 < len(states[0]):
            for layer, w0, s in zip(chunk, learned, states, strict=True):
                _advance(layer, end, w0, s[index], s[index + 1])
    after = None
    if with_end:
        # In memory of its own: a view would keep all the group's states alive for as long as it is.
        after = [turned_back(s[-1].clone(), layer.narrows) for s, layer in zip(states, writes, strict=True)]
    return GroupTrace([s[:num_chunks] for s in states], writes, after, learned)


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
    if x.dim() == 3:
        return torch.bmm(x, x.mT, out=out).tril_()
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


def _advance(writes: LayerWrites, end: ChunkEnds, learned: Tensor | None, state: Tensor, out: Tensor) -> None:
    """One layer's turned weights and momentum after a chunk, [N, 2, ...], written to `out`; W_0 is turned as well."""
    (weights, momentum), (new_weights, new_momentum) = state.unbind(1), out.unbind(1)
    if learned is None:
        torch.mul(weights, end.a, out=new_weights)
    else:
        torch.lerp(learned, weights, end.a, out=new_weights)
    new_weights.addcmul_(momentum, end.p)
    torch.mul(momentum, end.e, out=new_momentum)
    narrow, wide = writes.sides()
    out.flatten(1, 2).baddbmm_(scaled(narrow, end.factors(writes.steps)).mT, wide, alpha=-1)


class ReadGates(NamedTuple):
    """What the last M tokens of each chunk have of W, S and W_0, [n * N, M, 1] each."""

    a: Tensor
    p: Tensor
    rest: Tensor  # 1 - a

    @classmethod
    def of(cls, gates: GroupGates, num_queries: int) -> ReadGates:
        """For the gates of a group."""
        a, p = (x[..., -num_queries:].flatten(0, 1).unsqueeze(-1) for x in (gates.a, gates.p))
        return cls(a, p, 1 - a)

    def of_state(self) -> Tensor:
        """Those of W and S, [n * N, M, 2]."""
        return torch.cat((self.a, self.p), dim=-1)


class LayerRead(NamedTuple):
    """A layer's read-out of a group and what its gradient needs again."""

    inputs: Tensor  # [n * N, M, i]
    scores: Tensor  # [n * N, M, C], inputs against the keys' inputs
    coefficients: Tensor  # [n * N, M, C], P theta
    outputs: Tensor | None  # [n * N, M, o]; None where the gradient does without


def by_learned(x: Tensor, weights: Tensor, out: Tensor, beta: float = 1.0) -> Tensor:
    """`out = beta * out + x @ weights` for all chunks: [n * N, M, i], [N, i, o], and [n * N, M, o] of one piece."""
    for x_chunk, out_chunk in zip(x.split(len(weights)), out.split(len(weights)), strict=True):
        out_chunk.baddbmm_(x_chunk, weights, beta=beta)
    return out


def read_layer(
    x: Tensor, gates: GroupGates, learned: Tensor | None, states: Tensor, writes: LayerWrites, with_outputs: bool
) -> LayerRead:
    """One layer's outputs for the last M tokens of each chunk; W_0 and the states are turned."""
    inputs, gradients = writes.inputs.flatten(0, 1), writes.gradients.flatten(0, 1)
    scores = torch.bmm(x, inputs.mT)
    coefficients = (gates.write[..., -x.shape[1] :, :] * writes.steps.unsqueeze(-2)).flatten(0, 1)
    if not with_outputs:
        return LayerRead(x, scores, coefficients, None)
    of_reads, both = ReadGates.of(gates, x.shape[1]), states.flatten(0, 1).flatten(1, 2)
    out = x.new_empty(*x.shape[:2], gradients.shape[2])
    out.baddbmm_(scores * coefficients, gradients, beta=0, alpha=-1)
    if writes.narrows:
        for part, gate in zip(torch.bmm(x, both.mT).chunk(2, dim=-1), of_reads[:2], strict=True):
            out.addcmul_(part, gate)
        if learned is not None:
            out.addcmul_(by_learned(x, learned.mT, torch.empty_like(out), beta=0), of_reads.rest)
    else:
        out.baddbmm_(scaled(x, of_reads.of_state()), both)
        if learned is not None:
            by_learned(x * of_reads.rest, learned, out)
    return LayerRead(x, scores, coefficients, out)


def read_group(
    q: Tensor,
    gates: GroupGates,
    trace: GroupTrace,
    options: MemoryOptions,
    for_gradient: bool = False,
) -> list[LayerRead]:
    """Read-out of all chunks of a group at once, layer by layer; the last one's outputs are y [n * N, M, D].

    Args:
        for_gradient: the last layer's outputs, which the gradient does without, are not computed.
    """
    reads: list[LayerRead] = []
    x, last = q.flatten(0, 1), len(trace.states) - 1
    for index, (w0, states, writes) in enumerate(zip(trace.learned, trace.states, trace.writes, strict=True)):
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
