"""A group of chunks by Triton kernels: `write_group` and `read_group` of chunk.py, with the same values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.memory.chunk import GroupTokens, GroupTrace, LayerWrites, step_scale
from kernels.memory.gates import GroupGates
from kernels.memory.options import MemoryOptions
from kernels.memory.triton.launch import Tiles, block_of, packed
from kernels.memory.triton.read import read_layer
from kernels.memory.triton.write import write_one_layer, write_two_layers


def write_group(
    tokens: GroupTokens,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    with_end: bool,
    for_gradient: bool = False,
) -> GroupTrace:
    """`chunk.write_group` of one or two layers; `outputs` and `pulled` are there only for the gradient."""
    tokens, gates = GroupTokens(*packed(tokens)), GroupGates(*packed(gates))
    k, theta, bounded = tokens.k, tokens.theta, options.step_bound is not None
    num_chunks, num_memories, size, dim = k.shape
    num_states = num_chunks + with_end
    tiles = Tiles.of(k.dtype, options.chunk_size, dim)
    states = [s.new_empty(num_states, *s.shape) for s in state]
    for buffer, s in zip(states, state, strict=True):
        buffer[0] = s
    gradients = [k.new_empty(*k.shape[:3], s.shape[2], dtype=tiles.stored) for s in state]
    steps = [torch.empty_like(theta) if bounded else theta for _ in state]
    arguments = (
        k, tokens.v, theta, step_scale(theta, tokens.eta), gates.write, gates.momentum_last, gates.a, gates.e, gates.p,
        *packed(s if w is None else w for w, s in zip(learned, state, strict=True)), *states,
    )  # fmt: skip
    numbers = (num_chunks, num_states, num_memories, size)
    constants = {
        "D": dim, "CB": tiles.some_tokens, "L2": options.objective == "l2", "INIT": learned[0] is not None,
        "BOUND": bounded, **tiles.constants,
    }  # fmt: skip
    if len(state) == 1:
        block = block_of(dim)
        write_one_layer[(num_memories * (dim // block),)](
            *arguments, *gradients, *steps, float(options.step_bound or 0), *numbers, OB=block, **constants
        )
        writes = [LayerWrites(k, None, None, gradients[0], steps[0])]
    else:
        width = state[0].shape[2]
        hidden = torch.empty_like(gradients[0])
        outputs = hidden.new_empty(hidden.shape if for_gradient else hidden.shape[1:], dtype=torch.float32)
        pulled = torch.empty_like(outputs) if for_gradient else None
        write_two_layers[(num_memories,)](
            *arguments, hidden, outputs, outputs if pulled is None else pulled, *gradients, *steps,
            float(options.step_bound or 0), float(options.activation_scale), *numbers,
            H=width, DB=block_of(dim), HB=block_of(width), ACTIVATION=options.activation, KEEP=for_gradient,
            **constants,
        )  # fmt: skip
        writes = [
            LayerWrites(k, outputs if for_gradient else None, pulled, gradients[0], steps[0]),
            LayerWrites(hidden, None, None, gradients[1], steps[1]),
        ]
    # A copy of the end: a view would keep all the group's states alive for as long as it is.
    end = [buffer[-1].clone() for buffer in states] if with_end else None
    return GroupTrace([buffer[:num_chunks] for buffer in states], writes, end)


def read_group(
    q: Tensor,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    trace: GroupTrace,
    options: MemoryOptions,
    hidden_only: bool = False,
) -> list[Tensor]:
    """Each layer's outputs before activation for the queries, [n, N, M, o]; the last one's are y."""
    num_chunks, num_memories, num_queries, dim = q.shape
    gates = GroupGates(*packed(gates))
    tiles = Tiles.of(trace.writes[0].inputs.dtype, options.chunk_size, dim)
    outputs: list[Tensor] = []
    for layer in range(len(learned) - hidden_only):
        w0, states, writes = learned[layer], trace.states[layer], trace.writes[layer]
        d_in, d_out = states.shape[2] // 2, states.shape[3]
        block = block_of(d_out)
        out = q.new_empty(*q.shape[:3], d_out, dtype=torch.float32)
        read_layer[(num_chunks * num_memories * (d_out // block),)](
            *packed([outputs[-1] if outputs else q]), writes.inputs, writes.gradients, writes.steps, gates.write,
            gates.a, gates.p, *packed([states if w0 is None else w0]), states, out, float(options.activation_scale),
            num_memories, num_queries, writes.inputs.shape[2], IN=d_in, OUT=d_out, IB=block_of(d_in), OB=block,
            ACTIVATION=options.activation if outputs else "none",
            INIT=w0 is not None, **tiles.constants,
        )  # fmt: skip
        outputs.append(out)
    return outputs
