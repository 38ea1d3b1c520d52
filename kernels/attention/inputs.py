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
    first_visible: Tensor | None
    """Key index of the first key seen, never beyond the query's own: [B, Tq] by query, or [B, 1] for all of a row's
    queries (then it hides cached keys alone)."""
    given_bounds: tuple[Tensor | None, Tensor | None]
    """The arguments that `first_visible` was made of, by which it is known again."""

    @property
    def offset(self) -> int:
        """Key index of the first query."""
        return self.streams[0][0].shape[2] - self.q.shape[2]

    def tensors(self) -> list[Tensor]:
        """All that a gradient can be asked for."""
        return [self.q, *(x for pair in self.streams for x in pair), *(self.prefix or ())]

    @property
    def has_documents(self) -> bool:
        """Whether queries of one row may differ in the first key that they see."""
        return self.first_visible is not None and self.first_visible.shape[1] > 1


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: Prefix | None,
    context: tuple[Tensor, Tensor] | None,
    first_valid: Tensor | None,
    first_visible: Tensor | None = None,
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
    _check_key_indices("first_valid", first_valid, [batch], "row")
    _check_key_indices("first_visible", first_visible, [batch, length], "query")
    if prefix is not None:
        _check_prefix(prefix, q)
        prefix = Prefix(prefix.q.transpose(1, 2), prefix.k.transpose(0, 1), prefix.v.transpose(0, 1))
    streams = ((k, v),) if context is None else ((k, v), context)
    return AttentionInputs(
        q=q.transpose(1, 2),
        streams=tuple((keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in streams),
        prefix=prefix,
        window=k.shape[1] if window is None else min(window, k.shape[1]),
        first_visible=_first_visible(first_valid, first_visible, k.shape[1] - length, length),
        given_bounds=(first_valid, first_visible),
    )


def _check_key_indices(name: str, value: Tensor | None, shape: list[int], each: str) -> None:
    if value is not None and (value.dtype != torch.int64 or list(value.shape) != shape):
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)}: it must hold one key index per {each}, torch.int64 {shape}"
        )


def _first_visible(first_valid: Tensor | None, by_query: Tensor | None, offset: int, length: int) -> Tensor | None:
    """The two bounds as one, `AttentionInputs.first_visible`: a row's is one query's bound, set for all of them."""
    # A later index would hide a query's own key and leave its softmax empty; clamping costs no host sync.
    row = None if first_valid is None else first_valid.clamp(0, offset)[:, None]
    if by_query is None:
        return row
    bound = torch.minimum(by_query.clamp(min=0), indices(offset, offset + length, by_query.device))
    return bound if row is None else torch.maximum(bound, row)


def _check_prefix(prefix: Prefix, q: Tensor) -> None:
    if prefix.q.shape != q.shape:
        raise ValueError(f"prefix.q is {list(prefix.q.shape)}: it must have the shape of q, {list(q.shape)}")
    for name, tensor in (("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        if tensor.dim() != 3 or tensor.shape != (max(1, len(prefix.k)), *q.shape[2:]):
            raise ValueError(f"{name} is {list(tensor.shape)}: it must be [N, {q.shape[2]}, {q.shape[3]}] with N >= 1")


def visible(query_index: Tensor, key_index: Tensor, window: int, first_visible: Tensor | None) -> Tensor:
    """Which keys each query sees: [Tq, Tk] bool, or [B, 1, Tq, Tk] where `first_visible` [B, Tq or 1] is given."""
    distance = query_index[:, None] - key_index[None, :]
    mask = (distance >= 0) & (distance < window) & (key_index >= 0)
    if first_visible is None:
        return mask
    return mask & (key_index >= first_visible[:, None, :, None])


def indices(start: int, stop: int, device: torch.device) -> Tensor:
    """Positions start..stop-1 on a device."""
    return torch.arange(start, stop, device=device)
