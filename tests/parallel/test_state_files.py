"""The saved state is read by parameter: from any number of rank files, and never when something is missing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel.mesh import Layout
from parallel.slices import WHOLE, Slice
from parallel.state_files import (
    INDEX_FILE,
    KINDS,
    WEIGHT,
    StateReader,
    Stretch,
    index_file,
    load_parameters,
    rank_file,
    read_parameters,
    state_file,
)


def write(folder: Path, model: nn.Module, cuts: list[float]) -> None:
    """Save `model` as len(cuts) + 1 ranks that each hold a consecutive share of every parameter."""
    ranks = len(cuts) + 1
    for rank in range(ranks):
        stretches = []
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            edges = [0, *(int(cut * len(flat)) for cut in cuts), len(flat)]
            for number, kind in enumerate(KINDS):
                values = flat[edges[rank] : edges[rank + 1]] + number
                if len(values):
                    stretches.append(Stretch(kind, name, edges[rank], values))
        rank_file(rank, ranks, stretches).write(folder)
    index_file(ranks=ranks, optimizer_step=7, shapes={n: p.shape for n, p in model.named_parameters()}).write(folder)


@pytest.mark.parametrize("cuts", [[], [0.5], [0.1, 0.3, 0.31]])
def test_any_split_reads_back_whole(tmp_path: Path, cuts: list[float]) -> None:
    model = nn.Linear(5, 7)
    write(tmp_path, model, cuts)
    saved = read_parameters(tmp_path)
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    with StateReader(tmp_path) as reader:
        assert reader.optimizer_step == 7
        assert torch.equal(reader.read("exp_avg", "weight", 3, 20), model.weight.flatten()[3:23] + 1)


def test_a_missing_rank_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [0.5])
    (tmp_path / "state-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="state-00001-of-00002.safetensors is missing"):
        read_parameters(tmp_path)


def test_a_state_with_a_hole_is_refused(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [])
    rank_file(0, 1, [Stretch(kind, "weight", 1, torch.zeros(15)) for kind in KINDS]).write(tmp_path)
    with pytest.raises(ValueError, match="weight of weight is not whole"):
        read_parameters(tmp_path)


def test_another_model_is_refused_by_parameter(tmp_path: Path) -> None:
    write(tmp_path, nn.Linear(4, 4), [])
    with pytest.raises(ValueError, match=r"weight: \(4, 4\) in the checkpoint, \(4, 5\) in the model"):
        load_parameters(nn.Linear(5, 4), tmp_path)


SHAPES = {
    "rows": torch.Size([8, 6]),
    "columns": torch.Size([3, 8]),
    "gates": torch.Size([24, 2]),
    "norm": torch.Size([5]),
}
AXES = {"rows": (0, 1), "columns": (1, 1), "gates": (0, 3)}
"""Axis and groups of the parameters that ranks hold slices of."""


def part_of(name: str, index: int, count: int) -> Slice | None:
    if name not in AXES or count == 1:
        return None
    axis, groups = AXES[name]
    return Slice(axis, index, count, groups)


def whole_of(name: str, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * list(SHAPES).index(name) + KINDS.index(kind))
    return torch.randn(SHAPES[name], generator=generator)


def held_by(name: str, kind: str, part: Slice | None) -> torch.Tensor:
    whole = whole_of(name, kind)
    return (whole if part is None else part.of(whole)).flatten()


def write_sliced(folder: Path, tensor: int, replicas: int) -> None:
    """Save `SHAPES` from `tensor` x `replicas` ranks: slices, each cut among the replicas; a whole parameter by the
    first of the tensor ranks alone.
    """
    folder.mkdir(exist_ok=True)
    ranks = tensor * replicas
    for index, replica in itertools.product(range(tensor), range(replicas)):
        stretches = []
        for name, kind in itertools.product(SHAPES, KINDS):
            part = part_of(name, index, tensor)
            values = held_by(name, kind, part)
            share = -(-len(values) // replicas)
            own = values[replica * share : (replica + 1) * share]
            if len(own) and (part is not None or index == 0):
                stretches.append(Stretch(kind, name, replica * share, own, part))
        rank_file(replica * tensor + index, ranks, stretches).write(folder)
    layout = Layout(data=replicas, tensor=tensor)
    index_file(ranks=ranks, optimizer_step=3, shapes=SHAPES, layout=layout).write(folder)


@pytest.mark.parametrize("saved", [(1, 1), (1, 3), (2, 1), (4, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("loaded", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_slices_of_any_layout_are_read_by_any_other(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    write_sliced(tmp_path, *saved)
    tensor, replicas = loaded
    for index, nearest in itertools.product(range(tensor), (None, 0.0, 1.0)):
        with StateReader(tmp_path, nearest=nearest) as reader:
            assert reader.layout == Layout(data=saved[1], tensor=saved[0])
            for name, kind in itertools.product(SHAPES, KINDS):
                part = part_of(name, index, tensor)
                values = held_by(name, kind, part)
                share = -(-len(values) // replicas)
                for start in range(0, len(values), share):
                    own = values[start : start + share]
                    assert torch.equal(reader.read(kind, name, start, len(own), part), own), (name, kind, start)


def test_slices_longer_than_a_piece_are_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.state_files._PIECE", 7)
    write_sliced(tmp_path, 4, 1)
    for name, weight in read_parameters(tmp_path).items():
        assert torch.equal(weight, whole_of(name, "weight"))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_runs_are_where_the_slices_elements_stand(name: str, count: int) -> None:
    whole = torch.arange(SHAPES[name].numel()).reshape(SHAPES[name])
    for index in range(count):
        part = part_of(name, index, count)
        runs = WHOLE if part is None else part.runs(SHAPES[name])
        places = (whole if part is None else part.of(whole)).flatten()
        assert torch.equal(runs.positions(0, len(places)), places)
        assert torch.equal(runs.positions(3, 5), places[3:5])
        assert [runs.before(at) for at in range(whole.numel() + 1)] == [
            int((places < at).sum()) for at in range(whole.numel() + 1)
        ]
        back = {int(place): element for element, place in enumerate(places)}
        assert runs.elements(whole.flatten()).tolist() == [back.get(at, -1) for at in range(whole.numel())]


def test_a_rank_of_the_same_layout_opens_its_own_file_alone(tmp_path: Path) -> None:
    write_sliced(tmp_path, 2, 2)
    with StateReader(tmp_path, nearest=3 / 3) as reader:
        part = part_of("rows", 1, 2)
        assert torch.equal(reader.read("weight", "rows", 12, 12, part), held_by("rows", "weight", part)[12:])
        assert reader.num_open == 1
        reader.read("weight", "rows", 0, 24, part)
        assert reader.num_open == 3, "the next ones, as far as needed"


def test_a_missing_slice_is_refused(tmp_path: Path) -> None:
    write_sliced(tmp_path, 2, 1)
    rank_file(1, 2, []).write(tmp_path)
    with pytest.raises(ValueError, match=r"weight of rows is not whole \(has 24 of 48 elements\)"):
        read_parameters(tmp_path)
    with StateReader(tmp_path, nearest=0.0) as reader:
        reader.read("weight", "rows", 0, 24, part_of("rows", 0, 2))
        with pytest.raises(ValueError, match="weight of rows is not whole"):
            reader.read("weight", "rows", 0, 24, part_of("rows", 1, 2))
        with pytest.raises(ValueError, match="weight of rows is not whole"):
            reader.read("weight", "rows", 0, 48)


def test_slices_of_two_kinds_are_refused(tmp_path: Path) -> None:
    rank_file(0, 1, [Stretch(k, "w", 0, torch.zeros(8), Slice(a, a, 2)) for k in KINDS for a in (0, 1)]).write(tmp_path)
    index_file(ranks=1, optimizer_step=0, shapes={"w": torch.Size([4, 4])}).write(tmp_path)
    with pytest.raises(ValueError, match="weight of w is not whole"):
        read_parameters(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_sliced(tmp_path, 2, 1)
    (tmp_path / state_file(1, 2)).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="state-00001-of-00002.safetensors is damaged"):
        read_parameters(tmp_path)


@pytest.mark.parametrize("damage", ["[]", "{", '{"version": 2}', '{"version": 2, "ranks": 1, "optimizer_step": 0}'])
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / INDEX_FILE).write_text(damage)
    with pytest.raises(ValueError, match="state.json is damaged"):
        StateReader(tmp_path)


def test_elements_that_are_there_twice_do_not_stand_for_others(tmp_path: Path) -> None:
    """Eight of the first half, and of the second one none."""
    for rank in range(2):
        rank_file(rank, 2, [Stretch(WEIGHT, "w", 0, torch.ones(4))]).write(tmp_path)
    index_file(ranks=2, optimizer_step=0, shapes={"w": torch.Size([8])}).write(tmp_path)
    with StateReader(tmp_path, nearest=0.0) as reader:
        assert torch.equal(reader.read(WEIGHT, "w", 0, 4), torch.ones(4))
        with pytest.raises(ValueError, match="weight of w is there twice from element 0 on"):
            reader.read(WEIGHT, "w", 0, 8)


def test_the_first_version_is_read_and_a_later_one_refused(tmp_path: Path) -> None:
    write_sliced(tmp_path, 1, 2)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    del index["layout"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {"version": 1}))
    with StateReader(tmp_path) as reader:
        assert reader.layout is None
        assert torch.equal(reader.weight("rows"), whole_of("rows", "weight"))
    (tmp_path / INDEX_FILE).write_text(json.dumps(index | {"version": 3}))
    with pytest.raises(ValueError, match="version 3, this program reads 1 and 2"):
        StateReader(tmp_path)
