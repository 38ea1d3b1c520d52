"""Products of gates over the tokens of a chunk, as lower-triangular matrices (A and H of README.md, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _DecayMatrix(torch.autograd.Function):
    """`A[t, i] = prod_{j=i+1..t} b_j` for i <= t, 0 above the diagonal.

    By products, not by differences of logarithms: exact when a gate is exactly 0, and without the cancellation that
    long sums of logarithms suffer in fp32. The backward has no division either, so it is exact at 0 too.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate: Tensor) -> Tensor:
        size = gate.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
        factors = torch.where(below, gate.unsqueeze(-1), gate.new_ones(()))
        matrix = factors.cumprod(dim=-2).tril()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        # dL/db_j = sum over t >= j > i of dA[t, i] A[t, j] A[j-1, i]: one matmul, then a product with A shifted down.
        (matrix,) = ctx.saved_tensors
        through = matrix.mT @ grad.tril()
        grad_gate = torch.zeros_like(matrix[..., 0])
        grad_gate[..., 1:] = (through[..., 1:, :] * matrix[..., :-1, :]).sum(dim=-1)
        return grad_gate


def decay_matrix(gate: Tensor) -> Tensor:
    """Products of `gate` between two tokens of a chunk.

    Args:
        gate: [..., C], values in [0, 1], 0 and 1 included.

    Returns:
        [..., C, C]: entry (t, i) is the product of gate[i+1..t], 1 on the diagonal, 0 above it.
    """
    return _DecayMatrix.apply(gate)
