"""What the memory's kernels share: tiles in and out of row-major matrices, products, activations.

Tiles are fp32 between load and store, whatever the tensors are, and rows past a matrix's end are 0. No tile is
transposed once it is in registers, where Triton's compiler for Hopper has miscompiled products: a transposed operand is
loaded so, or the product that gives it is taken the other way around.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Run-time numbers of the kernels: where one is 1 or a multiple of 16 Triton would compile other code, which no
# self-test has seen.
NUMBERS = ["num_chunks", "num_states", "num_memories", "M", "C"]


@triton.jit
def load_tile(matrix, rows, num_rows, columns, WIDTH: tl.constexpr):
    """Tile [rows, columns] of a row-major matrix [num_rows, WIDTH]."""
    at = rows[:, None] * WIDTH + columns[None, :]
    return tl.load(matrix + at, mask=(rows < num_rows)[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_tile_transposed(matrix, rows, num_rows, columns, WIDTH: tl.constexpr):
    """The transpose of what `load_tile` gives, [columns, rows]."""
    at = columns[:, None] + rows[None, :] * WIDTH
    return tl.load(matrix + at, mask=(rows < num_rows)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(matrix, tile, rows, num_rows, columns, WIDTH: tl.constexpr):
    """Writes tile [rows, columns] of a row-major matrix [num_rows, WIDTH]."""
    at = rows[:, None] * WIDTH + columns[None, :]
    tl.store(matrix + at, tile.to(matrix.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit
def load_state(matrix, rows, columns, WIDTH: tl.constexpr):
    """Tile of a matrix that has all of these rows: weights or momentum."""
    return tl.load(matrix + rows[:, None] * WIDTH + columns[None, :])


@triton.jit
def load_state_transposed(matrix, rows, columns, WIDTH: tl.constexpr):
    """The transpose of what `load_state` gives, [columns, rows]."""
    return tl.load(matrix + columns[:, None] + rows[None, :] * WIDTH)


@triton.jit
def store_state(matrix, tile, rows, columns, WIDTH: tl.constexpr):
    """Writes what `load_state` reads."""
    tl.store(matrix + rows[:, None] * WIDTH + columns[None, :], tile)


@triton.jit
def load_square(matrix, rows, num_rows, columns, num_columns, row_stride, column_stride):
    """Tile of a matrix between tokens, [num_rows, num_columns] with any strides: also its transpose."""
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(matrix + at, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def store_square(matrix, tile, rows, num_rows, columns, num_columns, row_stride, column_stride):
    """Writes what `load_square` reads."""
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(matrix + at, tile, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit
def load_gate(gate, rows, num_rows):
    """One value a token."""
    return tl.load(gate + rows, mask=rows < num_rows, other=0.0)


@triton.jit
def dot(left, right, PRECISION: tl.constexpr):
    """left @ right with fp32 sums, of operands rounded to PRECISION: "bf16", "tf32", or "ieee" for none."""
    if PRECISION == "bf16":
        product = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16))
    else:
        product = tl.dot(left, right, input_precision=PRECISION)
    return product


@triton.jit
def activate(z, scale, ACTIVATION: tl.constexpr):
    """`scale * act(z)`; z itself for ACTIVATION "none", a layer whose inputs are tokens."""
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z) * scale
    elif ACTIVATION == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476)) * scale
    return z


@triton.jit
def activation_slopes(z, scale, ACTIVATION: tl.constexpr):
    """First and second derivative of `scale * act` at z."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        slope = s * (1 - s)
        first = s + z * slope
        second = slope * (2 + z * (1 - 2 * s))
    else:
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        first = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density
        second = density * (2 - z * z)
    return first * scale, second * scale
