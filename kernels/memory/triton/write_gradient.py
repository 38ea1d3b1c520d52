"""Gradient of a group's writes, from the last chunk to the first.

README.md of kernels/memory, section 4.2; `_end_gradients` and `_inner_gradients` of chunk_gradient.py are the same in
PyTorch, but for what no earlier chunk waits for: the gates, the steps, the first layer's step bound and W_0 follow from
what these kernels store, all chunks at once. One program runs through the chunks of one memory and streams the states'
gradients, as the writes stream the states. A barrier stands wherever a program reads what it has written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import (
    activate,
    activation_slopes,
    dot,
    load_gate,
    load_square,
    load_state,
    load_tile,
    store_state,
    store_tile,
)
from kernels.memory.triton.write import end_gates


@triton.jit
def add_state_gradient(
    d_state, d_weights, d_momentum, increment, a, e, p, rows, columns, IN: tl.constexpr, OUT: tl.constexpr
):
    """dW += a_C dW' + increment and dS += p_C dW' + e_C dS', for a tile of one layer's state [2 * IN, OUT]."""
    total = load_state(d_state, rows, columns, OUT) + a * d_weights + increment
    store_state(d_state, total, rows, columns, OUT)
    total = load_state(d_state + IN * OUT, rows, columns, OUT) + p * d_weights + e * d_momentum
    store_state(d_state + IN * OUT, total, rows, columns, OUT)


@triton.jit
def back_through_end(x, gradient, d_weights, d_momentum, for_weights, for_momentum, PRECISION: tl.constexpr):
    """A layer's products with the gradient of the chunk's end: X dW' and X dS', and what reaches X by them.

    `x` [C, rows] and `gradient` [C, columns] are tiles of X and D, `for_weights` and `for_momentum` [C, 1] as in
    `write.advance`.
    """
    d_x = dot(for_weights * gradient, tl.trans(d_weights), PRECISION)
    d_x += dot(for_momentum * gradient, tl.trans(d_momentum), PRECISION)
    return dot(x, d_weights, PRECISION), dot(x, d_momentum, PRECISION), -d_x


@triton.jit
def write_one_layer_gradient(
    k, gradients, steps, write, momentum_last, a, e, p, states, d_states, d_keys, d_gradients, d_v,
    weights_overlap, momentum_overlap, num_chunks, num_memories, C,
    D: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A linear memory. Grid (N).

    Args:
        k, gradients, steps, write, momentum_last, a, e, p: as `write.write_one_layer` has them.
        states: [n, N, 2 * D, D].
        d_states: in and out, [n + 1, N, 2 * D, D]: what the reads of each chunk gave, and the end's gradient.
        d_keys: in and out, dX [n, N, C, D]: what the reads gave.
        d_gradients: dD [n, N, C, D]: what the reads gave.
        d_v: out, [n, N, C, D].
        weights_overlap, momentum_overlap: out, [n, N, C], the sums over D * (X dW') and D * (X dS').
    """
    memory = tl.program_id(0)
    tokens, dims = tl.arange(0, CP), tl.arange(0, D)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        at = (chunk * num_memories + memory).to(tl.int64)
        d_end = d_states + ((chunk + 1) * num_memories + memory).to(tl.int64) * 2 * D * D
        x = load_tile(k + at * C * D, tokens, C, dims, D)
        step = load_gate(steps + at * C, tokens, C)
        last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
        for_weights, for_momentum = (last * step)[:, None], (momentum * step)[:, None]
        d_x = load_tile(d_keys + at * C * D, tokens, C, dims, D)
        overlap = tl.zeros((CP,), tl.float32)
        overlap_momentum = tl.zeros((CP,), tl.float32)
        for start in range(0, D, OB):
            columns = start + tl.arange(0, OB)
            d_weights = load_state(d_end, dims, columns, D)
            d_momentum = load_state(d_end + D * D, dims, columns, D)
            gradient = load_tile(gradients + at * C * D, tokens, C, columns, D)
            by_weights, by_momentum, into_x = back_through_end(
                x, gradient, d_weights, d_momentum, for_weights, for_momentum, PRECISION
            )
            d_x += into_x
            overlap += tl.sum(gradient * by_weights, 1)
            overlap_momentum += tl.sum(gradient * by_momentum, 1)
            d_gradient = load_tile(d_gradients + at * C * D, tokens, C, columns, D)
            d_gradient -= for_weights * by_weights + for_momentum * by_momentum
            store_tile(d_v + at * C * D, -2 * d_gradient if L2 else -d_gradient, tokens, C, columns, D)
            increment = tl.zeros((D, OB), tl.float32)
            if L2:
                d_output = 2 * d_gradient
                weights = load_state(states + at * 2 * D * D, dims, columns, D)
                d_x += dot(d_output, tl.trans(weights), PRECISION)
                increment = dot(tl.trans(x), d_output, PRECISION)
            add_state_gradient(
                d_states + at * 2 * D * D, d_weights, d_momentum, increment, a_end, e_end, p_end, dims, columns, D, D
            )
        store_tile(d_keys + at * C * D, d_x, tokens, C, dims, D)
        tl.store(weights_overlap + at * C + tokens, overlap, mask=tokens < C)
        tl.store(momentum_overlap + at * C + tokens, overlap_momentum, mask=tokens < C)
        tl.debug_barrier()


@triton.jit
def symmetric_bound_gradient(signed, slope, d_steps, tokens, C):
    """Gradient of the products of a layer's inputs X X^T through its step bound, [C, C].

    `signed` [C, C] in memory is c_j times the sign of x_j . x_t, for j <= t; `slope` [C] the derivative of the step.
    """
    d_overlap = load_gate(slope, tokens, C) * d_steps
    d_products = d_overlap[:, None] * load_square(signed, tokens, C, tokens, C, C, 1)
    return d_products + d_overlap[None, :] * load_square(signed, tokens, C, tokens, C, 1, C)


@triton.jit
def up_the_layers(
    x, gradients, hidden, outputs, pulled, d_gradients, weights, d_end1, d_end2, d_pulled, d_outputs,
    for_weights, for_momentum, d_x, act_scale, tokens, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """First half of a chunk: the ends of both layers, and D_1 = act'(X W_1) * Y, Y = D_2 W_2^T.

    Stores the gradients of Y (`d_pulled`) and, as far as they come by D_1, of X W_1 (`d_outputs`), both [C, H].

    Returns:
        d_x [C, D] with what the first layer's end gives; the sums over D_1 * (X dW') and D_1 * (X dS') [C]; what
        reaches D_2 by Y; X_2 dW_2' and X_2 dS_2' [C, D].
    """
    dims = tl.arange(0, D)
    overlap = tl.zeros((CP,), tl.float32)
    overlap_momentum = tl.zeros((CP,), tl.float32)
    d_gradient2 = tl.zeros((CP, D), tl.float32)
    by_weights2 = tl.zeros((CP, D), tl.float32)
    by_momentum2 = tl.zeros((CP, D), tl.float32)
    for start in range(0, H, HB):
        block = start + tl.arange(0, HB)
        gradient = load_tile(gradients, tokens, C, block, H)
        by_weights, by_momentum, into_x = back_through_end(
            x, gradient, load_state(d_end1, dims, block, H), load_state(d_end1 + D * H, dims, block, H), for_weights,
            for_momentum, PRECISION,
        )  # fmt: skip
        d_x += into_x
        overlap += tl.sum(gradient * by_weights, 1)
        overlap_momentum += tl.sum(gradient * by_momentum, 1)
        d_gradient = load_tile(d_gradients, tokens, C, block, H) - for_weights * by_weights - for_momentum * by_momentum
        first, second = activation_slopes(load_tile(outputs, tokens, C, block, H), act_scale, ACTIVATION)
        d_output = d_gradient * second * load_tile(pulled, tokens, C, block, H)
        store_tile(d_outputs, d_output, tokens, C, block, H)
        d_pull = d_gradient * first
        store_tile(d_pulled, d_pull, tokens, C, block, H)
        d_gradient2 += dot(d_pull, load_state(weights, block, dims, D), PRECISION)
        x2 = load_tile(hidden, tokens, C, block, H)
        by_weights2 += dot(x2, load_state(d_end2, block, dims, D), PRECISION)
        by_momentum2 += dot(x2, load_state(d_end2 + H * D, block, dims, D), PRECISION)
    return d_x, overlap, overlap_momentum, d_gradient2, by_weights2, by_momentum2


@triton.jit
def down_the_layers(
    k, hidden, outputs, d_hidden, weights1, weights2, d_end1, d_end2, d_state1, d_state2, d_pulled, d_outputs,
    gradient2, d_result, d_products, for_weights, for_momentum, a, e, p, d_x, act_scale, tokens, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, ACTIVATION: tl.constexpr,
    L2: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second half of a chunk: X_2 = act(X W_1), its end and its step bound, and both layers' states.

    Args:
        gradient2: D_2 [C, D]; d_result: gradient of X_2 W_2 [C, D], by which D_2 depends on it.
        d_products: gradient of X_2 X_2^T [C, C].

    Returns:
        d_x [C, D] with what comes by X W_1.
    """
    dims = tl.arange(0, D)
    for start in range(0, H, HB):
        block = start + tl.arange(0, HB)
        d_weights = load_state(d_end2, block, dims, D)
        d_momentum = load_state(d_end2 + H * D, block, dims, D)
        d_x2 = load_tile(d_hidden, tokens, C, block, H)
        d_x2 -= dot(for_weights * gradient2, tl.trans(d_weights), PRECISION)
        d_x2 -= dot(for_momentum * gradient2, tl.trans(d_momentum), PRECISION)
        increment = dot(tl.trans(load_tile(d_pulled, tokens, C, block, H)), gradient2, PRECISION)
        x2 = load_tile(hidden, tokens, C, block, H)
        if BOUND:
            d_x2 += dot(d_products, x2, PRECISION)
        if L2:
            d_x2 += dot(d_result, tl.trans(load_state(weights2, block, dims, D)), PRECISION)
            increment += dot(tl.trans(x2), d_result, PRECISION)
        add_state_gradient(d_state2, d_weights, d_momentum, increment, a, e, p, block, dims, H, D)
        slope, _ = activation_slopes(load_tile(outputs, tokens, C, block, H), act_scale, ACTIVATION)
        d_output = load_tile(d_outputs, tokens, C, block, H) + slope * d_x2
        d_x += dot(d_output, tl.trans(load_state(weights1, dims, block, H)), PRECISION)
        increment = dot(tl.trans(load_tile(k, tokens, C, dims, D)), d_output, PRECISION)
        d_weights = load_state(d_end1, dims, block, H)
        d_momentum = load_state(d_end1 + D * H, dims, block, H)
        add_state_gradient(d_state1, d_weights, d_momentum, increment, a, e, p, dims, block, D, H)
    return d_x


@triton.jit
def write_two_layers_gradient(
    k, hidden, outputs, pulled, gradients1, gradients2, steps1, steps2, write, momentum_last, a, e, p,
    states1, states2, signed, slope, d_states1, d_states2, d_keys, d_hidden, d_gradients1, d_gradients2, d_steps2,
    d_v, weights_overlap1, weights_overlap2, momentum_overlap1, momentum_overlap2, d_pulled, d_outputs, act_scale,
    num_chunks, num_memories, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, ACTIVATION: tl.constexpr,
    L2: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory with one hidden layer of width H. Grid (N).

    Args (beside those of `write_one_layer_gradient`):
        hidden, outputs, pulled, gradients1, gradients2, steps1, steps2: as `write.write_two_layers` wrote them.
        signed, slope: of the second layer's step bound, [n, N, C, C] and [n, N, C].
        d_hidden, d_gradients1, d_gradients2, d_steps2: dX_2, dD_1, dD_2 and the second layer's d theta, as far as the
            reads gave them, [n, N, C, ...].
        d_pulled, d_outputs: space for one chunk of each memory, [N, C, H].
    """
    memory = tl.program_id(0)
    tokens, dims = tl.arange(0, CP), tl.arange(0, D)
    d_pulled += memory.to(tl.int64) * C * H
    d_outputs += memory.to(tl.int64) * C * H
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        at = (chunk * num_memories + memory).to(tl.int64)
        end = ((chunk + 1) * num_memories + memory).to(tl.int64) * 2 * D * H
        state, small, wide = at * 2 * D * H, at * C * D, at * C * H
        last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
        step = load_gate(steps1 + at * C, tokens, C)
        d_x = load_tile(d_keys + small, tokens, C, dims, D)
        d_x, overlap, overlap_momentum, d_gradient2, by_weights2, by_momentum2 = up_the_layers(
            load_tile(k + small, tokens, C, dims, D), gradients1 + wide, hidden + wide, outputs + wide, pulled + wide,
            d_gradients1 + wide, states2 + state, d_states1 + end, d_states2 + end, d_pulled, d_outputs,
            (last * step)[:, None], (momentum * step)[:, None], d_x, act_scale, tokens, C,
            D, H, HB, CP, ACTIVATION, PRECISION,
        )  # fmt: skip
        tl.store(weights_overlap1 + at * C + tokens, overlap, mask=tokens < C)
        tl.store(momentum_overlap1 + at * C + tokens, overlap_momentum, mask=tokens < C)
        gradient2 = load_tile(gradients2 + small, tokens, C, dims, D)
        overlap, overlap_momentum = tl.sum(gradient2 * by_weights2, 1), tl.sum(gradient2 * by_momentum2, 1)
        tl.store(weights_overlap2 + at * C + tokens, overlap, mask=tokens < C)
        tl.store(momentum_overlap2 + at * C + tokens, overlap_momentum, mask=tokens < C)
        step = load_gate(steps2 + at * C, tokens, C)
        for_weights, for_momentum = (last * step)[:, None], (momentum * step)[:, None]
        d_gradient2 += load_tile(d_gradients2 + small, tokens, C, dims, D)
        d_gradient2 -= for_weights * by_weights2 + for_momentum * by_momentum2
        d_result = 2 * d_gradient2 if L2 else d_gradient2
        store_tile(d_v + small, -d_result, tokens, C, dims, D)
        d_products = tl.zeros((CP, CP), tl.float32)
        if BOUND:
            d_step = load_gate(d_steps2 + at * C, tokens, C) - overlap * last - overlap_momentum * momentum
            d_products = symmetric_bound_gradient(signed + at * C * C, slope + at * C, d_step, tokens, C)
        tl.debug_barrier()
        d_x = down_the_layers(
            k + small, hidden + wide, outputs + wide, d_hidden + wide, states1 + state, states2 + state,
            d_states1 + end, d_states2 + end, d_states1 + state, d_states2 + state, d_pulled, d_outputs,
            gradient2, d_result, d_products, for_weights, for_momentum, a_end, e_end, p_end, d_x, act_scale, tokens, C,
            D, H, HB, ACTIVATION, L2, BOUND, PRECISION,
        )  # fmt: skip
        store_tile(d_keys + small, d_x, tokens, C, dims, D)
        tl.debug_barrier()


@triton.jit
def end_products(
    d_out, x, a, learned, states, d_states, d_learned, d_ends, act_scale, num_chunks, num_memories, M, C,
    IN: tl.constexpr, OUT: tl.constexpr, IB: tl.constexpr, OB: tl.constexpr, MP: tl.constexpr,
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
    memory, part = tl.program_id(0) // num_parts, tl.program_id(0) % num_parts
    rows, columns = part // (OUT // OB) * IB + tl.arange(0, IB), part % (OUT // OB) * OB + tl.arange(0, OB)
    queries = tl.arange(0, MP)
    learned += memory.to(tl.int64) * IN * OUT
    total = tl.zeros((IB, OB), tl.float32)
    for chunk in range(num_chunks):
        at = (chunk * num_memories + memory).to(tl.int64)
        end = d_states + ((chunk + 1) * num_memories + memory).to(tl.int64) * 2 * IN * OUT
        d_weights, d_momentum = load_state(end, rows, columns, OUT), load_state(end + IN * OUT, rows, columns, OUT)
        weights = load_state(states + at * 2 * IN * OUT, rows, columns, OUT)
        momentum = load_state(states + at * 2 * IN * OUT + IN * OUT, rows, columns, OUT)
        if INIT:
            weights -= load_state(learned, rows, columns, OUT)
            kept = load_gate(a + at * C + C - M, queries, M)[:, None]
            d_z = (1 - kept) * load_tile(d_out + at * M * OUT, queries, M, columns, OUT)
            q = activate(load_tile(x + at * M * IN, queries, M, rows, IN), act_scale, ACTIVATION)
            total += (1 - tl.load(a + at * C + C - 1)) * d_weights + dot(tl.trans(q), d_z, PRECISION)
        sums = d_ends + (part * num_chunks + chunk) * num_memories + memory
        stride = num_parts * num_chunks * num_memories
        tl.store(sums, tl.sum(d_weights * weights))
        tl.store(sums + stride, tl.sum(d_weights * momentum))
        tl.store(sums + 2 * stride, tl.sum(d_momentum * momentum))
    if INIT:
        store_state(d_learned + memory.to(tl.int64) * IN * OUT, total, rows, columns, OUT)
