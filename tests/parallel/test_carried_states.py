"""Rows that go on from step to step, against documents by hand: in every ZeRO stage, whole and by segments, saved by
one number of ranks and gone on with by another.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ModelState
from model.state import LayerState, head_axis
from parallel.boundary_states import State
from parallel.carried_states import CarriedStates
from parallel.mesh import Group, Layout, Mesh
from parallel.process import World
from tests.distributed_helper import run_ranks
from tests.model_cases import build_model, random_tokens
from tests.parallel.carried_worker import HALF, LENGTH, ROWS, STEPS, TRIALS, Trial, optimizer_of, streams
from tests.streams_by_hand import train_by_hand

WORKER = "tests/parallel/carried_worker.py"
HEADS = 4
"""Of the states that are saved by hand."""

Seen = dict[str, dict[str, Any]]


@cache
def by_hand(case: str) -> list[float]:
    model = build_model(case, torch.float32)
    return train_by_hand(model, optimizer_of(model), **streams()._asdict(), steps=STEPS)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and then two that also go on with what the one saved."""
    folder = tmp_path_factory.mktemp("carried")
    for ranks in (1, 2):
        run_ranks([WORKER, str(folder)], ranks=ranks, timeout=400)
    return folder


@pytest.fixture(scope="module")
def seen(launched: Path) -> dict[int, Seen]:
    """By number of processes."""
    return {ranks: torch.load(launched / str(ranks) / "seen.pt") for ranks in (1, 2)}


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_steps_are_those_of_documents_by_hand(seen: dict[int, Seen], trial: Trial) -> None:
    expected = by_hand(trial.case)
    assert len(expected) == STEPS
    assert seen[1][str(trial)]["losses"] == pytest.approx(expected[:HALF], rel=1e-5)
    assert seen[2][str(trial)]["losses"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_so_they_are_behind_another_number_of_ranks_and_micro_batches(seen: dict[int, Seen], trial: Trial) -> None:
    assert seen[2][str(trial)]["resumed"] == pytest.approx(by_hand(trial.case)[HALF:], rel=1e-5)
    assert seen[2][str(trial)]["begins"]


@torch.no_grad()
@pytest.mark.parametrize("trial", TRIALS[:1], ids=str)
def test_what_is_carried_matters(trial: Trial) -> None:
    """The same steps from beginnings have other losses, by far more than the tolerance."""
    model, rows = build_model(trial.case, torch.float32), streams()
    span = slice(LENGTH, 2 * LENGTH)
    before = model(rows.tokens[:, :LENGTH], resets=rows.resets[:, :LENGTH]).state
    tokens, resets, targets = (x[:, span] for x in (rows.tokens, rows.resets, rows.targets))
    carried, fresh = (model(tokens, state, targets=targets, resets=resets).loss_sum for state in (before, None))
    assert float(carried) != pytest.approx(float(fresh), rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_files_hold_every_row_once(launched: Path, ranks: int) -> None:
    for trial in TRIALS:
        paths = sorted((launched / str(ranks) / str(trial)).glob("carried-*"))
        assert [path.name for path in paths] == [f"carried-{r:05d}-of-{ranks:05d}.safetensors" for r in range(ranks)]
        files = [load_file(path) for path in paths]
        assert sorted(row for file in files for row in file["rows"].tolist()) == list(range(ROWS))
        positions = {row: p for f in files for row, p in zip(f["rows"].tolist(), f["position"].tolist(), strict=True)}
        assert positions == {0: 32, 1: 16, 2: 32, 3: 24}, "tokens since the document's beginning"


def alone(layout: Layout, rank: int) -> Mesh:
    """A rank's mesh with nobody to talk to."""
    world = World(rank=rank, size=layout.ranks, local_rank=rank, device=torch.device("cpu"))
    names = [field.name for field in fields(Mesh) if field.name not in ("world", "layout", "place")]
    return Mesh(world, layout, layout.place(rank), **dict.fromkeys(names, Group((rank,), 0, None)))


def states_of(layout: Layout, rank: int, accumulation: int, size: int, layers: range | None = None) -> CarriedStates:
    return CarriedStates(alone(layout, rank), micro_batch_size=size, accumulation=accumulation, layers=layers)


@cache
def state_of(case: str) -> ModelState:
    """The state of 4 rows after a few tokens, one of them reset."""
    with torch.no_grad():
        state = build_model(case, torch.float32, num_heads=HEADS)(random_tokens(ROWS, 11)).state
    return state.reset_rows(torch.tensor([False, False, True, False]))


def stage_layers(layout: Layout, stage: int, layers: int) -> range | None:
    """All of the layers but one are the last stage's."""
    if layout.pipeline == 1:
        return None
    return range(stage, layers if stage == layout.pipeline - 1 else stage + 1)


def held_part(state: ModelState, layout: Layout, rank: int, rows: range) -> State:
    """What a rank of a layout has of a state: its rows, heads and layers."""
    place = layout.place(rank)
    part, parts = place.tensor * layout.sequence + place.sequence, layout.tensor * layout.sequence
    layers = stage_layers(layout, place.pipeline, len(state.layers)) or range(len(state.layers))
    own = tuple(layer if i in layers else LayerState() for i, layer in enumerate(state.layers))
    held = ModelState(state.position, own, state.restart).flat()
    for name, tensor in held.items():
        if (axis := head_axis(name)) is not None:
            tensor = tensor.chunk(parts, axis)[part]
        held[name] = tensor[rows.start : rows.stop] if tensor.dim() else tensor
    if not held["restart"].any():
        del held["restart"]
    return held


def every_rank(layout: Layout, accumulation: int, layers: int = 2) -> list[CarriedStates]:
    size = ROWS // accumulation // layout.data
    stages = [stage_layers(layout, layout.place(rank).pipeline, layers) for rank in range(layout.ranks)]
    return [states_of(layout, rank, accumulation, size, stage) for rank, stage in enumerate(stages)]


def written(folder: Path, layout: Layout, accumulation: int, case: str = "mag") -> ModelState:
    """The state of 4 rows, written by all ranks of a layout."""
    folder.mkdir()
    state = state_of(case)
    for rank, carried in enumerate(every_rank(layout, accumulation)):
        for m in range(accumulation):
            carried.put(m, held_part(state, layout, rank, carried.rows(m)))
        carried.file().write(folder)
    return state


LAYOUTS = [
    (Layout(), 4),
    (Layout(data=2), 1),
    (Layout(data=4), 1),
    (Layout(tensor=2), 2),
    (Layout(sequence=2), 1),
    (Layout(tensor=2, sequence=2), 1),
    (Layout(pipeline=2), 2),
    (Layout(pipeline=2, data=2, sequence=2, tensor=2), 2),
]


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
@pytest.mark.parametrize("loaded", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["mag", "mac"])
def test_any_layout_reads_what_any_other_wrote_bit_for_bit(
    tmp_path: Path, saved: tuple[Layout, int], loaded: tuple[Layout, int], case: str
) -> None:
    layout, accumulation = loaded
    if case == "mac" and (layout.sequence > 1 or saved[0].sequence > 1):
        return
    state = written(tmp_path / "state", *saved, case)
    for rank, carried in enumerate(every_rank(layout, accumulation)):
        carried.read(tmp_path / "state")
        for m in range(accumulation):
            found, expected = carried.get(m), held_part(state, layout, rank, carried.rows(m))
            assert ModelState.from_tensors(found).position.shape == (len(carried.rows(m)),)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), name


def test_what_ranks_hold_alike_is_written_once(tmp_path: Path) -> None:
    layout = Layout(pipeline=2, data=2, sequence=2, tensor=2)
    written(tmp_path / "state", layout, 1)
    files = [load_file(path) for path in sorted((tmp_path / "state").iterdir())]
    for name in {name for file in files for name in file} - {"rows", "went_back", "heads", "num_layers"}:
        copies = sum(name in file for file in files)
        assert copies == layout.data * (1 if head_axis(name) is None else 4), name


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    """They had whole states, and no word of heads."""
    state = written(tmp_path / "state", Layout(data=2), 1)
    for path in (tmp_path / "state").iterdir():
        tensors = load_file(path)
        del tensors["heads"]
        save_file(tensors, path)
    layout = Layout(tensor=2)
    for rank, carried in enumerate(every_rank(layout, 1)):
        carried.read(tmp_path / "state")
        expected = held_part(state, layout, rank, carried.rows(0))
        assert all(torch.equal(carried.get(0)[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "lmm-softmax", "transformer-window"])
def test_heads_stand_where_they_are_looked_for(case: str) -> None:
    dim = build_model(case, torch.float32).config.dim
    for name, tensor in state_of(case).flat().items():
        if (axis := head_axis(name)) is not None:
            assert tensor.shape[axis] == (dim if ".tails." in name else HEADS), name
        else:
            assert tensor.dim() < 2, name


def test_heads_that_cannot_be_shared_and_parts_that_are_missing_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "state", Layout(tensor=2), 1)
    with pytest.raises(ValueError, match="heads or channels, which 9 ranks cannot share"):
        states_of(Layout(tensor=9), 0, 1, ROWS).read(tmp_path / "state")
    path = tmp_path / "state" / "carried-00001-of-00002.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if n != "layers.1.attention.k"}, path)
    with pytest.raises(ValueError, match=r"layers.1.attention.k of row 0 is not whole"):
        states_of(Layout(), 0, 1, ROWS).read(tmp_path / "state")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="carried-00001-of-00002.safetensors is damaged"):
        states_of(Layout(), 0, 1, ROWS).read(tmp_path / "state")


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "transformer-window"])
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_rows_go_on_in_another_precision(tmp_path: Path, case: str, saved: torch.dtype, loaded: torch.dtype) -> None:
    """As from their states rounded to it by hand."""
    tokens, carried = random_tokens(ROWS, 30), states_of(Layout(), 0, 1, ROWS)
    carried.put(0, build_model(case, saved)(tokens[:, :11]).state.flat())
    carried.file().write(tmp_path)
    carried.read(tmp_path)
    model = build_model(case, loaded)
    types = {name: tensor.dtype for name, tensor in model(tokens[:, :11]).state.flat().items()}
    rounded = {name: tensor.to(types[name]) for name, tensor in carried.get(0).items()}
    assert any(tensor.dtype != rounded[name].dtype for name, tensor in carried.get(0).items())
    got, expected = (model(tokens[:, 11:], ModelState.from_tensors(state)) for state in (carried.get(0), rounded))
    assert torch.equal(got.logits, expected.logits)
    assert {name: tensor.dtype for name, tensor in got.state.flat().items()} == types


def test_other_rows_and_none_at_all_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "state", Layout(data=2), 1)
    with pytest.raises(ValueError, match="holds the states of 4 rows, and a step has 6: rows that go on"):
        states_of(Layout(), 0, 3, 2).read(tmp_path / "state")
    (tmp_path / "state" / "carried-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"carried-00001-of-00002\.safetensors is missing"):
        states_of(Layout(), 0, 1, 4).read(tmp_path / "state")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no carried states"):
        states_of(Layout(), 0, 1, 4).read(tmp_path / "none")


def test_rows_that_have_read_nothing_begin(tmp_path: Path) -> None:
    states_of(Layout(), 0, 2, 2).file().write(tmp_path)
    carried = states_of(Layout(), 0, 1, 4)
    carried.put(0, {"position": torch.ones(4)})
    carried.read(tmp_path)
    assert carried.get(0) == {}


def test_what_is_put_is_kept_whatever_becomes_of_it() -> None:
    carried, tensor = states_of(Layout(), 0, 1, 4), torch.ones(4, 2, requires_grad=True)
    carried.put(0, {"x": (2 * tensor)[:, :1]})
    kept = carried.get(0)["x"]
    assert not kept.requires_grad and kept.untyped_storage().nbytes() == 16
    earlier = carried.get(0)
    carried.put(0, {"x": torch.zeros(4, 1)})
    carried.put(0, earlier)
    assert torch.equal(carried.get(0)["x"], 2 * torch.ones(4, 1))
