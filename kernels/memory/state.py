"""What a neural memory carries from one piece of a sequence to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryState:
    """State of a neural memory between two calls; a value: no operation changes it in place.

    The chunk grid is counted from the state's beginning and is the same for all rows. `weights` and `momentum` are
    those at the start of the open chunk, the one that is not yet full; its tokens are kept beside them, so that a
    sequence may be cut anywhere. All tensors take part in differentiation.

    Attributes:
        weights: L tensors [B, H, d_in, d_out], fp32 (float64 when computing in float64).
        momentum: L tensors [B, H, d_in, d_out], the same dtype.
        k, v: [B, r, H, D], the r < chunk_size tokens of the open chunk, in the dtype they were given in.
        alpha, eta, theta: [B, r, H].
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor

    @classmethod
    def initial(cls, weights: Sequence[Tensor], batch_size: int, dtype: torch.dtype | None = None) -> MemoryState:
        """The state before the first token: every row at the learned `W_0`, no momentum.

        Args:
            weights: L tensors [H, d_in, d_out].
            batch_size: number of rows B.
            dtype: of the open chunk's tokens; the weights' own when None.
        """
        heads, dim = weights[0].shape[:2]
        dtype = dtype or weights[0].dtype
        start = tuple(state_dtype(w).unsqueeze(0).expand(batch_size, *w.shape) for w in weights)
        tokens = torch.empty(batch_size, 0, heads, dim, dtype=dtype, device=weights[0].device)
        gates = tokens[..., 0]
        return cls(start, tuple(torch.zeros_like(w) for w in start), tokens, tokens, gates, gates, gates)

    @property
    def num_open(self) -> int:
        """Number of tokens in the open chunk."""
        return self.k.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        """The state with `function` applied to every tensor."""
        return MemoryState(
            tuple(function(w) for w in self.weights),
            tuple(function(s) for s in self.momentum),
            *(function(x) for x in (self.k, self.v, self.alpha, self.eta, self.theta)),
        )

    def reset_rows(self, rows: Tensor, weights: Sequence[Tensor]) -> MemoryState:
        """The state with some rows back at the beginning: `W_0`, no momentum, and open tokens that change nothing.

        Args:
            rows: [B] bool, True where the row is reset.
            weights: the learned `W_0`, L tensors [H, d_in, d_out].

        A row reset inside a chunk keeps the batch's chunk grid, so its first chunk is shorter than a new sequence's.
        """

        def fill(old: Tensor, value: Tensor | float) -> Tensor:
            new = torch.as_tensor(value, dtype=old.dtype, device=old.device)
            return torch.where(rows.view(-1, *(1,) * (old.dim() - 1)), new, old)

        return MemoryState(
            tuple(fill(w, w0.unsqueeze(0)) for w, w0 in zip(self.weights, weights, strict=True)),
            tuple(fill(s, 0.0) for s in self.momentum),
            fill(self.k, 0.0),
            fill(self.v, 0.0),
            fill(self.alpha, 0.0),
            fill(self.eta, 1.0),
            fill(self.theta, 0.0),
        )


def state_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype of states and of the memory's arithmetic: fp32, or float64 when x is float64."""
    return x if x.dtype == torch.float64 else x.float()
