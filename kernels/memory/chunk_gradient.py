"""The gradient of a group of chunks in closed form: what autograd would do to chunk.py, in fewer and larger products.

README.md, section 4, has the formulas. All reads of a group are differentiated at once; only what a chunk's state
passes on to the chunk before it is done chunk by chunk. Layouts and names are those of chunk.py, and
`d_x` is the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.activations import activate_vjp, activate_vjp_gradients
from kernels.memory.chunk import (
    ChunkEnds,
    GroupTokens,
    GroupTrace,
    LayerRead,
    LayerWrites,
    add_outer_product,
    read_group,
    step_scale,
    write_group,
)
from kernels.memory.gates import GatesForGradient, GroupGates
from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions


class LayerGradients(NamedTuple):
    """Gradients that one layer of a group has received so far, added to in place, and what its reads left to do.

    Lists have an entry for each chunk.
    """

    reads: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """Inputs x [N, M, i], dZ [N, M, o], a and p [N, M, 1]; the state's gradients are x^T (a dZ) and x^T (p dZ)."""
    inputs: list[Tensor]  # [N, C, i], of X
    gradients: list[Tensor]  # [N, C, o], of D
    steps: list[Tensor]  # [N, C], of theta
    learned: Tensor | None  # [N, i, o], of W_0; None when the memory forgets to zero


class GroupGradients(NamedTuple):
    """Gradients of a group's tokens, of W_0 and of the state at the group's start."""

    tokens: GroupTokens
    learned: list[Tensor | None]  # L x [N, i, o]; None when the memory forgets to zero
    state: list[Tensor]  # L x [N, 2 * i, o]


class EndGradients(NamedTuple):
    """What the chunks' ends give to gates and steps, of one layer."""

    overlaps: Tensor  # [n, 2, N, C]: x^T (gradient of W or S after the chunk) D of each token
    state: Tensor  # [n, N, 2, 2]: gradient of W and S after the chunk, times W and S before it
    learned: Tensor | None  # [n, N, 1, 1]: gradient of W after the chunk, times W_0

    @classmethod
    def empty(cls, steps: Tensor, has_learned: bool) -> EndGradients:
        """Unwritten, for steps [n, N, C]."""
        num_chunks, num_memories, size = steps.shape
        room = steps.new_empty
        learned = room(num_chunks, num_memories, 1, 1) if has_learned else None
        return cls(room(num_chunks, 2, num_memories, size), room(num_chunks, num_memories, 2, 2), learned)

    def add_to(self, d_gates: GroupGates, steps: Tensor) -> None:
        """Adds the gates' gradients; of the layer's steps [n, N, C]."""
        by_weights, by_momentum = self.overlaps.unbind(1)
        d_gates.write[..., -1, :].addcmul_(by_weights, steps, value=-1)
        d_gates.momentum_last.addcmul_(by_momentum, steps, value=-1)
        d_gates.a[..., -1] += self.state[..., 0, 0]
        d_gates.p[..., -1] += self.state[..., 0, 1]
        d_gates.e[..., -1] += self.state[..., 1, 1]
        if self.learned is not None:
            d_gates.a[..., -1] -= self.learned[..., 0, 0]


def group_gradients(
    tokens: GroupTokens,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    d_y: Tensor,
    d_end: Sequence[Tensor] | None,
) -> GroupGradients:
    """Recomputes a group and goes back through it.

    Args:
        tokens, learned, state: as `chunk.write_group` takes them.
        d_y: [n, N, M, D], gradient of the read-out.
        d_end: L tensors [N, 2 * i, o], gradient of the state after the group; None when nothing follows from it, as
            with a chunk that is open.
    """
    products = GatesForGradient.of(tokens.alpha, tokens.eta)
    gates, d_gates = products.gates, GroupGates(*(torch.zeros_like(x) for x in products.gates))
    trace = write_group(tokens, gates, learned, state, options, with_end=False, for_gradient=True)
    layers = [LayerGradients([], [], [], [], None if w0 is None else torch.zeros_like(w0)) for w0 in learned]
    d_q = torch.empty_like(tokens.q)
    # One by one on a CPU: that keeps to its caches and takes less memory. A GPU is the faster the more it has to do.
    at_once = 1 if d_y.device.type == "cpu" else len(d_y)
    for start in range(0, len(d_y), at_once):
        some = slice(start, start + at_once)
        these, d_these = (GroupGates(*(x[some] for x in of_all)) for of_all in (gates, d_gates))
        d_q[some] = _read_gradients(
            tokens.q[some], these, learned, trace.chunks(some), options, d_y[some], d_these, layers
        )
    bounds = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        bounds = [BoundGradient.of(writes.products, tokens.theta, scale, options.step_bound) for writes in trace.writes]
    d_states = _back_through_chunks(layers, trace, gates, learned, options, d_end, bounds, d_gates)
    del trace  # most of what is alive
    d_k, d_steps = torch.stack(layers[0].inputs), [torch.stack(layer.steps) for layer in layers]
    if bounds is not None:
        d_k.flatten(0, 1).baddbmm_(bounds[0].of_products(d_steps[0]).flatten(0, 1), tokens.k.flatten(0, 1))
    d_theta, d_eta_of_steps = step_gradients(tokens, d_steps, bounds)
    d_alpha, d_eta = products.gradients(d_gates)
    d_v = torch.stack(layers[-1].gradients).mul_(-2 if options.objective == "l2" else -1)
    d_tokens = GroupTokens(d_q, d_k, d_v, d_alpha, d_eta + d_eta_of_steps, d_theta)
    return GroupGradients(d_tokens, [layer.learned for layer in layers], [torch.cat((*d,), dim=1) for d in d_states])


def _read_gradients(
    q: Tensor,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    trace: GroupTrace,
    options: MemoryOptions,
    d_y: Tensor,
    d_gates: GroupGates,
    layers: Sequence[LayerGradients],
) -> Tensor:
    """Gradient of q, of some chunks; adds to `d_gates`, and to `layers` what the reads take from each."""
    reads = read_group(q, gates, learned, trace, options, for_gradient=True)
    d_outputs = d_y
    for index in reversed(range(len(reads))):
        states, writes = trace.states[index], trace.writes[index]
        d_inputs = _read_layer_gradients(
            reads.pop(), gates, learned[index], states, writes, d_outputs, d_gates, layers[index]
        )
        if index:
            z = reads[index - 1].outputs
            d_outputs = activate_vjp(z, d_inputs, options.activation, options.activation_scale, out=d_inputs)
    return d_inputs


def _read_layer_gradients(
    read: LayerRead,
    gates: GroupGates,
    learned: Tensor | None,
    states: Tensor,
    writes: LayerWrites,
    d_outputs: Tensor,
    d_gates: GroupGates,
    layer: LayerGradients,
) -> Tensor:
    """Gradient of one layer's queries, [n, N, M, i]; adds to `d_gates`, and to `layer` what they read."""
    x, num_queries = read.inputs, read.inputs.shape[-2]
    a, p = (gate[..., -num_queries:, None] for gate in (gates.a, gates.p))
    weights, momentum = states
    through = d_outputs @ momentum.mT
    d_gates.p[..., -num_queries:] += (x * through).sum(-1)
    d_inputs = through.mul_(p)
    through = d_outputs @ weights.mT
    if learned is not None:
        rest, through_learned = 1 - a, torch.empty_like(through)
        for index in range(x.shape[0]):
            torch.bmm(d_outputs[index], learned.mT, out=through_learned[index])
            add_outer_product(layer.learned, x[index], d_outputs[index], rest[index])
        d_inputs += through_learned
        through -= through_learned
    d_gates.a[..., -num_queries:] += (x * through).sum(-1)
    d_inputs.addcmul_(through, a)
    d_product = (d_outputs @ writes.gradients.mT).neg_()
    d_scores = d_product * read.coefficients
    d_coefficients = d_product.mul_(read.scores)
    d_inputs.flatten(0, 1).baddbmm_(d_scores.flatten(0, 1), writes.inputs.flatten(0, 1))
    d_gates.write[..., -num_queries:, :].addcmul_(d_coefficients, writes.steps.unsqueeze(-2))
    layer.reads.extend(zip(*(field.unbind() for field in (x, d_outputs, a, p)), strict=True))
    layer.inputs.extend((d_scores.mT @ x).unbind())
    layer.gradients.extend(((read.scores * read.coefficients).mT @ d_outputs).neg_().unbind())
    layer.steps.extend(d_coefficients.mul_(gates.write[..., -num_queries:, :]).sum(-2).unbind())
    return d_inputs


def _back_through_chunks(
    layers: Sequence[LayerGradients],
    trace: GroupTrace,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    options: MemoryOptions,
    d_end: Sequence[Tensor] | None,
    bounds: Sequence[BoundGradient] | None,
    d_gates: GroupGates,
) -> list[Tensor]:
    """From the last chunk to the first; adds to `layers` and `d_gates`.

    Returns:
        L tensors [2, N, i, o], gradients of weights and momentum at the group's start.
    """
    ends, every_layer = ChunkEnds.of(gates), [layer.chunks() for layer in trace.writes]
    found = [EndGradients.empty(writes.steps, w0 is not None) for writes, w0 in zip(trace.writes, learned, strict=True)]
    if d_end is None:
        carried = [torch.zeros_like(s[:, 0]) for s in trace.states]
    else:
        carried = [torch.stack(d.chunk(2, dim=1)) for d in d_end]
    for index in reversed(range(len(ends))):
        chunk = [layer[index] for layer in every_layer]
        for level, (layer, writes, d_state) in enumerate(zip(layers, chunk, carried, strict=True)):
            if d_end is None and index + 1 == len(ends):
                for field in found[level]:
                    if field is not None:
                        field[index] = 0
            else:
                state = trace.states[level][:, index]
                _end_gradients(index, layer, writes, ends[index], learned[level], state, d_state, found[level])
            x, d_outputs, *scales = layer.reads.pop()
            for part, scale in zip(d_state, scales, strict=True):
                add_outer_product(part, x, d_outputs, scale)
            if bounds is not None and level:
                layer.inputs[index].baddbmm_(bounds[level].of_products(layer.steps[index], index), writes.inputs)
        weights = [states[0, index] for states in trace.states]
        _inner_gradients(index, layers, chunk, weights, options, [d_weights for d_weights, _ in carried])
    for ends_found, writes in zip(found, trace.writes, strict=True):
        ends_found.add_to(d_gates, writes.steps)
    return carried


def _end_gradients(
    index: int,
    layer: LayerGradients,
    writes: LayerWrites,
    end: ChunkEnds,
    learned: Tensor | None,
    state: Tensor,
    d_state: Tensor,
    found: EndGradients,
) -> None:
    """Back through one layer's state at the end of chunk `index` (`chunk._advance`).

    `d_state` [2, N, i, o] goes from the state after the chunk to the one before it; adds to `layer`, writes to `found`.
    """
    x, d = writes.inputs, writes.gradients
    d_x, d_d, d_steps = layer.inputs[index], layer.gradients[index], layer.steps[index]
    is_narrow = x.shape[-1] <= d.shape[-1]
    for part, factor, last, overlap in zip(
        d_state, end.factors(writes.steps), end.lasts, found.overlaps[index], strict=True
    ):
        if is_narrow:
            through = torch.bmm(d, part.mT)
            torch.sum(x * through, -1, out=overlap)
            d_x.addcmul_(through, factor, value=-1)
            d_d.baddbmm_(x * factor, part, alpha=-1)
        else:
            through = torch.bmm(x, part)
            torch.sum(d * through, -1, out=overlap)
            d_d.addcmul_(through, factor, value=-1)
            d_x.baddbmm_(d * factor, part.mT, alpha=-1)
        d_steps.addcmul_(overlap, last, value=-1)
    (d_weights, d_momentum), flat = d_state, d_state.flatten(2).transpose(0, 1)
    torch.bmm(flat, state.flatten(2).transpose(0, 1).mT, out=found.state[index])
    if learned is not None:
        torch.bmm(flat[:, :1], learned.flatten(1).unsqueeze(-1), out=found.learned[index])
        layer.learned.addcmul_(d_weights, 1 - end.a)
    d_momentum.mul_(end.e).addcmul_(d_weights, end.p)
    d_weights.mul_(end.a)


def _inner_gradients(
    index: int,
    layers: Sequence[LayerGradients],
    chunk: Sequence[LayerWrites],
    weights: Sequence[Tensor],
    options: MemoryOptions,
    d_weights: Sequence[Tensor],
) -> None:
    """Back through the inner gradients of chunk `index` (`chunk._write_chunk`), after all that used X and D.

    Adds to `layers` and to `d_weights`, L x [N, i, o].
    """
    # Up the layers: D_l = act'(Z_l) * (D_{l+1} W_{l+1}^T).
    d_outputs: list[Tensor] = []
    for level, (below, above) in enumerate(zip(layers, layers[1:], strict=False)):
        d_z, d_pulled = activate_vjp_gradients(
            chunk[level].outputs,
            chunk[level].pulled,
            below.gradients[index],
            options.activation,
            options.activation_scale,
        )
        above.gradients[index].baddbmm_(d_pulled, weights[level + 1])
        d_weights[level + 1].baddbmm_(d_pulled.mT, chunk[level + 1].gradients)
        d_outputs.append(d_z)
    # The last layer's D = 2 (X W - v), or -v.
    d_outputs.append(layers[-1].gradients[index])
    factor = 2 if options.objective == "l2" else 0
    # Down the layers: X_{l+1} = act(X_l W_l).
    for level in reversed(range(len(layers))):
        d_x = layers[level].inputs[index]
        if factor:
            d_x.baddbmm_(d_outputs[level], weights[level].mT, alpha=factor)
            d_weights[level].baddbmm_(chunk[level].inputs.mT, d_outputs[level], alpha=factor)
        if level:
            d_outputs[level - 1] += activate_vjp(
                chunk[level - 1].outputs, d_x, options.activation, options.activation_scale
            )
        factor = 1


class BoundGradient(NamedTuple):
    """The step bound of one layer, differentiated: theta_t / max(1, b * sum_{j <= t} c_j |x_j . x_t|)."""

    signed: Tensor  # [n, N, C, C]: c_j times the sign of x_j . x_t, for j <= t
    overlaps: Tensor  # [n, N, C, C]: |x_j . x_t|, for j <= t
    inverse: Tensor  # [n, N, C]: 1 / max(1, ...)
    slope: Tensor  # [n, N, C]: derivative of the bounded step in the sum

    @classmethod
    def of(cls, products: Tensor, theta: Tensor, scale: Tensor, bound: float) -> BoundGradient:
        """For X X^T up to the diagonal [n, N, C, C], which is used up, theta and c = theta / (1 - eta) [n, N, C]."""
        overlaps = products.abs()
        divisor = bound * (overlaps @ scale.unsqueeze(-1)).squeeze(-1)
        inverse = 1 / divisor.clamp_min(1.0)
        slope = torch.where(divisor >= 1, -bound * theta * inverse * inverse, 0)
        return cls(products.sign_().mul_(scale.unsqueeze(-2)), overlaps, inverse, slope)

    def of_products(self, d_steps: Tensor, index: int | slice = slice(None)) -> Tensor:
        """Gradient of a layer's inputs @ inputs^T, [..., C, C], from that of its steps; of one chunk, or of all."""
        d_products = (d_steps * self.slope[index]).unsqueeze(-1) * self.signed[index]
        return d_products + d_products.mT


def step_gradients(
    tokens: GroupTokens, d_steps: Sequence[Tensor], bounds: Sequence[BoundGradient] | None
) -> tuple[Tensor, Tensor]:
    """Gradients of theta, and of eta through the step bound, [n, N, C], from those of each layer's steps."""
    if bounds is None:
        return torch.stack(list(d_steps)).sum(0), torch.zeros_like(tokens.eta)
    d_theta, d_scale = torch.zeros_like(tokens.theta), torch.zeros_like(tokens.theta)
    for d_bounded, bound in zip(d_steps, bounds, strict=True):
        d_theta.addcmul_(d_bounded, bound.inverse)
        d_scale += (bound.overlaps.mT @ (d_bounded * bound.slope).unsqueeze(-1)).squeeze(-1)
    rest = (1 - tokens.eta).clamp_min(MIN_ONE_MINUS_ETA)
    d_theta.addcdiv_(d_scale, rest)
    d_eta = torch.where(1 - tokens.eta >= MIN_ONE_MINUS_ETA, d_scale * tokens.theta / rest.square(), 0)
    return d_theta, d_eta
