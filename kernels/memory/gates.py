"""Products of gates over the tokens of a chunk, and their gradient (A, H, P, a, e and p of README.md, section 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GroupGates(NamedTuple):
    """Products of gates over each chunk: matrices [n, N, C, C], vectors [n, N, C] (names as in README.md)."""

    write: Tensor  # P = A @ H
    momentum_last: Tensor  # H[C, :]
    a: Tensor
    e: Tensor
    p: Tensor


def decay_matrices(gates: Tensor) -> Tensor:
    """Products of gates between two tokens of a chunk.

    By products, not by differences of logarithms: exact when a gate is exactly 0, and without the cancellation that
    long sums of logarithms suffer in fp32.

    Args:
        gates: [..., C], values in [0, 1], 0 and 1 included.

    Returns:
        [..., C, C]: entry (i, t) is the product of gates[i+1..t], 1 on the diagonal, 0 below it: A and H transposed, so
        that the running products lie side by side in memory.
    """
    size = gates.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=gates.device).triu_(1)
    return torch.where(later, gates.unsqueeze(-2), 1.0).cumprod(dim=-1).triu_()


def group_gates(alpha: Tensor, eta: Tensor) -> GroupGates:
    """Products of the gates of chunks; alpha, eta [n, N, C]. Outside differentiation: see `gate_gradients`."""
    return _products(alpha, eta)[0]


def _products(alpha: Tensor, eta: Tensor) -> tuple[GroupGates, Tensor]:
    """The products, and A and H transposed [2, n, N, C, C]."""
    each = torch.stack([1 - alpha, eta])
    between = decay_matrices(each)
    a, e = between[..., 0, :] * each[..., :1]
    keeps, momenta = between
    p = (e.unsqueeze(-2) @ keeps).squeeze(-2)
    # Copies: a view would keep all of A and H alive.
    return GroupGates(keeps.mT @ momenta.mT, momenta[..., -1].contiguous(), a, e, p), between


class GatesForGradient(NamedTuple):
    """The products of a group's gates, and what their gradient takes besides."""

    gates: GroupGates
    between: Tensor  # [2, n, N, C, C], A and H transposed

    @classmethod
    def of(cls, alpha: Tensor, eta: Tensor) -> GatesForGradient:
        """Of alpha, eta [n, N, C]."""
        return cls(*_products(alpha, eta))

    def gradients(self, d_gates: GroupGates) -> tuple[Tensor, Tensor]:
        """Gradients of alpha and eta, [n, N, C], from those of the products.

        Row by row `P[t] = (1 - alpha_t) P[t-1] + H[t]` and `H[t] = eta_t H[t-1] + (1 at t)`, and so do p, e and a, as
        if they were columns of a token before the chunk. What reaches row t, from all rows after it, is a product with
        A^T or H^T; without a division, so that it is exact for gates of 0 and 1. `d_gates` may hold anything above the
        matrices' diagonals.
        """
        (write, _, a, e, p), (keeps, momenta) = self
        d_rows = torch.cat([d_gates.write, d_gates.p.unsqueeze(-1), d_gates.a.unsqueeze(-1)], dim=-1)
        d_rows = keeps @ d_rows  # of P, p and a
        d_write, d_p, d_a = d_rows[..., :-2], d_rows[..., -2], d_rows[..., -1]
        d_keep = d_a.clone()
        d_keep[..., 1:] *= a[..., :-1]
        d_keep[..., 1:] += d_p[..., 1:] * p[..., :-1] + (d_write[..., 1:, :] * write[..., :-1, :]).sum(-1)
        d_write[..., -1, :] += d_gates.momentum_last
        d_p += d_gates.e
        d_columns = d_rows[..., :-1].mT @ momenta.mT  # of H and e, transposed as `momenta` is
        d_eta = d_columns[..., -1, :].clone()
        d_eta[..., 1:] *= e[..., :-1]
        d_eta[..., 1:] += (d_columns[..., :-1, 1:] * momenta[..., :-1]).sum(-2)
        return d_keep.neg_(), d_eta
