"""The gradient of a group of chunks by Triton kernels: `group_gradients` of chunk_gradient.py, with the same values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.memory.chunk import GroupTokens, GroupTrace, own_products, step_scale
from kernels.memory.chunk_gradient import BoundGradient, GroupGradients, step_gradients
from kernels.memory.gates import GatesForGradient, GroupGates
from kernels.memory.options import MemoryOptions
from kernels.memory.triton.end_gradient import end_inputs_gradient, end_products
from kernels.memory.triton.group import read_group, write_group
from kernels.memory.triton.launch import Tiles, block_of, packed
from kernels.memory.triton.read_gradient import read_inputs_gradient, read_states_gradient
from kernels.memory.triton.write_gradient import write_one_layer_gradient, write_two_layers_gradient


class LayerGradients(NamedTuple):
    """Gradients that one layer of a group has received so far; added to in place."""

    states: Tensor  # [n + 1, N, 2 * i, o], of the state at each chunk's start and at the end
    inputs: Tensor  # [n, N, C, i], of X
    gradients: Tensor  # [n, N, C, o], of D
    steps: Tensor  # [n, N, C], of theta
    learned: Tensor | None  # [N, i, o], of W_0; None when the memory forgets to zero


class _Pass(NamedTuple):
    """What the steps of one group's backward share; `d_gates` is added to by all of them."""

    gates: GroupGates
    d_gates: GroupGates
    learned: list[Tensor | None]
    trace: GroupTrace
    options: MemoryOptions
    tiles: Tiles

    @property
    def act_scale(self) -> float:
        """Of the activation, never an int, which Triton would compile other code for."""
        return float(self.options.activation_scale)

    def layer_constants(self, index: int) -> dict[str, object]:
        """Compile-time arguments of the kernels for one layer's reads."""
        d_in, d_out = self.trace.states[index].shape[2] // 2, self.trace.states[index].shape[3]
        return {
            "IN": d_in, "OUT": d_out, "IB": block_of(d_in), "OB": block_of(d_out),
            "ACTIVATION": self.options.activation if index else "none", **self.tiles.constants,
        }  # fmt: skip


def group_gradients(
    tokens: GroupTokens,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    d_y: Tensor,
    d_end: Sequence[Tensor] | None,
) -> GroupGradients:
    """`chunk_gradient.group_gradients` of one or two layers."""
    tokens, (d_y,) = GroupTokens(*packed(tokens)), packed([d_y])
    learned = [None if w is None else packed([w])[0] for w in learned]
    products = GatesForGradient.of(tokens.alpha, tokens.eta)
    gates = GroupGates(*packed(products.gates))
    d_gates = GroupGates(*(torch.zeros_like(x) for x in gates))
    trace = write_group(tokens, gates, learned, state, options, with_end=False, for_gradient=True)
    tiles = Tiles.of(tokens.k.dtype, options.chunk_size, tokens.k.shape[-1])
    group = _Pass(gates, d_gates, learned, trace, options, tiles)
    reads = [tokens.q, *read_group(tokens.q, gates, learned, trace, options, hidden_only=True)]
    layers: list[LayerGradients] = []
    d_outputs = [d_y]
    for index in reversed(range(len(reads))):
        d_x, layer = _read_layer_gradients(group, index, reads[index], d_outputs[0])
        # What nothing follows from has no gradient at its end.
        layer.states[-1] = 0.0 if d_end is None else d_end[index]
        layers.insert(0, layer)
        d_outputs.insert(0, d_x)
    bounds = None
    if options.step_bound is not None:
        scale = step_scale(tokens.theta, tokens.eta)
        overlaps = (own_products(writes.inputs.float()) for writes in trace.writes)
        bounds = [BoundGradient.of(x, tokens.theta, scale, options.step_bound) for x in overlaps]
    d_v = _write_gradients(group, layers, bounds)
    d_k = layers[0].inputs
    if bounds is not None:
        d_products = bounds[0].of_products(layers[0].steps).flatten(0, 1)
        d_k.view(-1, *d_k.shape[2:]).baddbmm_(d_products, tokens.k.float().flatten(0, 1))
    for index, layer in enumerate(layers):
        _end_gradients(group, index, layer, reads[index], d_outputs[index + 1])
    d_theta, d_eta_of_steps = step_gradients(tokens, [layer.steps for layer in layers], bounds)
    d_alpha, d_eta = products.gradients(d_gates)
    d_tokens = GroupTokens(d_outputs[0], d_k, d_v, d_alpha, d_eta + d_eta_of_steps, d_theta)
    # Copies: a view would keep all chunks' gradients alive through the next group.
    d_state = [layer.states[0].clone() for layer in layers]
    return GroupGradients(d_tokens, [layer.learned for layer in layers], d_state)


def _read_layer_gradients(group: _Pass, index: int, x: Tensor, d_out: Tensor) -> tuple[Tensor, LayerGradients]:
    """Gradient of x [n, N, M, i], one layer's queries before activation, and of what it read.

    The states' gradients, [n + 1, N, 2 * i, o], have room for the end's behind the chunks'.
    """
    gates, d_gates = group.gates, group.d_gates
    writes, states, learned = group.trace.writes[index], group.trace.states[index], group.learned[index]
    num_chunks, num_memories, size, _ = writes.inputs.shape
    num_queries = d_out.shape[2]
    constants = group.layer_constants(index)
    num_in, num_out = constants["IN"] // constants["IB"], constants["OUT"] // constants["OB"]
    d_x, d_keys = torch.empty_like(x, dtype=torch.float32), d_out.new_empty(writes.inputs.shape)
    d_products, scores = (d_out.new_empty(*d_out.shape[:3], size) for _ in range(2))
    d_a, d_p = (d_out.new_empty(num_in, *d_out.shape[:3]) for _ in range(2))
    d_states = states.new_empty(num_chunks + 1, *states.shape[1:])
    d_gradients = d_out.new_empty(writes.gradients.shape)
    read_inputs_gradient[(num_chunks * num_memories * num_in,)](
        d_out, x, writes.inputs, writes.gradients, writes.steps, gates.write, gates.a, gates.p,
        states if learned is None else learned, states, d_x, d_keys, d_products, d_a, d_p, group.act_scale,
        num_memories, num_queries, size, CB=group.tiles.some_tokens, INIT=learned is not None, **constants,
    )  # fmt: skip
    read_states_gradient[(num_chunks * num_memories * num_out,)](
        d_out, x, writes.inputs, writes.steps, gates.write, gates.a, gates.p, d_states, d_gradients, scores,
        group.act_scale, num_queries, size, **constants,
    )  # fmt: skip
    d_coefficients = d_products.mul_(scores)
    d_gates.write[..., -num_queries:, :].addcmul_(d_coefficients, writes.steps.unsqueeze(-2))
    d_gates.a[..., -num_queries:] += d_a.sum(0)
    d_gates.p[..., -num_queries:] += d_p.sum(0)
    d_steps = (d_coefficients * gates.write[..., -num_queries:, :]).sum(-2)
    d_learned = None if learned is None else torch.empty_like(learned)
    return d_x, LayerGradients(d_states, d_keys, d_gradients, d_steps, d_learned)


def _write_gradients(group: _Pass, layers: Sequence[LayerGradients], bounds: Sequence[BoundGradient] | None) -> Tensor:
    """From the last chunk to the first; adds to `layers`. Returns the gradient of v."""
    gates, d_gates, options = group.gates, group.d_gates, group.options
    states, writes = group.trace.states, group.trace.writes
    k, steps = writes[0].inputs, [layer.steps for layer in writes]
    num_chunks, num_memories, size, dim = k.shape
    d_v = torch.empty_like(k, dtype=torch.float32)
    parts = dim // block_of(dim) if len(layers) == 1 else 1
    overlaps = [[s.new_empty(parts, *s.shape) for s in steps] for _ in range(2)]
    gradients = [layer.gradients for layer in writes]
    arguments = (*gradients, *steps, gates.write, gates.momentum_last, gates.a, gates.e, gates.p)
    numbers = (num_chunks, num_memories, size)
    constants = {"D": dim, "L2": options.objective == "l2", **group.tiles.constants}
    if len(layers) == 1:
        write_one_layer_gradient[(num_memories * parts,)](
            k, *arguments, layers[0].states, layers[0].gradients, d_v, *overlaps[0], *overlaps[1], *numbers,
            OB=block_of(dim), **constants,
        )  # fmt: skip
        d_outputs, sign = d_v, -1 if options.objective == "l2" else 0
    else:
        first, second = layers
        outputs, width = writes[0].outputs, writes[0].outputs.shape[-1]
        signed, slope = (bounds[1].signed, bounds[1].slope) if bounds else (gates.write, gates.a)
        d_outputs, sign, d_pulled = torch.empty_like(outputs), 1, torch.empty_like(outputs[0])
        d_products = d_v.new_empty(num_memories, group.tiles.tokens, group.tiles.tokens)
        write_two_layers_gradient[(num_memories,)](
            k, writes[1].inputs, outputs, writes[0].pulled, *arguments, states[1], signed, slope,
            first.states, second.states, second.inputs, first.gradients, second.gradients, second.steps,
            d_v, d_outputs, *overlaps[0], *overlaps[1], d_pulled, d_products, group.act_scale, *numbers,
            H=width, CB=group.tiles.some_tokens, DB=block_of(dim), HB=block_of(width), ACTIVATION=options.activation,
            BOUND=bounds is not None, **constants,
        )  # fmt: skip
    constants = group.layer_constants(0)
    del constants["ACTIVATION"]
    end_inputs_gradient[(num_chunks * num_memories * (dim // constants["IB"]),)](
        d_outputs, gradients[0], steps[0], gates.write, gates.momentum_last, states[0], layers[0].states,
        layers[0].inputs, num_memories, size, OUTPUTS=sign, **constants,
    )  # fmt: skip
    for layer, step, *sums in zip(layers, steps, *overlaps, strict=True):
        by_weights, by_momentum = (x.sum(0) for x in sums)
        layer.steps.addcmul_(by_weights, gates.write[..., -1, :], value=-1)
        layer.steps.addcmul_(by_momentum, gates.momentum_last, value=-1)
        d_gates.write[..., -1, :].addcmul_(by_weights, step, value=-1)
        d_gates.momentum_last.addcmul_(by_momentum, step, value=-1)
    return d_v


def _end_gradients(group: _Pass, index: int, layer: LayerGradients, x: Tensor, d_out: Tensor) -> None:
    """W_0's gradient into `layer.learned`, and those of the gates at each chunk's end, once all states have theirs."""
    gates, d_gates, states, learned = group.gates, group.d_gates, group.trace.states[index], group.learned[index]
    num_chunks, num_memories, num_queries, _ = x.shape
    constants = group.layer_constants(index)
    num_parts = (constants["IN"] // constants["IB"]) * (constants["OUT"] // constants["OB"])
    d_ends = states.new_empty(3, num_parts, num_chunks, num_memories)
    end_products[(num_memories * num_parts,)](
        d_out, x, gates.a, states if learned is None else learned, states, layer.states,
        d_ends if learned is None else layer.learned, d_ends, group.act_scale, num_chunks, num_memories,
        num_queries, gates.a.shape[-1], INIT=learned is not None, **constants,
    )  # fmt: skip
    for d_gate, d_last in zip((d_gates.a, d_gates.p, d_gates.e), d_ends.sum(1), strict=True):
        d_gate[..., -1] += d_last
