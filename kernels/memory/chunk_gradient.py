"""The gradient of a group of chunks in closed form: what autograd would do to chunk.py, in fewer and larger products.

README.md, section 4, has the formulas. All reads of a group are differentiated at once; only what a chunk's state
passes on to the chunk before it is done chunk by chunk. Layouts and names are those of chunk.py, states and W_0 are
turned, and `d_x` is the gradient of x.
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
    ReadGates,
    by_learned,
    read_group,
    scaled,
    step_scale,
    turned,
    turned_back,
    write_group,
)
from kernels.memory.gates import GatesForGradient, GroupGates
from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions


class LayerGradients(NamedTuple):
    """Gradients that one layer of a group has received so far, added to in place, and what its reads left to do."""

    narrow: Tensor  # [n, N, M, 2 * narrow]; the gradient of the state by the reads is narrow^T wide
    wide: Tensor  # [n, N, M, wide]
    inputs: Tensor  # [n, N, C, i], of X
    gradients: Tensor  # [n, N, C, o], of D
    steps: Tensor  # [n, N, C], of theta
    learned: Tensor | None  # of W_0, [N, narrow, wide]; None when the memory forgets to zero


class GroupGradients(NamedTuple):
    """Gradients of a group's tokens, of W_0 and of the state at the group's start."""

    tokens: GroupTokens
    learned: list[Tensor | None]  # L x [N, i, o]; None when the memory forgets to zero
    state: list[Tensor]  # L x [N, 2 * i, o]


class EndGradients(NamedTuple):
    """What the chunks' ends give to gates and steps, of one layer."""

    overlaps: Tensor  # [n, N, C, 2]: x^T (gradient of W or S after the chunk) D of each token
    state: Tensor  # [n, N, 2, 2]: gradient of W and S after the chunk, times W and S before it
    learned: Tensor | None  # [n, N, 1, 1]: gradient of W after the chunk, times W_0

    @classmethod
    def empty(cls, steps: Tensor, has_learned: bool) -> EndGradients:
        """Unwritten, for steps [n, N, C]."""
        chunks, room = steps.shape[:2], steps.new_empty
        return cls(room(*steps.shape, 2), room(*chunks, 2, 2), room(*chunks, 1, 1) if has_learned else None)

    def add_to(self, d_gates: GroupGates, steps: Tensor) -> None:
        """Adds the gates' gradients; of the layer's steps [n, N, C]."""
        by_weights, by_momentum = self.overlaps.unbind(-1)
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
    d_q, layers = _read_gradients(tokens.q, gates, trace, options, d_y, d_gates)
    bounds = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        bounds = [BoundGradient.of(writes.products, tokens.theta, scale, options.step_bound) for writes in trace.writes]
    d_states = _back_through_chunks(layers, trace, gates, options, d_end, bounds, d_gates)
    narrows = [writes.narrows for writes in trace.writes]
    del trace  # most of what is alive
    d_k, d_steps = layers[0].inputs, [layer.steps for layer in layers]
    if bounds is not None:
        d_k.flatten(0, 1).baddbmm_(bounds[0].of_products(d_steps[0]).flatten(0, 1), tokens.k.flatten(0, 1))
    d_theta, d_eta_of_steps = step_gradients(tokens, d_steps, bounds)
    d_alpha, d_eta = products.gradients(d_gates)
    d_v = layers[-1].gradients.mul_(-2 if options.objective == "l2" else -1)
    d_tokens = GroupTokens(d_q, d_k, d_v, d_alpha, d_eta + d_eta_of_steps, d_theta)
    d_learned = [
        None if layer.learned is None else turned_back(layer.learned.unsqueeze(1), is_turned)
        for layer, is_turned in zip(layers, narrows, strict=True)
    ]
    return GroupGradients(d_tokens, d_learned, [turned_back(*pair) for pair in zip(d_states, narrows, strict=True)])


def _read_gradients(
    q: Tensor,
    gates: GroupGates,
    trace: GroupTrace,
    options: MemoryOptions,
    d_y: Tensor,
    d_gates: GroupGates,
) -> tuple[Tensor, list[LayerGradients]]:
    """Gradient of q, and what the reads give to each layer; adds to `d_gates`."""
    reads = read_group(q, gates, trace, options, for_gradient=True)
    d_outputs, layers = d_y.flatten(0, 1), []
    for index in reversed(range(len(reads))):
        states, writes = trace.states[index], trace.writes[index]
        d_inputs, layer = _read_layer_gradients(
            reads.pop(), gates, trace.learned[index], states, writes, d_outputs, d_gates
        )
        layers.insert(0, layer)
        if index:
            z = reads[index - 1].outputs
            d_outputs = activate_vjp(z, d_inputs, options.activation, options.activation_scale, out=d_inputs)
    return d_inputs.view_as(q), layers


def _read_layer_gradients(
    read: LayerRead,
    gates: GroupGates,
    learned: Tensor | None,
    states: Tensor,
    writes: LayerWrites,
    d_outputs: Tensor,
    d_gates: GroupGates,
) -> tuple[Tensor, LayerGradients]:
    """Gradient of one layer's queries, [n * N, M, i], and what they give to the layer; adds to `d_gates`."""
    x, num_queries, chunks = read.inputs, read.inputs.shape[1], writes.inputs.shape[:2]
    of_reads = ReadGates.of(gates, num_queries)
    d_inputs = _through_states(x, d_outputs, states, learned, writes, of_reads, d_gates)
    narrow, wide = (d_outputs, x) if writes.narrows else (x, d_outputs)
    d_learned = None
    if learned is not None:
        d_learned = torch.zeros_like(learned)
        rest = narrow * of_reads.rest
        for narrow_chunk, wide_chunk in zip(rest.split(chunks[1]), wide.split(chunks[1]), strict=True):
            d_learned.baddbmm_(narrow_chunk.mT, wide_chunk)
    inputs, gradients = writes.inputs.flatten(0, 1), writes.gradients.flatten(0, 1)
    d_product = torch.empty_like(read.scores).baddbmm_(d_outputs, gradients.mT, beta=0, alpha=-1)
    d_scores = d_product * read.coefficients
    d_coefficients = d_product.mul_(read.scores).unflatten(0, chunks)
    d_inputs.baddbmm_(d_scores, inputs)
    d_gates.write[..., -num_queries:, :].addcmul_(d_coefficients, writes.steps.unsqueeze(-2))
    d_steps = (d_coefficients * gates.write[..., -num_queries:, :]).sum(-2)
    d_gradients = torch.empty_like(gradients)
    d_gradients.baddbmm_((read.scores * read.coefficients).mT, d_outputs, beta=0, alpha=-1)
    of_layer = (scaled(narrow, of_reads.of_state()), wide, torch.bmm(d_scores.mT, x), d_gradients)
    return d_inputs, LayerGradients(*(y.unflatten(0, chunks) for y in of_layer), d_steps, d_learned)


def _through_states(
    x: Tensor,
    d_outputs: Tensor,
    states: Tensor,
    learned: Tensor | None,
    writes: LayerWrites,
    of_reads: ReadGates,
    d_gates: GroupGates,
) -> Tensor:
    """Gradient of one layer's queries [n * N, M, i] through states and W_0; adds the gates' gradients to `d_gates`."""
    num_queries, chunks = x.shape[1], states.shape[:2]
    d_a, d_p = (d[..., -num_queries:] for d in (d_gates.a, d_gates.p))
    through_learned = None
    if learned is not None:
        through_learned = by_learned(d_outputs, writes.weights(learned).mT, torch.empty_like(x), beta=0)
    both = states.flatten(0, 1)
    if writes.narrows:
        by_weights, by_momentum = (torch.bmm(d_outputs, both[:, part]) for part in (0, 1))
    else:
        by_weights, by_momentum = torch.bmm(d_outputs, both.flatten(1, 2).mT).chunk(2, dim=-1)
    d_p += (x * by_momentum).sum(-1).unflatten(0, chunks)
    d_inputs = by_momentum * of_reads.p
    if through_learned is not None:
        d_inputs += through_learned
        by_weights -= through_learned
    d_a += (x * by_weights).sum(-1).unflatten(0, chunks)
    return d_inputs.addcmul_(by_weights, of_reads.a)


def _back_through_chunks(
    layers: Sequence[LayerGradients],
    trace: GroupTrace,
    gates: GroupGates,
    options: MemoryOptions,
    d_end: Sequence[Tensor] | None,
    bounds: Sequence[BoundGradient] | None,
    d_gates: GroupGates,
) -> list[Tensor]:
    """From the last chunk to the first; adds to `layers` and `d_gates`.

    Returns:
        L tensors [N, 2, narrow, wide], gradients of weights and momentum at the group's start.
    """
    learned, ends, every_layer = trace.learned, ChunkEnds.of(gates), [layer.chunks() for layer in trace.writes]
    found = [EndGradients.empty(writes.steps, w0 is not None) for writes, w0 in zip(trace.writes, learned, strict=True)]
    if d_end is None:
        carried = [torch.zeros_like(s[0]) for s in trace.states]
    else:
        # In memory of their own, since they are added to.
        carried = [turned(d, 2).clone(memory_format=torch.contiguous_format) for d in d_end]
    for index in reversed(range(len(ends))):
        chunk = [layer[index] for layer in every_layer]
        for level, (layer, writes, d_state) in enumerate(zip(layers, chunk, carried, strict=True)):
            if d_end is None and index + 1 == len(ends):
                for field in found[level]:
                    if field is not None:
                        field[index] = 0
            else:
                state = trace.states[level][index]
                _end_gradients(index, layer, writes, ends[index], learned[level], state, d_state, found[level])
            d_state.flatten(1, 2).baddbmm_(layer.narrow[index].mT, layer.wide[index])
            if bounds is not None and level:
                layer.inputs[index].baddbmm_(bounds[level].of_products(layer.steps[index], index), writes.inputs)
        weights = [writes.weights(s[index, :, 0]) for writes, s in zip(chunk, trace.states, strict=True)]
        _inner_gradients(index, layers, chunk, weights, options, [d_state[:, 0] for d_state in carried])
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

    `d_state` [N, 2, narrow, wide] goes from the state after the chunk to the one before it; adds to `layer`, writes to
    `found`.
    """
    (narrow, wide), factors, overlap = writes.sides(), end.factors(writes.steps), found.overlaps[index]
    d_narrow, d_wide = layer.inputs[index], layer.gradients[index]
    if writes.narrows:
        d_narrow, d_wide = d_wide, d_narrow
    both = d_state.flatten(1, 2)
    through = torch.bmm(wide, both.mT).unflatten(-1, (2, -1))
    torch.sum(narrow.unsqueeze(-2) * through, -1, out=overlap)
    d_wide.baddbmm_(scaled(narrow, factors), both, alpha=-1)
    for part in range(2):
        d_narrow.addcmul_(through[..., part, :], factors[..., part, None], value=-1)
        layer.steps[index].addcmul_(overlap[..., part], end.lasts[..., part], value=-1)
    (d_weights, d_momentum), flat = d_state.unbind(1), d_state.flatten(2)
    torch.bmm(flat, state.flatten(2).mT, out=found.state[index])
    if learned is not None:
        torch.bmm(flat[:, :1], learned.flatten(1).unsqueeze(-1), out=found.learned[index])
        layer.learned.addcmul_(d_weights, end.rest)
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

    Adds to `layers` and to `d_weights`, L x [N, narrow, wide].
    """
    # Up the layers: D_l = act'(Z_l) * (D_{l+1} W_{l+1}^T).
    d_outputs: list[Tensor] = []
    pulled: list[Tensor | None] = [None]
    for level, (below, above) in enumerate(zip(layers, layers[1:], strict=False)):
        d_z, d_pulled = activate_vjp_gradients(
            chunk[level].outputs,
            chunk[level].pulled,
            below.gradients[index],
            options.activation,
            options.activation_scale,
        )
        above.gradients[index].baddbmm_(d_pulled, weights[level + 1])
        pulled.append(d_pulled)
        d_outputs.append(d_z)
    # The last layer's D = 2 (X W - v), or -v.
    d_outputs.append(layers[-1].gradients[index])
    factor = 2 if options.objective == "l2" else 0
    # Down the layers: X_{l+1} = act(X_l W_l).
    for level in reversed(range(len(layers))):
        writes, d_x = chunk[level], layers[level].inputs[index]
        products = [] if pulled[level] is None else [(pulled[level], writes.gradients, 1)]
        if factor:
            d_x.baddbmm_(d_outputs[level], weights[level].mT, alpha=factor)
            products.append((writes.inputs, d_outputs[level], factor))
        for by_input, by_output, alpha in products:
            narrow, wide = (by_output, by_input) if writes.narrows else (by_input, by_output)
            d_weights[level].add_(torch.bmm(narrow.mT, wide), alpha=alpha)
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
