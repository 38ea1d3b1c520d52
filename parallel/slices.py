"""Which part of a parameter a rank holds, where ranks hold slices of it.

A parameter of a model that was split carries its `Slice` under the attribute `mnemosyne_slice`; one without it is
whole. Checkpoints speak of whole parameters alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ATTRIBUTE = "mnemosyne_slice"


@dataclass(frozen=True)
class Slice:
    """Part `index` of `count` equal ones along an axis."""

    axis: int
    index: int
    count: int

    groups: int = 1
    """The axis is so many stretches, one behind the other, of each of which a slice is held: such as gates that stand
    behind one another, each for every head."""

    def shape_of(self, whole: torch.Size) -> torch.Size:
        """The slice's shape. Raises ValueError where the axis cannot be split so."""
        length = whole[self.axis]
        if length % (self.groups * self.count):
            raise ValueError(
                f"axis {self.axis} of {tuple(whole)} cannot be split into {self.groups} x {self.count} parts"
            )
        return torch.Size([*whole[: self.axis], length // self.count, *whole[self.axis + 1 :]])

    def whole_shape(self, part: torch.Size) -> torch.Size:
        """The shape of what it is a slice of."""
        return torch.Size([*part[: self.axis], part[self.axis] * self.count, *part[self.axis + 1 :]])

    def of(self, whole: Tensor) -> Tensor:
        """The slice of a whole tensor, contiguous; a copy where the whole is longer."""
        shape = self.shape_of(whole.shape)
        grouped = whole.unflatten(self.axis, (self.groups, self.count, -1))
        return grouped.select(self.axis + 1, self.index).reshape(shape).contiguous()


def joined(parts: Sequence[Tensor], axis: int, groups: int = 1) -> Tensor:
    """The whole of all its slices, by index."""
    grouped = [part.unflatten(axis, (groups, -1)) for part in parts]
    return torch.cat(grouped, axis + 1).flatten(axis, axis + 1)


def slice_of(parameter: Tensor) -> Slice | None:
    """Which part of itself a parameter is; None where it is whole."""
    return getattr(parameter, ATTRIBUTE, None)


def mark(parameter: Tensor, part: Slice) -> None:
    """Say that a parameter is a slice."""
    setattr(parameter, ATTRIBUTE, part)
