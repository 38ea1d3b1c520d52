"""Read-out of a group: one layer for the queries of all its chunks at once.

README.md of kernels/memory, section 2; `read_layer` of chunk.py is the same in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import activate, dot, load_gate, load_square, load_state, load_tile, store_tile


@triton.jit
def read_layer(
    x, keys, gradients, steps, write, a, p, learned, states, out, act_scale, num_memories, M, C,
    I: tl.constexpr, O: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr,
    ACTIVATION: tl.constexpr, INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = a * (Q W) + p * (Q S) + (1 - a) * (Q W_0) - (Q X^T * P theta) D, Q = act(x). Grid (n * N * O / OB).

    Args:
        x: [n, N, M, I], the layer below before its activation, or q with ACTIVATION "none".
        keys, gradients: X [n, N, C, I] and D [n, N, C, O].
        steps, a, p: [n, N, C]; write: [n, N, C, C]. The M queries are those of the chunk's last tokens.
        learned: W_0 [N, I, O]; states: [n, N, 2 * I, O].
        out: [n, N, M, O].
    """
    at = (tl.program_id(0) // (O // OB)).to(tl.int64)
    columns = tl.program_id(0) % (O // OB) * OB + tl.arange(0, OB)
    queries, tokens = tl.arange(0, MP), tl.arange(0, CP)
    weights, momentum = states + at * 2 * I * O, states + at * 2 * I * O + I * O
    learned += at % num_memories * I * O
    scores = tl.zeros((MP, CP), tl.float32)
    from_weights = tl.zeros((MP, OB), tl.float32)
    from_momentum = tl.zeros((MP, OB), tl.float32)
    from_learned = tl.zeros((MP, OB), tl.float32)
    for start in range(0, I, IB):
        block = start + tl.arange(0, IB)
        q = activate(load_tile(x + at * M * I, queries, M, block, I), act_scale, ACTIVATION)
        scores += dot(q, tl.trans(load_tile(keys + at * C * I, tokens, C, block, I)), PRECISION)
        from_weights += dot(q, load_state(weights, block, columns, O), PRECISION)
        from_momentum += dot(q, load_state(momentum, block, columns, O), PRECISION)
        if INIT:
            from_learned += dot(q, load_state(learned, block, columns, O), PRECISION)
    first = at * C + C - M
    a_queries = load_gate(a + first, queries, M)[:, None]
    result = a_queries * from_weights + load_gate(p + first, queries, M)[:, None] * from_momentum
    if INIT:
        result += (1 - a_queries) * from_learned
    coefficients = load_square(write + first * C, queries, M, tokens, C, C, 1)
    coefficients *= load_gate(steps + at * C, tokens, C)[None, :]
    result -= dot(scores * coefficients, load_tile(gradients + at * C * O, tokens, C, columns, O), PRECISION)
    store_tile(out + at * M * O, result, queries, M, columns, O)
