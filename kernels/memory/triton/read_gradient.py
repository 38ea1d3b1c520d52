"""Gradient of a group's read-out: one layer for the queries of all its chunks at once.

README.md of kernels/memory, section 4.1; `_read_layer_gradients` of chunk_gradient.py is the same in PyTorch. Where a
product needs a transposed result of another, that one is computed transposed: only tiles from memory are transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import (
    NUMBERS,
    activate,
    activation_slopes,
    dot,
    load_gate,
    load_square,
    load_state_transposed,
    load_tile,
    load_tile_transposed,
    store_square,
    store_state,
    store_tile,
)


@triton.jit
def read_coefficients_transposed(write, steps, at, queries, M, tokens, C):
    """(P theta)^T of the chunk's last M tokens, [C, M]."""
    coefficients = load_square(write + (at * C + C - M) * C, tokens, C, queries, M, 1, C)
    return coefficients * load_gate(steps + at * C, tokens, C)[:, None]


@triton.jit
def back_through_states(
    d_out, weights, learned, queries, M, block,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr,
    INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`d_out` times (W - W_0)^T, S^T and W_0^T, [M, block]; or times W^T and S^T, and 0, without INIT."""
    through_weights = tl.zeros((CP, IB), tl.float32)
    through_momentum = tl.zeros((CP, IB), tl.float32)
    through_learned = tl.zeros((CP, IB), tl.float32)
    for start in range(0, OUT, OB):
        columns = start + tl.arange(0, OB)
        d_z = load_tile(d_out, queries, M, columns, OUT)
        moved = load_state_transposed(weights, block, columns, OUT)
        if INIT:
            # Subtracted before it is rounded: the gradient of forgetting needs the difference alone.
            w0 = load_state_transposed(learned, block, columns, OUT)
            through_learned += dot(d_z, w0, PRECISION)
            moved -= w0
        through_weights += dot(d_z, moved, PRECISION)
        momentum = load_state_transposed(weights + IN * OUT, block, columns, OUT)
        through_momentum += dot(d_z, momentum, PRECISION)
    return through_weights, through_momentum, through_learned


@triton.jit
def minus_products(
    left, rows, num_rows, right, columns, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, COLUMNS] of -left right^T, of matrices [num_rows, WIDTH] and [num_columns, WIDTH] in memory."""
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        block = start + tl.arange(0, BLOCK)
        tile = load_tile(left, rows, num_rows, block, WIDTH)
        products -= dot(tile, load_tile_transposed(right, columns, num_columns, block, WIDTH), PRECISION)
    return products


@triton.jit(do_not_specialize=NUMBERS)
def read_inputs_gradient(
    d_out, x, keys, gradients, steps, write, a, p, learned, states, d_x, d_keys, d_products, d_a, d_p, act_scale,
    num_memories, M, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    ACTIVATION: tl.constexpr, INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a layer's reads give back to the queries and to the keys' inputs. Grid (n * N * IN / IB).

    Args (beside those of `read.read_layer`):
        d_out: dZ [n, N, M, OUT].
        d_x: out, gradient of x [n, N, M, IN].
        d_keys: out, dX [n, N, C, IN].
        d_products: out, E [n, N, M, C].
        d_a, d_p: out, [IN / IB, n, N, M], to be summed over the first dimension.
    """
    part = tl.program_id(0) % (IN // IB)
    at = (tl.program_id(0) // (IN // IB)).to(tl.int64)
    block = part * IB + tl.arange(0, IB)
    queries, tokens = tl.arange(0, CP), tl.arange(0, CP)
    first = at * C + C - M
    d_out += at * M * OUT
    gradients += at * C * OUT
    d_k = tl.zeros((CP, IB), tl.float32)
    for start in range(0, CP, CB):
        some = start + tl.arange(0, CB)
        products = minus_products(gradients, tokens, C, d_out, some, M, CP, CB, OUT, OB, PRECISION)
        products *= read_coefficients_transposed(write, steps, at, some, M, tokens, C)
        d_k += dot(products, activate(load_tile(x + at * M * IN, some, M, block, IN), act_scale, ACTIVATION), PRECISION)
    store_tile(d_keys + at * C * IN, d_k, tokens, C, block, IN)
    d_q = tl.zeros((CP, IB), tl.float32)
    for start in range(0, CP, CB):
        some = start + tl.arange(0, CB)
        products = minus_products(d_out, queries, M, gradients, some, C, CP, CB, OUT, OB, PRECISION)
        if part == 0:
            store_square(d_products + at * M * C, products, queries, M, some, C, C, 1)
        products *= load_square(write + first * C, queries, M, some, C, C, 1)
        products *= load_gate(steps + at * C, some, C)[None, :]
        d_q += dot(products, load_tile(keys + at * C * IN, some, C, block, IN), PRECISION)
    through_weights, through_momentum, through_learned = back_through_states(
        d_out, states + at * 2 * IN * OUT, learned + at % num_memories * IN * OUT, queries, M, block,
        IN, OUT, IB, OB, CP, INIT, PRECISION,
    )  # fmt: skip
    d_q += load_gate(a + first, queries, M)[:, None] * through_weights
    d_q += load_gate(p + first, queries, M)[:, None] * through_momentum
    if INIT:
        d_q += through_learned
    z = load_tile(x + at * M * IN, queries, M, block, IN)
    q = activate(z, act_scale, ACTIVATION)
    sums = (part * (tl.num_programs(0) // (IN // IB)) + at) * M + queries
    tl.store(d_a + sums, tl.sum(q * through_weights, 1), mask=queries < M)
    tl.store(d_p + sums, tl.sum(q * through_momentum, 1), mask=queries < M)
    if ACTIVATION != "none":
        slope, _ = activation_slopes(z, act_scale, ACTIVATION)
        d_q *= slope
    store_tile(d_x + at * M * IN, d_q, queries, M, block, IN)


@triton.jit(do_not_specialize=NUMBERS)
def read_states_gradient(
    d_out, x, keys, steps, write, a, p, d_states, d_gradients, scores, act_scale, M, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a layer's reads give back to the states and to D. Grid (n * N * OUT / OB).

    Args (beside those of `read_inputs_gradient`):
        d_states: out, dW above dS [n, N, 2 * IN, OUT].
        d_gradients: out, dD [n, N, C, OUT].
        scores: out, Q X^T [n, N, M, C].
    """
    part = tl.program_id(0) % (OUT // OB)
    at = (tl.program_id(0) // (OUT // OB)).to(tl.int64)
    columns = part * OB + tl.arange(0, OB)
    queries, tokens = tl.arange(0, CP), tl.arange(0, CP)
    first = at * C + C - M
    d_z = load_tile(d_out + at * M * OUT, queries, M, columns, OUT)
    d_weights, d_momentum = d_states + at * 2 * IN * OUT, d_states + at * 2 * IN * OUT + IN * OUT
    a_queries, p_queries = load_gate(a + first, queries, M)[:, None], load_gate(p + first, queries, M)[:, None]
    transposed = tl.zeros((CP, CP), tl.float32)
    for start in range(0, IN, IB):
        block = start + tl.arange(0, IB)
        q = activate(load_tile_transposed(x + at * M * IN, queries, M, block, IN), act_scale, ACTIVATION)
        transposed += dot(load_tile(keys + at * C * IN, tokens, C, block, IN), q, PRECISION)
        store_state(d_weights, dot(q, a_queries * d_z, PRECISION), block, columns, OUT)
        store_state(d_momentum, dot(q, p_queries * d_z, PRECISION), block, columns, OUT)
    if part == 0:
        store_square(scores + at * M * C, transposed, tokens, C, queries, M, 1, C)
    transposed *= read_coefficients_transposed(write, steps, at, queries, M, tokens, C)
    store_tile(d_gradients + at * C * OUT, -dot(transposed, d_z, PRECISION), tokens, C, columns, OUT)
