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
    GroupGates,
    GroupTokens,
    GroupTrace,
    LayerRead,
    LayerWrites,
    group_gates,
    read_group,
    scaled_inputs,
    step_scale,
    times_learned,
    write_group,
)
from kernels.memory.options import MIN_ONE_MINUS_ETA, MemoryOptions


class LayerGradients(NamedTuple):
    """Gradients that one layer of a group has received so far; added to in place."""

    states: Tensor  # [n, N, 2 * i, o], of the state at each chunk's start
    inputs: Tensor  # [n, N, C, i], of X
    gradients: Tensor  # [n, N, C, o], of D
    steps: Tensor  # [n, N, C], of theta
    learned: Tensor | None  # [N, i, o], of W_0; None when the memory forgets to zero


class GroupGradients(NamedTuple):
    """Gradients of a group's tokens, of W_0 and of the state at the group's start."""

    tokens: GroupTokens
    learned: list[Tensor | None]  # L x [N, i, o]; None when the memory forgets to zero
    state: list[Tensor]  # L x [N, 2 * i, o]


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
    with torch.enable_grad():
        leaves = tokens.alpha.detach().requires_grad_(), tokens.eta.detach().requires_grad_()
        graph = group_gates(*leaves)
    gates = GroupGates(*(x.detach() for x in graph))
    d_gates = GroupGates(*(torch.zeros_like(x) for x in gates))
    trace = write_group(tokens, gates, learned, state, options, with_end=False)
    d_q, layers = _read_gradients(tokens.q, gates, learned, trace, options, d_y, d_gates)
    bounds = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        bounds = [BoundGradient.of(writes.inputs, tokens.theta, scale, options.step_bound) for writes in trace.writes]
    d_v = torch.empty_like(tokens.v)
    for index in reversed(range(tokens.k.shape[0])):
        if d_end is not None:
            for layer, writes, w0, states, d_state in zip(
                layers, trace.writes, learned, trace.states, d_end, strict=True
            ):
                _end_gradients(index, layer, writes, gates, w0, states[index], d_state, d_gates)
        if bounds is not None:
            for layer, writes, bound in zip(layers, trace.writes, bounds, strict=True):
                layer.inputs[index].baddbmm_(bound.of_products(layer.steps, index), writes.inputs[index])
        _inner_gradients(index, layers, trace, options, d_v[index])
        d_end = [layer.states[index] for layer in layers]
    d_theta, d_eta_of_steps = step_gradients(tokens, layers, bounds)
    d_alpha, d_eta = torch.autograd.grad(graph, leaves, d_gates)
    d_tokens = GroupTokens(d_q, layers[0].inputs, d_v, d_alpha, d_eta + d_eta_of_steps, d_theta)
    # Copies: a view would keep all chunks' gradients alive through the next group.
    return GroupGradients(d_tokens, [layer.learned for layer in layers], [x.clone() for x in d_end])


def _read_gradients(
    q: Tensor,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    trace: GroupTrace,
    options: MemoryOptions,
    d_y: Tensor,
    d_gates: GroupGates,
) -> tuple[Tensor, list[LayerGradients]]:
    """Gradient of q, and of what the reads take from each layer."""
    reads = read_group(q, gates, learned, trace, options)
    layers: list[LayerGradients] = []
    d_outputs = d_y
    for index in reversed(range(len(reads))):
        d_inputs, layer = _read_layer_gradients(
            reads.pop(), gates, learned[index], trace.states[index], trace.writes[index], d_outputs, d_gates
        )
        layers.append(layer)
        if index:
            d_outputs = activate_vjp(reads[index - 1].outputs, d_inputs, options.activation, options.activation_scale)
    return d_inputs, layers[::-1]


def _read_layer_gradients(
    read: LayerRead,
    gates: GroupGates,
    learned: Tensor | None,
    states: Tensor,
    writes: LayerWrites,
    d_outputs: Tensor,
    d_gates: GroupGates,
) -> tuple[Tensor, LayerGradients]:
    """Gradient of one layer's queries, [n, N, M, i], and of what it read; adds to `d_gates`."""
    num_queries = read.inputs.shape[-2]
    a, p = (gate[..., -num_queries:, None] for gate in (gates.a, gates.p))
    through_weights, through_momentum = (d_outputs @ states.mT).chunk(2, dim=-1)
    d_inputs = through_weights * a
    d_inputs.addcmul_(through_momentum, p)
    d_learned = None
    if learned is not None:
        through_learned = times_learned(d_outputs, learned.mT)
        d_inputs.addcmul_(through_learned, 1 - a)
        through_weights = through_weights - through_learned
        d_learned = ((read.inputs * (1 - a)).transpose(0, 1).flatten(1, 2).mT) @ d_outputs.transpose(0, 1).flatten(1, 2)
    d_gates.a[..., -num_queries:] += (read.inputs * through_weights).sum(-1)
    d_gates.p[..., -num_queries:] += (read.inputs * through_momentum).sum(-1)
    d_product = (d_outputs @ writes.gradients.mT).neg_()
    d_scores = d_product * read.coefficients
    d_coefficients = d_product.mul_(read.scores)
    d_inputs.view(-1, *d_inputs.shape[2:]).baddbmm_(d_scores.flatten(0, 1), writes.inputs.flatten(0, 1))
    d_gates.write[..., -num_queries:, :].addcmul_(d_coefficients, writes.steps.unsqueeze(-2))
    layer = LayerGradients(
        states=read.mixed.mT @ d_outputs,
        inputs=d_scores.mT @ read.inputs,
        gradients=((read.scores * read.coefficients).mT @ d_outputs).neg_(),
        steps=(d_coefficients * gates.write[..., -num_queries:, :]).sum(-2),
        learned=d_learned,
    )
    return d_inputs, layer


def _end_gradients(
    index: int,
    layer: LayerGradients,
    writes: LayerWrites,
    gates: GroupGates,
    learned: Tensor | None,
    state: Tensor,
    d_end: Tensor,
    d_gates: GroupGates,
) -> None:
    """Back through one layer's state at the end of chunk `index` (`chunk.advance`): adds to `layer` and `d_gates`."""
    a, e, p = (x[index, :, -1, None, None] for x in (gates.a, gates.e, gates.p))
    d_weights, d_momentum = d_end.chunk(2, dim=1)
    into_weights, into_momentum = layer.states[index].chunk(2, dim=1)
    into_weights.addcmul_(d_weights, a)
    into_momentum.addcmul_(d_weights, p).addcmul_(d_momentum, e)
    d_end_flat = d_end.unflatten(1, (2, -1)).flatten(2)
    products = d_end_flat @ state.unflatten(1, (2, -1)).flatten(2).mT  # [N, 2, 2]: weights, momentum of both
    d_gates.a[index, :, -1] += products[:, 0, 0]
    d_gates.p[index, :, -1] += products[:, 0, 1]
    d_gates.e[index, :, -1] += products[:, 1, 1]
    if learned is not None:
        layer.learned.addcmul_(d_weights, 1 - a)
        d_gates.a[index, :, -1] -= (d_end_flat[:, :1] @ learned.flatten(1).unsqueeze(-1)).flatten()
    write_last, momentum_last = gates.write[index, :, -1], gates.momentum_last[index]
    x, d, steps = writes.inputs[index], writes.gradients[index], writes.steps[index]
    layer.gradients[index].baddbmm_(scaled_inputs(x, steps, write_last, momentum_last), d_end, alpha=-1)
    through_weights, through_momentum = (d @ d_end.mT).chunk(2, dim=-1)
    for last, d_last, through in (
        (write_last, d_gates.write[index, :, -1], through_weights),
        (momentum_last, d_gates.momentum_last[index], through_momentum),
    ):
        layer.inputs[index].addcmul_(through, (last * steps).unsqueeze(-1), value=-1)
        overlap = (x * through).sum(-1)
        layer.steps[index].addcmul_(overlap, last, value=-1)
        d_last.addcmul_(overlap, steps, value=-1)


def _inner_gradients(
    index: int, layers: Sequence[LayerGradients], trace: GroupTrace, options: MemoryOptions, d_v: Tensor
) -> None:
    """Back through the inner gradients of chunk `index` (`chunk.chunk_writes`), after all that used X and D."""
    weights = [states[index].chunk(2, dim=1)[0] for states in trace.states]
    writes = [LayerWrites(*(None if x is None else x[index] for x in layer)) for layer in trace.writes]
    # Up the layers: D_l = act'(Z_l) * (D_{l+1} W_{l+1}^T).
    d_outputs: list[Tensor | None] = []
    d_pulled: list[Tensor | None] = [None]
    for below, above, weight, layer in zip(layers, layers[1:], weights[1:], writes, strict=False):
        d_z, d_pull = activate_vjp_gradients(
            layer.outputs, layer.pulled, below.gradients[index], options.activation, options.activation_scale
        )
        above.gradients[index].baddbmm_(d_pull, weight)
        d_outputs.append(d_z)
        d_pulled.append(d_pull)
    d_last = layers[-1].gradients[index]
    d_outputs.append(2 * d_last if options.objective == "l2" else None)
    torch.mul(d_last, -2 if options.objective == "l2" else -1, out=d_v)
    # Down the layers: X_{l+1} = act(X_l W_l).
    for level in reversed(range(len(layers))):
        layer, d_out = layers[level], d_outputs[level]
        if d_out is not None:
            layer.inputs[index].baddbmm_(d_out, weights[level].mT)
        if level:
            d_outputs[level - 1] += activate_vjp(
                writes[level - 1].outputs, layer.inputs[index], options.activation, options.activation_scale
            )
        pairs = [(d_pulled[level], writes[level].gradients), (writes[level].inputs, d_out)]
        pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        if pairs:
            left, right = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
            layer.states[index].chunk(2, dim=1)[0].add_(left.mT @ right)


class BoundGradient(NamedTuple):
    """The step bound of one layer, differentiated: theta_t / max(1, b * sum_{j <= t} c_j |x_j . x_t|)."""

    signed: Tensor  # [n, N, C, C]: c_j times the sign of x_j . x_t, for j <= t
    overlaps: Tensor  # [n, N, C, C]: |x_j . x_t|, for j <= t
    inverse: Tensor  # [n, N, C]: 1 / max(1, ...)
    slope: Tensor  # [n, N, C]: derivative of the bounded step in the sum

    @classmethod
    def of(cls, inputs: Tensor, theta: Tensor, scale: Tensor, bound: float) -> BoundGradient:
        """For a layer's inputs [n, N, C, d], theta and c = theta / (1 - eta) [n, N, C]."""
        products = (inputs @ inputs.mT).tril_()
        overlaps = products.abs()
        divisor = bound * (overlaps @ scale.unsqueeze(-1)).squeeze(-1)
        inverse = 1 / divisor.clamp_min(1.0)
        slope = torch.where(divisor >= 1, -bound * theta * inverse * inverse, 0)
        return cls(products.sign_().mul_(scale.unsqueeze(-2)), overlaps, inverse, slope)

    def of_products(self, d_steps: Tensor, index: int | slice = slice(None)) -> Tensor:
        """Gradient of a layer's inputs @ inputs^T, [..., C, C], from that of its steps; of one chunk, or of all."""
        d_products = (d_steps[index] * self.slope[index]).unsqueeze(-1) * self.signed[index]
        return d_products + d_products.mT


def step_gradients(
    tokens: GroupTokens, layers: Sequence[LayerGradients], bounds: Sequence[BoundGradient] | None
) -> tuple[Tensor, Tensor]:
    """Gradients of theta, and of eta through the step bound, [n, N, C]."""
    if bounds is None:
        return torch.stack([layer.steps for layer in layers]).sum(0), torch.zeros_like(tokens.eta)
    d_theta, d_scale = torch.zeros_like(tokens.theta), torch.zeros_like(tokens.theta)
    for layer, bound in zip(layers, bounds, strict=True):
        d_theta.addcmul_(layer.steps, bound.inverse)
        d_scale += (bound.overlaps.mT @ (layer.steps * bound.slope).unsqueeze(-1)).squeeze(-1)
    rest = (1 - tokens.eta).clamp_min(MIN_ONE_MINUS_ETA)
    d_theta.addcdiv_(d_scale, rest)
    d_eta = torch.where(1 - tokens.eta >= MIN_ONE_MINUS_ETA, d_scale * tokens.theta / rest.square(), 0)
    return d_theta, d_eta
