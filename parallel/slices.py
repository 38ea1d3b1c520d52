"""Which part of a parameter a rank holds, where ranks hold slices of it.

A parameter of a model that was split carries its `Slice` under the attribute `mnemosyne_slice`; one without it is
whole. Checkpoints speak of whole parameters alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ATTRIBUTE = "mnemosyne_slice"


@dataclass(frozen=True)
class Runs:
    """Where the elements of a flattened slice stand in its flattened whole: in runs of `length` neighbours, of each
    `count` of which the slice has number `index`.
    """

    length: int
    index: int
    count: int

    def positions(self, start: int, stop: int) -> Tensor:
        """Those of the slice's elements `start` to `stop`: int64 [stop - start], rising."""
        elements = torch.arange(start, stop)
        return elements + (elements // self.length * (self.count - 1) + self.index) * self.length

    def elements(self, positions: Tensor) -> Tensor:
        """The slice's elements at these positions of the whole: int64, -1 where the slice has none."""
        period, inside = positions // (self.length * self.count), positions % (self.length * self.count)
        inside = inside - self.index * self.length
        return torch.where((inside >= 0) & (inside < self.length), period * self.length + inside, -1)

    def before(self, position: int) -> int:
        """How many of the slice's elements stand before a position of the whole."""
        period, inside = divmod(position, self.length * self.count)
        return period * self.length + min(max(inside - self.index * self.length, 0), self.length)


WHOLE = Runs(1, 0, 1)
"""Of what is no slice."""


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

    def runs(self, whole: torch.Size) -> Runs:
        """Where it stands in a whole of this shape, both flattened."""
        return Runs(self.shape_of(whole)[self.axis :].numel() // self.groups, self.index, self.count)

    def of(self, whole: Tensor) -> Tensor:
        """The slice of a whole tensor, contiguous; a copy where the whole is longer."""
        shape = self.shape_of(whole.shape)
        return self.view_in(whole).reshape(shape).contiguous()

    def view_in(self, whole: Tensor) -> Tensor:
        """The slice's place in the whole, a view of [..., groups, length / groups, ...] along the axis: written to, it
        changes the whole.
        """
        return whole.unflatten(self.axis, (self.groups, self.count, -1)).select(self.axis + 1, self.index)


def slice_of(parameter: Tensor) -> Slice | None:
    """Which part of itself a parameter is; None where it is whole."""
    return getattr(parameter, ATTRIBUTE, None)


def mark(parameter: Tensor, part: Slice) -> None:
    """Say that a parameter is a slice."""
    setattr(parameter, ATTRIBUTE, part)
