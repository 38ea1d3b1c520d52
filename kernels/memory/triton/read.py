"""Read-out of a group: one layer for the queries of all its chunks at once.

README.md of kernels/memory, section 2; `read_layer` of chunk.py is the same in PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import (
    NUMBERS,
    activate,
    dot,
    load_gate,
    load_square,
    load_state,
    load_tile,
    load_tile_transposed,
    store_tile,
)


@triton.jit(do_not_specialize=NUMBERS)
def read_layer(
    x, keys, gradients, steps, write, a, p, learned, states, out, act_scale, num_memories, M, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr,
    ACTIVATION: tl.constexpr, INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = a * (Q W) + p * (Q S) + (1 - a) * (Q W_0) - (Q X^T * P theta) D, Q = act(x). Grid (n * N * OUT / OB).

    Args:
        x: [n, N, M, IN], the layer below before its activation, or q with ACTIVATION "none".
        keys, gradients: X [n, N, C, IN] and D [n, N, C, OUT].
        steps, a, p: [n, N, C]; write: [n, N, C, C]. The M queries are those of the chunk's last tokens.
        learned: W_0 [N, IN, OUT]; states: [n, N, 2 * IN, OUT].
        out: [n, N, M, OUT].
    """
    at = (tl.program_id(0) // (OUT // OB)).to(tl.int64)
    columns = tl.program_id(0) % (OUT // OB) * OB + tl.arange(0, OB)
    queries, tokens = tl.arange(0, CP), tl.arange(0, CP)
    weights, momentum = states + at * 2 * IN * OUT, states + at * 2 * IN * OUT + IN * OUT
    learned += at % num_memories * IN * OUT
    scores = tl.zeros((CP, CP), tl.float32)
    from_weights = tl.zeros((CP, OB), tl.float32)
    from_momentum = tl.zeros((CP, OB), tl.float32)
    from_learned = tl.zeros((CP, OB), tl.float32)
    for start in range(0, IN, IB):
        block = start + tl.arange(0, IB)
        q = activate(load_tile(x + at * M * IN, queries, M, block, IN), act_scale, ACTIVATION)
        scores += dot(q, load_tile_transposed(keys + at * C * IN, tokens, C, block, IN), PRECISION)
        from_weights += dot(q, load_state(weights, block, columns, OUT), PRECISION)
        from_momentum += dot(q, load_state(momentum, block, columns, OUT), PRECISION)
        if INIT:
            from_learned += dot(q, load_state(learned, block, columns, OUT), PRECISION)
    first = at * C + C - M
    a_queries = load_gate(a + first, queries, M)[:, None]
    result = a_queries * from_weights + load_gate(p + first, queries, M)[:, None] * from_momentum
    if INIT:
        result += (1 - a_queries) * from_learned
    coefficients = load_square(write + first * C, queries, M, tokens, C, C, 1)
    coefficients *= load_gate(steps + at * C, tokens, C)[None, :]
    result -= dot(scores * coefficients, load_tile(gradients + at * C * OUT, tokens, C, columns, OUT), PRECISION)
    store_tile(out + at * M * OUT, result, queries, M, columns, OUT)
