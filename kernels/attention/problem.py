"""What the choice of a backend depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kernels.attention.inputs import AttentionInputs

FEW = 128
"""Up to so many queries a row, a kernel that computes them by blocks has but one block."""


@dataclass(frozen=True)
class Problem:
    """A call of `attention`, but for its lengths and values."""

    device: torch.device
    dtype: torch.dtype | None
    """Of all tensors; None when they differ."""
    num_heads: int
    head_dim: int
    window: int | None
    """None when every query sees all tokens before it."""
    has_prefix: bool
    has_context: bool
    bound: Literal["none", "row", "query"]
    """Whether some keys are hidden: from all queries of a row (it was reset), or from each query (documents)."""
    has_cache: bool
    rows: Literal["one", "many"]
    queries: Literal["one", "few", "many"]
    """Of a row: one when decoding, few up to `FEW`."""
    needs_gradient: bool

    @classmethod
    def of(cls, inputs: AttentionInputs) -> Problem:
        """For the arguments of a call."""
        tensors = inputs.tensors()
        length = inputs.q.shape[2]
        total = inputs.offset + length
        bound = "none" if inputs.first_visible is None else "query" if inputs.has_documents else "row"
        return cls(
            device=inputs.q.device,
            dtype=inputs.q.dtype if all(x.dtype == inputs.q.dtype for x in tensors) else None,
            num_heads=inputs.q.shape[1],
            head_dim=inputs.q.shape[-1],
            window=None if inputs.window == total else inputs.window,
            has_prefix=inputs.prefix is not None,
            has_context=len(inputs.streams) > 1,
            bound=bound,
            has_cache=inputs.offset > 0,
            rows="one" if inputs.q.shape[0] == 1 else "many",
            queries="one" if length == 1 else "few" if length <= FEW else "many",
            needs_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        )
