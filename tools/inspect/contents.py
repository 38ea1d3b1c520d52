"""What a memory's weights are like: norms, singular values, how much of their room is used, how far from their start.

A memory of depth L has L matrices a head. Of each matrix W [d_in, d_out], with singular values s_1 >= s_2 >= ...:

- norm: the Frobenius norm. momentum: that of S. distance: that of W - W_0, and divided by the norm of W_0.
- top: s_1, the largest factor by which it stretches anything.
- effective rank: exp(-sum_i p_i ln p_i) with p_i = s_i / sum_j s_j (Roy and Vetterli, "The effective rank", EUSIPCO
  2007): 1 where all is written along one direction, min(d_in, d_out) where along all alike.
- saturation: the effective rank of the change W - W_0 divided by min(d_in, d_out), the share of the matrix's directions
  that what was read has filled; nothing where nothing was written. Near 1 new writes must go over old ones. The
  activations (SiLU, GELU) have no ceiling of their own that units could be stuck at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOTHING = "–"


@dataclass(frozen=True)
class Matrix:
    """One matrix of one head."""

    layer: int
    head: int
    matrix: int
    """From 0, where keys come in."""
    singular_values: np.ndarray
    """Of W, falling."""
    changes: np.ndarray
    """The singular values of W - W_0, falling."""
    start_norm: float
    """Of W_0."""
    momentum: float
    """Norm of S."""

    @property
    def norm(self) -> float:
        """Frobenius norm of W."""
        return float(np.linalg.norm(self.singular_values))

    @property
    def distance(self) -> float:
        """Frobenius norm of W - W_0."""
        return float(np.linalg.norm(self.changes))

    @property
    def relative_distance(self) -> float | None:
        """The distance in norms of W_0; None where that is 0."""
        return self.distance / self.start_norm if self.start_norm else None

    @property
    def saturation(self) -> float | None:
        """Share of directions that are written to; None where nothing is."""
        rank = effective_rank(self.changes)
        return None if rank is None else rank / len(self.changes)

    def fields(self) -> Iterator[tuple[str, float | int | None]]:
        """All but the singular values, for JSON."""
        yield from (("layer", self.layer), ("head", self.head), ("matrix", self.matrix))
        yield from (("norm", self.norm), ("top", float(self.singular_values[0])))
        yield "effective_rank", effective_rank(self.singular_values)
        yield from (("momentum", self.momentum), ("start_norm", self.start_norm), ("distance", self.distance))
        yield from (("relative_distance", self.relative_distance), ("saturation", self.saturation))

    @staticmethod
    def titles() -> tuple[str, ...]:
        """Of `cells`."""
        return (
            "layer", "head", "matrix", "norm", "top", "effective rank", "momentum", "distance", "distance / start",
            "saturation",
        )  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """What a table shows."""
        rank, size = effective_rank(self.singular_values), len(self.singular_values)
        relative, filled = self.relative_distance, self.saturation
        return (
            str(self.layer), str(self.head), str(self.matrix), f"{self.norm:.4g}", f"{self.singular_values[0]:.4g}",
            NOTHING if rank is None else f"{rank:.1f} of {size}", f"{self.momentum:.3g}", f"{self.distance:.4g}",
            NOTHING if relative is None else f"{relative:.3g}", NOTHING if filled is None else f"{100 * filled:.0f} %",
        )  # fmt: skip


def effective_rank(singular_values: np.ndarray) -> float | None:
    """exp of the entropy of singular values divided by their sum; None where all are 0 or one is no number."""
    total = float(singular_values.sum())
    if not 0 < total < math.inf:
        return None
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def of_memory(
    layer: int, weights: Sequence[Tensor], start: Sequence[Tensor], momentum: Sequence[Tensor]
) -> list[Matrix]:
    """The matrices of one layer's memory, by head and depth; tensors [H, d_in, d_out], in float64 from here on."""
    found = []
    for head in range(start[0].shape[0]):
        for index, (w, w0, s) in enumerate(zip(weights, start, momentum, strict=True)):
            now, before, past = (x[head].double().cpu() for x in (w, w0, s))
            values, changes = (_singular_values(x) for x in (now, now - before))
            found.append(Matrix(layer, head, index, values, changes, float(before.norm()), float(past.norm())))
    return found


def _singular_values(x: Tensor) -> np.ndarray:
    """Falling; nan for a matrix that is not finite, of which there are none."""
    if not torch.isfinite(x).all():
        return np.full(min(x.shape), np.nan)
    return torch.linalg.svdvals(x).numpy()
