"""What the choice of a backend depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.memory.options import MemoryOptions


@dataclass(frozen=True)
class Problem:
    """A call of `neural_memory`, but for its lengths and values."""

    device: torch.device
    dtype: torch.dtype | None
    """Of q, k and v; None when they differ."""
    dims: tuple[int, ...]
    """Widths from layer to layer: D, hidden ones, D."""
    options: MemoryOptions
    matmul_precision: str
    """PyTorch's `torch.backends.cuda.matmul.fp32_precision`."""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], options: MemoryOptions) -> Problem:
        """For the arguments of a call."""
        dtype = q.dtype if q.dtype == k.dtype == v.dtype else None
        dims = (q.shape[-1], *(w.shape[2] for w in weights))
        return cls(q.device, dtype, dims, options, torch.backends.cuda.matmul.fp32_precision)
