"""Stores of states between segments: values come back bit for bit, once, and nothing of them stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.boundary_states import (
    BoundaryStatesError,
    DiskStates,
    Place,
    State,
    open_boundary_states,
    remove_left_boundary_states,
)

PLACES: tuple[Place, ...] = ("device", "host", "disk")


def make_state() -> State:
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return {
        "weights": weights * 2,
        "again": weights,
        "transposed": weights.mT,
        "expanded": weights[:1].expand(5, 3, 4),
        "half": weights.bfloat16(),
        "empty": weights[:, :0],
        "position": torch.tensor([2**40, 3]),
        "reset": torch.tensor([True, False]),
        "number": torch.tensor(7),
    }


@pytest.mark.parametrize("place", PLACES)
def test_values_come_back_bit_for_bit_and_outside_the_graph(place: Place, tmp_path: Path) -> None:
    first, second = make_state(), {"other": torch.ones(3)}
    with open_boundary_states(place, tmp_path) as states:
        states.put(1, first)
        states.put(2, second)
        assert states.take(2)["other"].tolist() == [1, 1, 1]
        found = states.take(1)
        with pytest.raises(KeyError):
            states.take(1)
    assert list(found) == list(first)
    for name, tensor in first.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        assert not found[name].requires_grad


@pytest.mark.parametrize("place", PLACES)
def test_what_becomes_of_the_tensors_does_not_matter(place: Place, tmp_path: Path) -> None:
    tensor = torch.ones(3)
    with open_boundary_states(place, tmp_path) as states:
        states.put(0, {"x": tensor})
        tensor.zero_()
        assert states.take(0)["x"].tolist() == [1, 1, 1]


def test_a_file_lasts_from_put_to_take(tmp_path: Path) -> None:
    with open_boundary_states("disk", tmp_path) as states:
        states.put(3, make_state())
        (folder,) = tmp_path.iterdir()
        assert [path.name for path in folder.iterdir()] == ["3.safetensors"]
        states.take(3)
        assert list(folder.iterdir()) == []
        states.put(4, make_state())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_an_error_with_its_place_and_the_way_out(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    message = r"training\.boundary_states: disk failed at .*absent.*; free disk space there, or set it to host"
    with pytest.raises(BoundaryStatesError, match=message):
        DiskStates(absent).put(0, make_state())
    with pytest.raises(BoundaryStatesError, match=message), open_boundary_states("disk", absent):
        pass
    with open_boundary_states("disk", tmp_path) as states:
        states.put(1, make_state())
        (file,) = tmp_path.rglob("*.safetensors")
        file.unlink()
        with pytest.raises(BoundaryStatesError, match=r"disk failed at .*1\.safetensors"):
            states.take(1)


@pytest.fixture
def left_by_a_killed_process(tmp_path: Path) -> Callable[[], Path]:
    def leave() -> Path:
        context = open_boundary_states("disk", tmp_path)
        states = context.__enter__()
        states.put(0, make_state())
        (folder,) = tmp_path.iterdir()
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        context.__exit__(None, None, None)
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return leave


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, left_by_a_killed_process: Callable[[], Path]
) -> None:
    assert any(left_by_a_killed_process().iterdir())
    (tmp_path / "checkpoints").mkdir()
    remove_left_boundary_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
