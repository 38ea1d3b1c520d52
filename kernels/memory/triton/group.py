"""A group of chunks by Triton kernels: what chunk.py and chunk_gradient.py do in PyTorch, with the same values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.memory.chunk import GroupGates, GroupTokens, GroupTrace, LayerWrites, step_scale
from kernels.memory.options import MemoryOptions
from kernels.memory.triton.launch import Tiles, block_of
from kernels.memory.triton.read import read_layer
from kernels.memory.triton.write import write_one_layer, write_two_layers


def write_group(
    tokens: GroupTokens,
    gates: GroupGates,
    learned: Sequence[Tensor | None],
    state: Sequence[Tensor],
    options: MemoryOptions,
    with_end: bool,
    keep: bool = False,
) -> GroupTrace:
    """`chunk.write_group`; the outputs of layers and the pulled gradients are there only with `keep`."""
    k, v = tokens.k.contiguous(), tokens.v.contiguous()
    num_chunks, num_memories, size, dim = k.shape
    tiles, bounded = Tiles.of(k, size), options.step_bound is not None
    num_states = num_chunks + with_end
    states = [s.new_empty(num_states, *s.shape) for s in state]
    for buffer, s in zip(states, state, strict=True):
        buffer[0] = s
    gradients = [k.new_empty(*k.shape[:3], s.shape[2], dtype=tiles.stored) for s in state]
    theta = tokens.theta.contiguous()
    steps, divisors = ([torch.empty_like(theta) if bounded else theta for _ in state] for _ in range(2))
    scale = step_scale(theta, tokens.eta).contiguous()
    shared = (k, v, theta, scale, gates.write, gates.momentum_last.contiguous(), gates.a, gates.e, gates.p)
    targets = [s if w is None else w for w, s in zip(learned, state, strict=True)]
    sizes = (num_chunks, num_states, num_memories, size)
    constants = {
        "D": dim, "CP": tiles.tokens, "L2": options.objective == "l2", "INIT": learned[0] is not None,
        "BOUND": bounded, "PRECISION": tiles.precision,
    }  # fmt: skip
    bound = options.step_bound or 0.0
    if len(state) == 1:
        block = block_of(dim)
        write_one_layer[(num_memories * (dim // block),)](
            *shared, *targets, *states, *gradients, *steps, *divisors, bound, *sizes, OB=block, **constants
        )
        writes = [LayerWrites(k, None, None, gradients[0], steps[0])]
    else:
        width = state[0].shape[2]
        hidden = torch.empty_like(gradients[0])
        outputs = hidden.new_empty(hidden.shape if keep else hidden.shape[1:], dtype=torch.float32)
        pulled = torch.empty_like(outputs) if keep else outputs
        write_two_layers[(num_memories,)](
            *shared, *targets, *states, hidden, outputs, pulled, *gradients, *steps, *divisors, bound,
            options.activation_scale, *sizes, H=width, HB=block_of(width), ACTIVATION=options.activation, KEEP=keep,
            **constants,
        )  # fmt: skip
        writes = [
            LayerWrites(k, outputs, pulled, gradients[0], steps[0]),
            LayerWrites(hidden, None, None, gradients[1], steps[1]),
        ]
    # A copy of the end: a view would keep all the group's states alive for as long as it is.
    end = [buffer[-1].clone() for buffer in states] if with_end else None
    return GroupTrace([buffer[:num_chunks] for buffer in states], writes, end)


def read_group(
    q: Tensor, gates: GroupGates, learned: Sequence[Tensor | None], trace: GroupTrace, options: MemoryOptions
) -> list[Tensor]:
    """Every layer's outputs for the queries, [n, N, M, o]; the last one's are y."""
    num_chunks, num_memories, num_queries, _ = q.shape
    size = gates.a.shape[-1]
    tiles = Tiles.of(q, num_queries)
    tokens = Tiles.of(trace.writes[0].inputs, num_queries).tokens
    outputs: list[Tensor] = []
    for w0, states, writes in zip(learned, trace.states, trace.writes, strict=True):
        x = outputs[-1] if outputs else q.contiguous()
        d_in, d_out = states.shape[2] // 2, states.shape[3]
        block = block_of(d_out)
        out = q.new_empty(*q.shape[:3], d_out, dtype=torch.float32)
        read_layer[(num_chunks * num_memories * (d_out // block),)](
            x, writes.inputs, writes.gradients, writes.steps, gates.write, gates.a, gates.p,
            states if w0 is None else w0, states, out, options.activation_scale, num_memories, num_queries, size,
            I=d_in, O=d_out, IB=block_of(d_in), OB=block, MP=tiles.queries, CP=tokens,
            ACTIVATION=options.activation if outputs else "none", INIT=w0 is not None, PRECISION=tiles.precision,
        )  # fmt: skip
        outputs.append(out)
    return outputs
