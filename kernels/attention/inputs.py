"""The arguments of `attention`, checked once and laid out heads first, as every backend takes them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """Keys that every query sees, whatever the window (the paper's persistent tokens, section 3.3).

    They have no position. Their scores use a query without rotary phases, so that they don't drift with the absolute
    position.
    """

    q: Tensor
    """[B, Tq, H, D]: the queries before any rotation."""
    k: Tensor
    """[N, H, D]."""
    v: Tensor
    """[N, H, D]."""


@dataclass(frozen=True)
class AttentionInputs:
    """Heads-first views.

    q [B, H, Tq, D]; every stream's keys and values [B, H, Tk, D]; prefix q [B, H, Tq, D], k and v [H, N, D].
    """

    q: Tensor
    streams: tuple[tuple[Tensor, Tensor], ...]
    prefix: Prefix | None
    window: int
    first_valid: Tensor | None

    @property
    def offset(self) -> int:
        """Key index of the first query."""
        return self.streams[0][0].shape[2] - self.q.shape[2]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: Prefix | None,
    context: tuple[Tensor, Tensor] | None,
    first_valid: Tensor | None,
) -> AttentionInputs:
    """Checks shapes and moves the heads forward.

    Raises:
        ValueError: names the argument, what it is and what it should be.
    """
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q is {list(q.shape)}: it must be [B, Tq, H, D] with Tq >= 1")
    batch, length, heads, width = q.shape
    if k.dim() != 4 or k.shape[1] < length or (k.shape[0], *k.shape[2:]) != (batch, heads, width):
        raise ValueError(f"k is {list(k.shape)}: it must be [{batch}, Tk, {heads}, {width}] with Tk >= Tq = {length}")
    for name, tensor in (("v", v), *zip(("context keys", "context values"), context or (), strict=False)):
        if tensor.shape != k.shape:
            raise ValueError(f"{name} are {list(tensor.shape)}: they must have the shape of k, {list(k.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: it counts the visible tokens, the query's own included, so at least 1")
    if first_valid is not None and first_valid.shape != (batch,):
        raise ValueError(f"first_valid is {list(first_valid.shape)}: it must hold one key index per row, [{batch}]")
    if prefix is not None:
        _check_prefix(prefix, q)
        prefix = Prefix(prefix.q.transpose(1, 2), prefix.k.transpose(0, 1), prefix.v.transpose(0, 1))
    streams = ((k, v),) if context is None else ((k, v), context)
    return AttentionInputs(
        q=q.transpose(1, 2),
        streams=tuple((keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in streams),
        prefix=prefix,
        window=k.shape[1] if window is None else min(window, k.shape[1]),
        # A later index would hide a query's own key and leave its softmax empty; clamping costs no host sync.
        first_valid=None if first_valid is None else first_valid.clamp(0, k.shape[1] - length),
    )


def _check_prefix(prefix: Prefix, q: Tensor) -> None:
    if prefix.q.shape != q.shape:
        raise ValueError(f"prefix.q is {list(prefix.q.shape)}: it must have the shape of q, {list(q.shape)}")
    for name, tensor in (("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        if tensor.dim() != 3 or tensor.shape != (max(1, len(prefix.k)), *q.shape[2:]):
            raise ValueError(f"{name} is {list(tensor.shape)}: it must be [N, {q.shape[2]}, {q.shape[3]}] with N >= 1")


def visible(query_index: Tensor, key_index: Tensor, window: int, first_valid: Tensor | None) -> Tensor:
    """Which keys each query sees: [Tq, Tk] bool, or [B, 1, Tq, Tk] when `first_valid` [B] differs by row."""
    distance = query_index[:, None] - key_index[None, :]
    mask = (distance >= 0) & (distance < window) & (key_index >= 0)
    if first_valid is None:
        return mask
    return mask & (key_index >= first_valid[:, None])[:, None, None, :]


def indices(start: int, stop: int, device: torch.device) -> Tensor:
    """Positions start..stop-1 on a device."""
    return torch.arange(start, stop, device=device)
