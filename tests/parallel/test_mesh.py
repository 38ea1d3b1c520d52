"""Where ranks stand, which of them form a group, and which part of a parameter each holds."""

from __future__ import annotations

import itertools

import pytest
import torch

from parallel.mesh import AXES, Layout, Place
from parallel.slices import Slice, mark, slice_of
from tests.distributed_helper import run_ranks

GROUPS = """
import torch, torch.distributed as dist
from parallel.mesh import Layout, Mesh
from parallel.process import initialize, shutdown, exit_now
world = initialize("cpu")
mesh = Mesh.build(world, Layout.of(world.size, pipeline=2, tensor=2))
for group in (mesh.tensor, mesh.sequence, mesh.data, mesh.replicas, mesh.pipeline, mesh.same_rows):
    total = torch.tensor(2**world.rank)
    if group.handle is not None:
        dist.all_reduce(total, group=group.handle)
    assert total == sum(2**rank for rank in group.ranks), group
    assert group.ranks[group.index] == world.rank
print(mesh.place, mesh.tensor.ranks, mesh.pipeline.ranks, mesh.same_rows.ranks, mesh.replicas.size)
shutdown()
exit_now(0)
"""


def test_the_tensor_axis_is_innermost_and_the_pipeline_outermost() -> None:
    layout = Layout(pipeline=2, data=3, sequence=2, tensor=2)
    assert layout.place(1) == Place(0, 0, 0, 1)
    assert layout.place(2) == Place(0, 0, 1, 0)
    assert layout.place(4) == Place(0, 1, 0, 0)
    assert layout.place(12) == Place(1, 0, 0, 0)
    assert [layout.rank(layout.place(rank)) for rank in range(24)] == list(range(24))


def test_groups_hold_every_rank_once_and_differ_along_their_axes_alone() -> None:
    layout = Layout(pipeline=2, data=3, sequence=2, tensor=2)
    for axes in itertools.chain(*(itertools.combinations(AXES, n) for n in range(5))):
        groups = layout.groups(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        for group in groups:
            places = [layout.place(rank)._asdict() for rank in group]
            assert all(len({place[axis] for place in places}) == 1 for axis in AXES if axis not in axes)
            assert list(group) == sorted(group)
    assert layout.groups("tensor")[0] == (0, 1)
    assert layout.groups("data", "sequence")[1] == (1, 3, 5, 7, 9, 11)


def test_what_the_other_axes_leave_is_data_parallel() -> None:
    assert Layout.of(16, pipeline=2, tensor=4) == Layout(pipeline=2, data=2, sequence=1, tensor=4)
    with pytest.raises(ValueError, match=r"6 ranks .*pipeline 2 x sequence 1 x tensor 2 takes 4 ranks"):
        Layout.of(6, pipeline=2, tensor=2)


def test_the_groups_of_running_ranks_talk_to_whom_they_name() -> None:
    printed = run_ranks(["-c", GROUPS], ranks=4, timeout=60).outputs
    assert printed[3] == "Place(pipeline=1, data=0, sequence=0, tensor=1) (2, 3) (1, 3) (0, 1, 2, 3) 1\n"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_slices_of_a_parameter_join_to_it(axis: int, groups: int) -> None:
    whole = torch.arange(12 * 24).reshape(12, 24)
    slices = [Slice(axis, index, 2, groups) for index in range(2)]
    parts = [part.of(whole) for part in slices]
    assert all(part.shape_of(whole.shape) == held.shape for part, held in zip(slices, parts, strict=True))
    assert all(part.whole_shape(held.shape) == whole.shape for part, held in zip(slices, parts, strict=True))
    joined = torch.zeros_like(whole)
    for part, held in zip(slices, parts, strict=True):
        place = part.view_in(joined)
        place.copy_(held.reshape(place.shape))
    assert torch.equal(joined, whole)


def test_gates_that_stand_behind_one_another_are_each_sliced_by_head() -> None:
    heads = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23])
    assert Slice(0, 1, 2, groups=2).of(heads).tolist() == [12, 13, 22, 23]


def test_an_axis_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="axis 0 of .* cannot be split into 1 x 4 parts"):
        Slice(0, 0, 4).of(torch.zeros(6, 2))


def test_a_parameter_says_which_slice_it_is() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert slice_of(parameter) is None
    mark(parameter, Slice(0, 1, 2))
    assert slice_of(parameter) == Slice(0, 1, 2)
