"""Sizes of tiles and precision of products for a launch of the memory's kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The tensor cores' products have at least 16 terms, and larger tiles than 128 tokens do not fit the registers.
MIN_TILE, MAX_TOKENS, MAX_DIM = 16, 128, 128
MAX_BLOCK = 64


def padded(num_tokens: int) -> int:
    """Tokens in a tile."""
    return max(MIN_TILE, triton.next_power_of_2(num_tokens))


def block_of(width: int) -> int:
    """Columns of a block of a layer's width; it divides the width."""
    return next(size for size in (MAX_BLOCK, 32, MIN_TILE) if width % size == 0)


def precision_of(tokens: Tensor) -> str:
    """How the kernels round what they multiply: bf16 as bf16, fp32 as PyTorch's own products do."""
    if INTERPRETED:
        return "ieee"  # the interpreter's bf16 is wrong and it knows no tf32
    if tokens.dtype == torch.bfloat16:
        return "bf16"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class Tiles:
    """Constants of a group's kernels."""

    tokens: int  # CP, the chunk's tokens, padded
    queries: int  # MP
    precision: str
    stored: torch.dtype  # of X and D between kernels: what their products would round them to

    @classmethod
    def of(cls, k: Tensor, num_queries: int) -> Tiles:
        """For keys [n, N, C, D]."""
        precision = precision_of(k)
        stored = torch.bfloat16 if precision == "bf16" else torch.float32
        return cls(padded(k.shape[2]), padded(num_queries), precision, stored)
