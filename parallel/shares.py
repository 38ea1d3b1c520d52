"""Which stretches of which parameters each rank of a layout steps, told beforehand: what its file is to hold for it to
read no other.

It follows from how DeepSpeed divides parameters among replicas. Nothing depends on it being right but which files are
opened: `parallel.fragments` asks the running engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.slices import Slice

_ALIGNMENT = 2
"""ZeRO 1 and 2 pad the parameters of a group to a multiple of so many elements for each replica."""


class Held(NamedTuple):
    """What all replicas of a rank hold of a parameter."""

    parameter: str
    part: Slice | None
    numel: int


class Share(NamedTuple):
    """Elements `start` to `start + numel` of a parameter, or of a part of it."""

    parameter: str
    part: Slice | None
    start: int
    numel: int


def shares(groups: Sequence[Sequence[Held]], *, zero_stage: int, replica: int, replicas: int) -> Iterator[Share]:
    """What one of the replicas writes.

    Args:
        groups: those of the optimizer, each with its parameters in order.
    """
    for group in groups:
        if zero_stage == 0:
            if replica == 0:
                yield from (Share(held.parameter, held.part, 0, held.numel) for held in group)
        elif zero_stage == 3:
            yield from _of_each(group, replica, replicas)
        else:
            yield from _of_all(group, replica, replicas)


def padded(elements: int, replicas: int) -> int:
    """So many elements of an optimizer's group, filled up as ZeRO 1 and 2 do to divide them among replicas."""
    step = _ALIGNMENT * replicas
    return -(-elements // step) * step


def _of_each(group: Sequence[Held], replica: int, replicas: int) -> Iterator[Share]:
    for held in group:
        size = -(-held.numel // replicas)
        start, stop = replica * size, min((replica + 1) * size, held.numel)
        if start < stop:
            yield Share(held.parameter, held.part, start, stop - start)


def _of_all(group: Sequence[Held], replica: int, replicas: int) -> Iterator[Share]:
    size = padded(sum(held.numel for held in group), replicas) // replicas
    first = 0
    for held in group:
        start, stop = max(replica * size - first, 0), min((replica + 1) * size - first, held.numel)
        if start < stop:
            yield Share(held.parameter, held.part, start, stop - start)
        first += held.numel
