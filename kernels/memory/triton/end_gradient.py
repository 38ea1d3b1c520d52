"""What remains of a group's gradient when all its states have theirs: of keys, W_0 and the gates at the chunks' ends.

README.md of kernels/memory, section 4.2; `_end_gradients` and `_inner_gradients` of chunk_gradient.py have the same in
PyTorch. No chunk waits for another here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import (
    NUMBERS,
    activate,
    dot,
    load_gate,
    load_state,
    load_state_transposed,
    load_tile,
    load_tile_transposed,
    store_state,
    store_tile,
)


@triton.jit(do_not_specialize=NUMBERS)
def end_inputs_gradient(
    d_outputs, gradients, steps, write, momentum_last, states, d_states, d_keys, num_memories, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX -= (w D) dW'^T + (m D) dS'^T, dX += d(X W) W^T, of the first layer. Grid (n * N * IN / IB).

    Args:
        d_outputs: gradient of X W [n, N, C, OUT], times OUTPUTS (1 or -1); unused where that is 0.
        gradients: D [n, N, C, OUT]; steps, momentum_last: [n, N, C]; write: [n, N, C, C].
        states: [n, N, 2 * IN, OUT]; d_states: [n + 1, N, 2 * IN, OUT].
        d_keys: in and out, dX [n, N, C, IN].
    """
    at = (tl.program_id(0) // (IN // IB)).to(tl.int64)
    block = tl.program_id(0) % (IN // IB) * IB + tl.arange(0, IB)
    tokens = tl.arange(0, CP)
    step = load_gate(steps + at * C, tokens, C)
    for_weights = (load_gate(write + at * C * C + (C - 1) * C, tokens, C) * step)[:, None]
    for_momentum = (load_gate(momentum_last + at * C, tokens, C) * step)[:, None]
    d_end, state = d_states + (at + num_memories) * 2 * IN * OUT, states + at * 2 * IN * OUT
    d_x = load_tile(d_keys + at * C * IN, tokens, C, block, IN)
    for start in range(0, OUT, OB):
        columns = start + tl.arange(0, OB)
        gradient = load_tile(gradients + at * C * OUT, tokens, C, columns, OUT)
        d_x -= dot(for_weights * gradient, load_state_transposed(d_end, block, columns, OUT), PRECISION)
        d_x -= dot(for_momentum * gradient, load_state_transposed(d_end + IN * OUT, block, columns, OUT), PRECISION)
        if OUTPUTS != 0:
            d_output = OUTPUTS * load_tile(d_outputs + at * C * OUT, tokens, C, columns, OUT)
            d_x += dot(d_output, load_state_transposed(state, block, columns, OUT), PRECISION)
    store_tile(d_keys + at * C * IN, d_x, tokens, C, block, IN)


@triton.jit(do_not_specialize=NUMBERS)
def end_products(
    d_out, x, a, learned, states, d_states, d_learned, d_ends, act_scale, num_chunks, num_memories, M, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr,
    ACTIVATION: tl.constexpr, INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What remains when all states have their gradients. Grid (N * IN / IB * OUT / OB), one tile of a layer's weights.

    Args:
        d_out, x, learned: as `read_gradient.read_inputs_gradient` has them.
        states: [n, N, 2 * IN, OUT]; d_states: [n + 1, N, 2 * IN, OUT].
        d_learned: out, dW_0 [N, IN, OUT], by reads and ends.
        d_ends: out, [3, IN / IB * OUT / OB, n, N]: gradients of a, p and e at each chunk's end by the state after it,
            to be summed over the second dimension.
    """
    num_parts: tl.constexpr = (IN // IB) * (OUT // OB)
    memory, part = (tl.program_id(0) // num_parts).to(tl.int64), tl.program_id(0) % num_parts
    rows, columns = part // (OUT // OB) * IB + tl.arange(0, IB), part % (OUT // OB) * OB + tl.arange(0, OB)
    queries = tl.arange(0, CP)
    learned += memory * IN * OUT
    total = tl.zeros((IB, OB), tl.float32)
    for chunk in range(num_chunks):
        at = chunk * num_memories + memory
        end = d_states + ((chunk + 1) * num_memories + memory) * 2 * IN * OUT
        d_weights, d_momentum = load_state(end, rows, columns, OUT), load_state(end + IN * OUT, rows, columns, OUT)
        weights = load_state(states + at * 2 * IN * OUT, rows, columns, OUT)
        momentum = load_state(states + at * 2 * IN * OUT + IN * OUT, rows, columns, OUT)
        if INIT:
            weights -= load_state(learned, rows, columns, OUT)
            kept = load_gate(a + at * C + C - M, queries, M)[:, None]
            d_z = (1 - kept) * load_tile(d_out + at * M * OUT, queries, M, columns, OUT)
            q = activate(load_tile_transposed(x + at * M * IN, queries, M, rows, IN), act_scale, ACTIVATION)
            total += (1 - tl.load(a + at * C + C - 1)) * d_weights + dot(q, d_z, PRECISION)
        sums = d_ends + (part * num_chunks + chunk) * num_memories + memory
        stride = num_parts * num_chunks * num_memories
        tl.store(sums, tl.sum(d_weights * weights))
        tl.store(sums + stride, tl.sum(d_weights * momentum))
        tl.store(sums + 2 * stride, tl.sum(d_momentum * momentum))
    if INIT:
        store_state(d_learned + memory * IN * OUT, total, rows, columns, OUT)
