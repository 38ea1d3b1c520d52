"""What the benchmarks of the neural memory give it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def inputs_of(
    batch: int, length: int, heads: int, head_dim: int, depth: int, expansion: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v [B, T, H, D] of unit norm, alpha, eta, theta [B, T, H] as a model starts with, and its W_0; all with
    gradients.
    """
    torch.manual_seed(0)
    dims = [head_dim, *[head_dim * expansion] * (depth - 1), head_dim]
    weights = [torch.randn(heads, i, o, device=device) for i, o in zip(dims, dims[1:], strict=False)]
    weights[-1].zero_()
    shape = (batch, length, heads)
    tokens = [normalize(torch.randn(*shape, head_dim, device=device), dim=-1) for _ in range(3)]
    gates = [torch.full(shape, value, device=device) for value in (0.005, 0.9, 0.012)]
    inputs = [*(x.to(dtype) for x in tokens), *gates]
    return [x.requires_grad_() for x in inputs], [w.to(dtype).requires_grad_() for w in weights]
