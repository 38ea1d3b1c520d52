"""Gradient of a group's writes, from the last chunk to the first.

README.md of kernels/memory, section 4.2; `_end_gradients` and `_inner_gradients` of chunk_gradient.py are the same in
PyTorch, but for what no earlier chunk waits for: the gates, the steps, keys and W_0 follow from what these kernels
store, all chunks at once (end_gradient.py). One program runs through the chunks of one memory and streams the states'
gradients, as the writes stream the states. A barrier stands wherever a program reads what it has written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory.triton.tiles import (
    NUMBERS,
    activation_slopes,
    dot,
    load_gate,
    load_square,
    load_state,
    load_state_transposed,
    load_tile,
    load_tile_transposed,
    store_state,
    store_tile,
)
from kernels.memory.triton.write import end_gates


@triton.jit
def add_state_gradient(d_state, d_end, increment, a, e, p, rows, columns, IN: tl.constexpr, OUT: tl.constexpr):
    """dW += a_C dW' + increment and dS += p_C dW' + e_C dS', for a tile of one layer's state [2 * IN, OUT]."""
    d_weights = load_state(d_end, rows, columns, OUT)
    d_momentum = load_state(d_end + IN * OUT, rows, columns, OUT)
    total = load_state(d_state, rows, columns, OUT) + a * d_weights + increment
    store_state(d_state, total, rows, columns, OUT)
    total = load_state(d_state + IN * OUT, rows, columns, OUT) + p * d_weights + e * d_momentum
    store_state(d_state + IN * OUT, total, rows, columns, OUT)


@triton.jit
def by_end_gradient(
    inputs, d_end, tokens, C, rows, columns, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of a layer's X dW' and X dS' as far as `rows` of the state go; `d_end` is dW' above dS' [2 * IN, OUT]."""
    x = load_tile(inputs, tokens, C, rows, IN)
    by_weights = dot(x, load_state(d_end, rows, columns, OUT), PRECISION)
    return by_weights, dot(x, load_state(d_end + IN * OUT, rows, columns, OUT), PRECISION)


@triton.jit(do_not_specialize=NUMBERS)
def write_one_layer_gradient(
    k, gradients, steps, write, momentum_last, a, e, p, d_states, d_gradients, d_v, weights_overlap, momentum_overlap,
    num_chunks, num_memories, C,
    D: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A linear memory. Grid (N * D / OB): a program has OB columns of the weights.

    Args:
        k, gradients, steps, write, momentum_last, a, e, p: as `write.write_one_layer` has them.
        d_states: in and out, [n + 1, N, 2 * D, D]: what the reads of each chunk gave, and the end's gradient.
        d_gradients: dD [n, N, C, D]: what the reads gave.
        d_v: out, [n, N, C, D].
        weights_overlap, momentum_overlap: out, [D / OB, n, N, C], the sums over D * (X dW') and D * (X dS'), to be
            summed over the first dimension.
    """
    memory, part = (tl.program_id(0) // (D // OB)).to(tl.int64), tl.program_id(0) % (D // OB)
    tokens, dims, columns = tl.arange(0, CP), tl.arange(0, D), part * OB + tl.arange(0, OB)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        at = chunk * num_memories + memory
        d_end = d_states + ((chunk + 1) * num_memories + memory) * 2 * D * D
        step = load_gate(steps + at * C, tokens, C)
        last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
        by_weights, by_momentum = by_end_gradient(k + at * C * D, d_end, tokens, C, dims, columns, D, D, PRECISION)
        gradient = load_tile(gradients + at * C * D, tokens, C, columns, D)
        sums = (part * num_chunks * num_memories + at) * C + tokens
        tl.store(weights_overlap + sums, tl.sum(gradient * by_weights, 1), mask=tokens < C)
        tl.store(momentum_overlap + sums, tl.sum(gradient * by_momentum, 1), mask=tokens < C)
        d_gradient = load_tile(d_gradients + at * C * D, tokens, C, columns, D)
        d_gradient -= (last * step)[:, None] * by_weights + (momentum * step)[:, None] * by_momentum
        store_tile(d_v + at * C * D, -2 * d_gradient if L2 else -d_gradient, tokens, C, columns, D)
        increment = tl.zeros((D, OB), tl.float32)
        if L2:
            increment = dot(load_tile_transposed(k + at * C * D, tokens, C, dims, D), 2 * d_gradient, PRECISION)
        add_state_gradient(d_states + at * 2 * D * D, d_end, increment, a_end, e_end, p_end, dims, columns, D, D)
        tl.debug_barrier()


@triton.jit
def store_bound_gradient(d_products, signed, slope, d_steps, tokens, C, CP: tl.constexpr, CB: tl.constexpr):
    """Stores half the gradient of the products of a layer's inputs X X^T through its step bound, [CP, CP].

    The other half is its transpose. `signed` [C, C] is c_j times the sign of x_j . x_t, for j <= t; `slope` [C] the
    derivative of the step.
    """
    d_overlap = load_gate(slope, tokens, C) * d_steps
    for first in range(0, CP, CB):
        some = first + tl.arange(0, CB)
        half = d_overlap[:, None] * load_square(signed, tokens, C, some, C, C, 1)
        store_state(d_products, half, tokens, some, CP)


@triton.jit
def add_through_bound(
    d_x, d_products, inputs, tokens, C, columns, WIDTH: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [C, columns] of dX, with what reaches it by both halves, of which `store_bound_gradient` stored one."""
    for first in range(0, CP, CB):
        some = first + tl.arange(0, CB)
        whole = load_state(d_products, tokens, some, CP) + load_state_transposed(d_products, some, tokens, CP)
        d_x += dot(whole, load_tile(inputs, some, C, columns, WIDTH), PRECISION)
    return d_x


@triton.jit
def up_the_layers(
    k, gradients, outputs, pulled, d_gradients, d_gradients2, weights, d_end, d_pulled, d_outputs, for_weights,
    for_momentum, act_scale, tokens, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The end of the first layer, and D_1 = act'(X W_1) * Y, Y = D_2 W_2^T.

    `for_weights` and `for_momentum` [C, 1] are P and H at the chunk's end times the steps. Stores the gradients of Y
    (`d_pulled`) and, as far as they come by D_1, of X W_1 (`d_outputs`), both [C, H], and adds what reaches D_2 by Y to
    `d_gradients2` [C, D].

    Returns:
        the sums over D_1 * (X dW') and D_1 * (X dS') [C].
    """
    dims = tl.arange(0, D)
    overlap = tl.zeros((CP,), tl.float32)
    overlap_momentum = tl.zeros((CP,), tl.float32)
    d_gradient2 = load_tile(d_gradients2, tokens, C, dims, D)
    for start in range(0, H, HB):
        block = start + tl.arange(0, HB)
        by_weights, by_momentum = by_end_gradient(k, d_end, tokens, C, dims, block, D, H, PRECISION)
        gradient = load_tile(gradients, tokens, C, block, H)
        overlap += tl.sum(gradient * by_weights, 1)
        overlap_momentum += tl.sum(gradient * by_momentum, 1)
        d_gradient = load_tile(d_gradients, tokens, C, block, H) - for_weights * by_weights - for_momentum * by_momentum
        first, second = activation_slopes(load_tile(outputs, tokens, C, block, H), act_scale, ACTIVATION)
        d_output = d_gradient * second * load_tile(pulled, tokens, C, block, H)
        store_tile(d_outputs, d_output, tokens, C, block, H)
        d_pull = d_gradient * first
        store_tile(d_pulled, d_pull, tokens, C, block, H)
        d_gradient2 += dot(d_pull, load_state(weights, block, dims, D), PRECISION)
    store_tile(d_gradients2, d_gradient2, tokens, C, dims, D)
    return overlap, overlap_momentum


@triton.jit
def end_of_second_layer(
    hidden, gradients, d_gradients, d_v, d_end, for_weights, for_momentum, tokens, C,
    D: tl.constexpr, H: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, L2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the end of the second layer adds to the gradient of D_2, of which `d_v` follows; both [C, D].

    Returns:
        the sums over D_2 * (X_2 dW') and D_2 * (X_2 dS') [C].
    """
    overlap = tl.zeros((CP,), tl.float32)
    overlap_momentum = tl.zeros((CP,), tl.float32)
    for first in range(0, D, DB):
        columns = first + tl.arange(0, DB)
        by_weights = tl.zeros((CP, DB), tl.float32)
        by_momentum = tl.zeros((CP, DB), tl.float32)
        for start in range(0, H, HB):
            block = start + tl.arange(0, HB)
            more, more_momentum = by_end_gradient(hidden, d_end, tokens, C, block, columns, H, D, PRECISION)
            by_weights += more
            by_momentum += more_momentum
        gradient = load_tile(gradients, tokens, C, columns, D)
        overlap += tl.sum(gradient * by_weights, 1)
        overlap_momentum += tl.sum(gradient * by_momentum, 1)
        d_gradient = load_tile(d_gradients, tokens, C, columns, D)
        d_gradient -= for_weights * by_weights + for_momentum * by_momentum
        store_tile(d_v, -2 * d_gradient if L2 else -d_gradient, tokens, C, columns, D)
    return overlap, overlap_momentum


@triton.jit
def down_the_layers(
    k, hidden, outputs, d_hidden, weights2, d_end1, d_end2, d_state1, d_state2, d_pulled, d_outputs,
    gradients2, d_v, d_products, for_weights, for_momentum, a, e, p, act_scale, tokens, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr, ACTIVATION: tl.constexpr,
    L2: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X_2 = act(X W_1), its end and its step bound, and both layers' states. Completes `d_outputs` [C, H].

    Args:
        gradients2: D_2 [C, D]; d_v: with L2 also minus the gradient of X_2 W_2, by which D_2 depends on it.
        d_products: of X_2 X_2^T, from `store_bound_gradient`.
    """
    dims = tl.arange(0, D)
    for start in range(0, H, HB):
        block = start + tl.arange(0, HB)
        gradient2 = load_tile(gradients2, tokens, C, dims, D)
        d_x2 = load_tile(d_hidden, tokens, C, block, H)
        d_x2 -= dot(for_weights * gradient2, load_state_transposed(d_end2, block, dims, D), PRECISION)
        d_x2 -= dot(for_momentum * gradient2, load_state_transposed(d_end2 + H * D, block, dims, D), PRECISION)
        increment = dot(load_tile_transposed(d_pulled, tokens, C, block, H), gradient2, PRECISION)
        if BOUND:
            d_x2 = add_through_bound(d_x2, d_products, hidden, tokens, C, block, H, CP, CB, PRECISION)
        if L2:
            d_result = -load_tile(d_v, tokens, C, dims, D)
            d_x2 += dot(d_result, load_state_transposed(weights2, block, dims, D), PRECISION)
            increment += dot(load_tile_transposed(hidden, tokens, C, block, H), d_result, PRECISION)
        add_state_gradient(d_state2, d_end2, increment, a, e, p, block, dims, H, D)
        slope, _ = activation_slopes(load_tile(outputs, tokens, C, block, H), act_scale, ACTIVATION)
        d_output = load_tile(d_outputs, tokens, C, block, H) + slope * d_x2
        store_tile(d_outputs, d_output, tokens, C, block, H)
        increment = dot(load_tile_transposed(k, tokens, C, dims, D), d_output, PRECISION)
        add_state_gradient(d_state1, d_end1, increment, a, e, p, dims, block, D, H)


@triton.jit(do_not_specialize=NUMBERS)
def write_two_layers_gradient(
    k, hidden, outputs, pulled, gradients1, gradients2, steps1, steps2, write, momentum_last, a, e, p,
    states2, signed, slope, d_states1, d_states2, d_hidden, d_gradients1, d_gradients2, d_steps2,
    d_v, d_outputs, weights_overlap1, weights_overlap2, momentum_overlap1, momentum_overlap2, d_pulled, d_products,
    act_scale,
    num_chunks, num_memories, C,
    D: tl.constexpr, H: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    ACTIVATION: tl.constexpr, L2: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory with one hidden layer of width H. Grid (N).

    Args (beside those of `write_one_layer_gradient`, whose overlaps are [1, n, N, C] here):
        hidden, outputs, pulled, gradients1, gradients2, steps1, steps2: as `write.write_two_layers` wrote them.
        states2: [n, N, 2 * H, D].
        signed, slope: of the second layer's step bound, [n, N, C, C] and [n, N, C].
        d_hidden, d_gradients1, d_gradients2, d_steps2: dX_2, dD_1, dD_2 and the second layer's d theta, as far as the
            reads gave them, [n, N, C, ...]; dD_2 is added to.
        d_outputs: out, gradient of X W_1 [n, N, C, H].
        d_pulled, d_products: space for one chunk of each memory, [N, C, H] and [N, CP, CP].
    """
    memory = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, CP)
    d_pulled += memory * C * H
    d_products += memory * CP * CP
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        at = chunk * num_memories + memory
        end = ((chunk + 1) * num_memories + memory) * 2 * D * H
        state, small, wide = at * 2 * D * H, at * C * D, at * C * H
        last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
        step = load_gate(steps1 + at * C, tokens, C)
        overlap, overlap_momentum = up_the_layers(
            k + small, gradients1 + wide, outputs + wide, pulled + wide, d_gradients1 + wide, d_gradients2 + small,
            states2 + state, d_states1 + end, d_pulled, d_outputs + wide, (last * step)[:, None],
            (momentum * step)[:, None], act_scale, tokens, C, D, H, HB, CP, ACTIVATION, PRECISION,
        )  # fmt: skip
        tl.store(weights_overlap1 + at * C + tokens, overlap, mask=tokens < C)
        tl.store(momentum_overlap1 + at * C + tokens, overlap_momentum, mask=tokens < C)
        tl.debug_barrier()
        step = load_gate(steps2 + at * C, tokens, C)
        for_weights, for_momentum = (last * step)[:, None], (momentum * step)[:, None]
        overlap, overlap_momentum = end_of_second_layer(
            hidden + wide, gradients2 + small, d_gradients2 + small, d_v + small, d_states2 + end, for_weights,
            for_momentum, tokens, C, D, H, DB, HB, CP, L2, PRECISION,
        )  # fmt: skip
        tl.store(weights_overlap2 + at * C + tokens, overlap, mask=tokens < C)
        tl.store(momentum_overlap2 + at * C + tokens, overlap_momentum, mask=tokens < C)
        if BOUND:
            d_step = load_gate(d_steps2 + at * C, tokens, C) - overlap * last - overlap_momentum * momentum
            store_bound_gradient(d_products, signed + at * C * C, slope + at * C, d_step, tokens, C, CP, CB)
        tl.debug_barrier()
        down_the_layers(
            k + small, hidden + wide, outputs + wide, d_hidden + wide, states2 + state, d_states1 + end,
            d_states2 + end, d_states1 + state, d_states2 + state, d_pulled, d_outputs + wide,
            gradients2 + small, d_v + small, d_products, for_weights, for_momentum, a_end, e_end, p_end, act_scale,
            tokens, C, D, H, HB, CP, CB, ACTIVATION, L2, BOUND, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
