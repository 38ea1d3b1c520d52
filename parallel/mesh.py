"""Where each rank stands: pipeline x data x sequence x tensor, and the process groups along these axes.

Ranks are numbered with tensor innermost, then sequence, data, pipeline: the ranks that talk most are next to each other
on a node. Groups are made here and handed to what needs them; nothing looks one up. They stay as long as the process:
who trains in one layout several times keeps its mesh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor

from parallel.process import World

Axis = Literal["pipeline", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "sequence", "tensor")
"""From the outermost to the innermost."""


class Place(NamedTuple):
    """A rank's place along each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each axis."""

    pipeline: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, ranks: int, *, pipeline: int = 1, sequence: int = 1, tensor: int = 1) -> Layout:
        """The layout of so many ranks, of which what the other axes leave is data parallel.

        Raises:
            ValueError: the ranks are no multiple of the other axes' product.
        """
        of_one = pipeline * sequence * tensor
        if ranks % of_one:
            raise ValueError(
                f"{ranks} ranks cannot be laid out: parallel.pipeline {pipeline} x sequence {sequence} x tensor "
                f"{tensor} takes {of_one} ranks or a multiple of them; start as many, or make these sizes smaller"
            )
        return cls(pipeline, ranks // of_one, sequence, tensor)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Along `AXES`."""
        return (self.pipeline, self.data, self.sequence, self.tensor)

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.sizes)

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        along = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            along.append(index)
        return Place(*reversed(along))

    def rank(self, place: Place) -> int:
        """The rank that stands there."""
        rank = 0
        for size, index in zip(self.sizes, place, strict=True):
            rank = rank * size + index
        return rank

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """All sets of ranks that differ along these axes alone, in order; they hold every rank once."""
        moving = [range(size) if axis in axes else (0,) for axis, size in zip(AXES, self.sizes, strict=True)]
        fixed = [(0,) if axis in axes else range(size) for axis, size in zip(AXES, self.sizes, strict=True)]
        return [
            tuple(self.rank(Place(*(a + b for a, b in zip(at, by, strict=True)))) for by in product(*moving))
            for at in product(*fixed)
        ]

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True))


@dataclass(frozen=True)
class Group:
    """The ranks of one set that this rank belongs to."""

    ranks: tuple[int, ...]
    """Their numbers among all."""

    index: int
    """This rank's place in it."""

    handle: dist.ProcessGroup | None
    """None where this rank is alone in it: then there is nobody to talk to."""

    @property
    def size(self) -> int:
        """How many ranks they are."""
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The tensor, in place, joined with those of the other ranks."""
        if self.handle is not None:
            dist.all_reduce(tensor, op=op, group=self.handle)
        return tensor


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a layout, and its groups."""

    world: World
    layout: Layout
    place: Place

    tensor: Group
    """Hold the slices of the same parameters, and read the same tokens."""

    sequence: Group
    """Read stretches of the same rows."""

    data: Group
    """Read other rows, at the same place of them."""

    replicas: Group
    """data x sequence: hold the same parameters and sum their gradients; data parallel, as DeepSpeed sees it."""

    pipeline: Group
    """Hold other layers, for the same tokens."""

    same_rows: Group
    """pipeline x sequence x tensor: read the same rows, and hold the parts of their states."""

    @property
    def leads_rows(self) -> bool:
        """True on the one rank of those that read the same rows that counts for them in sums over all ranks."""
        return self.same_rows.index == 0

    @classmethod
    def build(cls, world: World, layout: Layout) -> Mesh:
        """Make the groups; every rank calls it.

        Raises:
            ValueError: the layout is of another number of ranks.
        """
        if layout.ranks != world.size:
            raise ValueError(f"{world.size} ranks are not the {layout.ranks} of the layout {layout}")
        of_axes: dict[str, tuple[Axis, ...]] = {
            "tensor": ("tensor",),
            "sequence": ("sequence",),
            "data": ("data",),
            "replicas": ("data", "sequence"),
            "pipeline": ("pipeline",),
            "same_rows": ("pipeline", "sequence", "tensor"),
        }
        groups = {name: _own_group(world, layout.groups(*axes)) for name, axes in of_axes.items()}
        return cls(world=world, layout=layout, place=layout.place(world.rank), **groups)

    @classmethod
    def data_parallel(cls, world: World) -> Mesh:
        """All ranks read rows of their own, and hold the whole model."""
        return cls.build(world, Layout(data=world.size))


def _own_group(world: World, sets: list[tuple[int, ...]]) -> Group:
    """Makes the groups of all these sets, as every rank must in the same order, and gives this rank's own."""
    own = next(ranks for ranks in sets if world.rank in ranks)
    handle = None
    if len(own) == world.size:
        handle = dist.group.WORLD
    elif len(own) > 1:
        handles = [dist.new_group(ranks) for ranks in sets]
        handle = handles[sets.index(own)]
    return Group(own, own.index(world.rank), handle if len(own) > 1 else None)
