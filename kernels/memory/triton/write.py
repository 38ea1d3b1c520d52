"""Writes of a group: chunk after chunk, the inner gradients at its first weights and the state after it.

README.md of kernels/memory, sections 1 to 3; `write_group` of chunk.py is the same in PyTorch. One program runs
through the chunks of one memory. Weights and momentum are streamed from each chunk's state to the next one's, block by
block of the hidden width, so that no width is too large for the registers; all of it is in the L2 cache. So are the
chunk's own tiles, which are loaded again where holding them would take the registers of others.
A barrier stands wherever a program reads what it has written.
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
    load_state,
    load_state_transposed,
    load_tile,
    load_tile_transposed,
    store_state,
    store_tile,
)


@triton.jit
def overlap_divisor(
    inputs, scale, bound, tokens, C,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`max(1, b * sum_{j <= t} c_j |x_j . x_t|)` for each token t, of a layer's inputs x [C, WIDTH] in memory."""
    overlap = tl.zeros((CP,), tl.float32)
    for first in range(0, CP, CB):
        some = first + tl.arange(0, CB)
        products = tl.zeros((CP, CB), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = load_tile(inputs, tokens, C, columns, WIDTH)
            products += dot(x, load_tile_transposed(inputs, some, C, columns, WIDTH), PRECISION)
        products = tl.where(tokens[:, None] >= some[None, :], tl.abs(products), 0.0)
        overlap += tl.sum(products * load_gate(scale, some, C)[None, :], 1)
    return tl.maximum(bound * overlap, 1.0)


@triton.jit
def inner_error(outputs, v, L2: tl.constexpr):
    """Gradient of the inner objective with respect to the memory's output, [C, D]."""
    return 2 * (outputs - v) if L2 else -v


@triton.jit
def end_gates(write, momentum_last, a, e, p, at, tokens, C):
    """What is left at the chunk's end of each token's write, in weights and momentum [C], and of its first state."""
    write_last = load_gate(write + at * C * C + (C - 1) * C, tokens, C)
    momentum_last = load_gate(momentum_last + at * C, tokens, C)
    last = at * C + C - 1
    return write_last, momentum_last, tl.load(a + last), tl.load(e + last), tl.load(p + last)


@triton.jit
def advance(
    state, following, learned, inputs, gradients, for_weights, for_momentum, a, e, p, tokens, C, rows, columns,
    IN: tl.constexpr, OUT: tl.constexpr, INIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one layer's weights and momentum [2 * IN, OUT] at the next chunk's start.

    `inputs` is X [C, IN] in memory, `gradients` D [C, columns]; `for_weights` and `for_momentum` [C] are P and H at the
    chunk's end times the steps.
    """
    left = load_tile_transposed(inputs, tokens, C, rows, IN)
    weights = load_state(state, rows, columns, OUT)
    momentum = load_state(state + IN * OUT, rows, columns, OUT)
    new = a * weights + p * momentum
    if INIT:
        new += (1 - a) * load_state(learned, rows, columns, OUT)
    new -= dot(left, for_weights[:, None] * gradients, PRECISION)
    store_state(following, new, rows, columns, OUT)
    new = e * momentum - dot(left, for_momentum[:, None] * gradients, PRECISION)
    store_state(following + IN * OUT, new, rows, columns, OUT)


@triton.jit(do_not_specialize=NUMBERS)
def write_one_layer(
    k, v, theta, scale, write, momentum_last, a, e, p, learned, states, gradients, steps, bound,
    num_chunks, num_states, num_memories, C,
    D: tl.constexpr, OB: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    L2: tl.constexpr, INIT: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A linear memory. Grid (N * D / OB): a program has OB columns of the weights, which nothing joins to the others.

    Args:
        k, v: [n, N, C, D].
        theta, scale, momentum_last, a, e, p: [n, N, C]; scale is theta / (1 - eta).
        write: [n, N, C, C].
        learned: W_0 [N, D, D].
        states: [num_states, N, 2 * D, D], the first one given; num_states is n, or n + 1 with the state at the end.
        gradients: out, D [n, N, C, D].
        steps: out, [n, N, C], theta bounded; not written without BOUND.
    """
    memory = (tl.program_id(0) // (D // OB)).to(tl.int64)
    columns = tl.program_id(0) % (D // OB) * OB + tl.arange(0, OB)
    tokens, dims = tl.arange(0, CP), tl.arange(0, D)
    for chunk in range(num_chunks):
        at = chunk * num_memories + memory
        x = load_tile(k + at * C * D, tokens, C, dims, D)
        step = load_gate(theta + at * C, tokens, C)
        if BOUND:
            step /= overlap_divisor(k + at * C * D, scale + at * C, bound, tokens, C, D, OB, CP, CB, PRECISION)
            tl.store(steps + at * C + tokens, step, mask=tokens < C)
        state = states + at * 2 * D * D
        outputs = dot(x, load_state(state, dims, columns, D), PRECISION)
        gradient = inner_error(outputs, load_tile(v + at * C * D, tokens, C, columns, D), L2)
        store_tile(gradients + at * C * D, gradient, tokens, C, columns, D)
        if chunk + 1 < num_states:
            last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
            following = states + ((chunk + 1) * num_memories + memory) * 2 * D * D
            advance(
                state, following, learned + memory * D * D, k + at * C * D, gradient, last * step, momentum * step,
                a_end, e_end, p_end, tokens, C, dims, columns, D, D, INIT, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def hidden_layer(
    k, first, second, hidden, outputs, act_scale, tokens, C,
    D: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The memory at tokens k [C, D]; also stores the hidden layer before (`outputs`) and after its activation."""
    dims = tl.arange(0, D)
    result = tl.zeros((CP, D), tl.float32)
    for start in range(0, H, HB):
        block = start + tl.arange(0, HB)
        z = dot(load_tile(k, tokens, C, dims, D), load_state(first, dims, block, H), PRECISION)
        store_tile(outputs, z, tokens, C, block, H)
        z = activate(z, act_scale, ACTIVATION)
        store_tile(hidden, z, tokens, C, block, H)
        result += dot(z, load_state(second, block, dims, D), PRECISION)
    return result


@triton.jit(do_not_specialize=NUMBERS)
def write_two_layers(
    k, v, theta, scale, write, momentum_last, a, e, p, learned1, learned2, states1, states2,
    hidden, outputs, pulled, gradients1, gradients2, steps1, steps2, bound, act_scale,
    num_chunks, num_states, num_memories, C,
    D: tl.constexpr, H: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    ACTIVATION: tl.constexpr, L2: tl.constexpr, INIT: tl.constexpr, BOUND: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A memory with one hidden layer of width H. Grid (N).

    Args (beside those of `write_one_layer`):
        learned1, learned2: W_0 [N, D, H] and [N, H, D].
        states1, states2: [num_states, N, 2 * D, H] and [num_states, N, 2 * H, D].
        hidden, gradients1: out, X_2 and D_1 [n, N, C, H]; gradients2: out, D_2 [n, N, C, D].
        outputs, pulled: out, the hidden layer before its activation, and the inner gradient after it, [n, N, C, H];
            without KEEP one chunk's for each memory, [N, C, H], and `pulled` is not written.
        steps1, steps2: out, [n, N, C]; not written without BOUND.
    """
    memory = tl.program_id(0).to(tl.int64)
    tokens, dims = tl.arange(0, CP), tl.arange(0, D)
    for chunk in range(num_chunks):
        at = chunk * num_memories + memory
        first, second = states1 + at * 2 * D * H, states2 + at * 2 * H * D
        after, before = hidden + at * C * H, outputs + (at if KEEP else memory) * C * H
        result = hidden_layer(
            k + at * C * D, first, second, after, before, act_scale, tokens, C, D, H, HB, CP, ACTIVATION, PRECISION
        )
        result = inner_error(result, load_tile(v + at * C * D, tokens, C, dims, D), L2)
        store_tile(gradients2 + at * C * D, result, tokens, C, dims, D)
        tl.debug_barrier()
        step1 = load_gate(theta + at * C, tokens, C)
        step2 = step1
        if BOUND:
            c = scale + at * C
            step1 /= overlap_divisor(k + at * C * D, c, bound, tokens, C, D, DB, CP, CB, PRECISION)
            step2 /= overlap_divisor(after, c, bound, tokens, C, H, HB, CP, CB, PRECISION)
            tl.store(steps1 + at * C + tokens, step1, mask=tokens < C)
            tl.store(steps2 + at * C + tokens, step2, mask=tokens < C)
        last, momentum, a_end, e_end, p_end = end_gates(write, momentum_last, a, e, p, at, tokens, C)
        following = ((chunk + 1) * num_memories + memory) * 2 * D * H
        for start in range(0, H, HB):
            block = start + tl.arange(0, HB)
            gradient2 = load_tile(gradients2 + at * C * D, tokens, C, dims, D)
            pull = dot(gradient2, load_state_transposed(second, block, dims, D), PRECISION)
            slope, _ = activation_slopes(load_tile(before, tokens, C, block, H), act_scale, ACTIVATION)
            gradient1 = slope * pull
            store_tile(gradients1 + at * C * H, gradient1, tokens, C, block, H)
            if KEEP:
                store_tile(pulled + at * C * H, pull, tokens, C, block, H)
            if chunk + 1 < num_states:
                advance(
                    first, states1 + following, learned1 + memory * D * H, k + at * C * D, gradient1, last * step1,
                    momentum * step1, a_end, e_end, p_end, tokens, C, dims, block, D, H, INIT, PRECISION,
                )  # fmt: skip
                advance(
                    second, states2 + following, learned2 + memory * H * D, after, gradient2, last * step2,
                    momentum * step2, a_end, e_end, p_end, tokens, C, block, dims, H, D, INIT, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()
