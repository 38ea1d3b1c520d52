"""Sizes of tiles, warps and precision of products for a launch of the memory's kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

MIN_TILE = 16  # terms of the tensor cores' products
MAX_BLOCK = 32  # with 64 the registers of most kernels don't suffice
MAX_TOKENS = 64
ALIGNMENT = 16  # bytes; Triton compiles other code for pointers without it


def padded(num_tokens: int) -> int:
    """Tokens in a tile."""
    return max(MIN_TILE, triton.next_power_of_2(num_tokens))


def block_of(width: int) -> int:
    """Columns in a block of a layer's width, which it divides."""
    return next(size for size in (MAX_BLOCK, MIN_TILE) if width % size == 0)


def precision_of(dtype: torch.dtype) -> str:
    """How the kernels round what they multiply: bf16 as bf16, fp32 as PyTorch's own products do."""
    if INTERPRETED:
        return "ieee"  # the interpreter is wrong in bf16, and has no tf32
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def packed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without gaps, as the kernels index, and aligned, as they are compiled for."""
    tensors = [x.contiguous() for x in tensors]
    return [x.clone() if x.data_ptr() % ALIGNMENT else x for x in tensors]


@dataclass(frozen=True)
class Tiles:
    """What the launches of a group have in common."""

    tokens: int  # CP: a whole chunk's tokens, padded; also for queries, and in a chunk that is open
    precision: str
    num_warps: int

    @classmethod
    def of(cls, dtype: torch.dtype, chunk_size: int, dim: int) -> Tiles:
        """For tokens of a dtype and a head's width. An open chunk has a whole one's kernels: few are compiled, and all
        self-tested.
        """
        tokens = padded(chunk_size)
        # A tile of 64 x 64 fp32 is 16 registers of a thread with 8 warps, of which a kernel needs several.
        return cls(tokens, precision_of(dtype), 8 if tokens >= 64 or tokens * dim >= 64 * 64 else 4)

    @property
    def some_tokens(self) -> int:
        """CB: a part of the chunk's tokens, where a kernel has several tiles between tokens."""
        return min(self.tokens, MAX_TOKENS)

    @property
    def constants(self) -> dict[str, object]:
        """What all kernels are compiled with."""
        return {"CP": self.tokens, "PRECISION": self.precision, "num_warps": self.num_warps, "num_stages": 1}

    @property
    def stored(self) -> torch.dtype:
        """Of X and D between kernels, which are only multiplied there."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32
