"""Inputs shared by the tests of the neural memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

DIM, HEADS = 4, 2
GATES = ("alpha", "eta", "theta")


def make_inputs(num_tokens: int, *, rows: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, alpha, eta, theta for DIM and HEADS; unit queries and keys, as the model gives them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, num_tokens, HEADS)
    q, k, v = (torch.randn(*shape, DIM, generator=generator, dtype=dtype) for _ in range(3))
    alpha, eta, theta = (torch.rand(shape, generator=generator, dtype=dtype) for _ in range(3))
    return [normalize(q, dim=-1), normalize(k, dim=-1), v, 0.3 * alpha, eta, 0.2 * theta]


def make_weights(depth: int, *, width: int = 5, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """W_0 of a memory of the given depth, for HEADS heads of DIM."""
    generator = torch.Generator().manual_seed(seed)
    dims = [DIM, *[width] * (depth - 1), DIM]
    return [
        torch.randn(HEADS, d_in, d_out, generator=generator, dtype=dtype) / d_in**0.5
        for d_in, d_out in zip(dims, dims[1:], strict=False)
    ]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that take gradients."""
    return [x.clone().requires_grad_() for x in tensors]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-30))
