"""A row whose carried state is not finite goes back, on its rank alone, and the others' training is not disturbed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.bad_states import StateGuard, finite_rows
from parallel.carried_states import CarriedStates
from parallel.mesh import Mesh
from parallel.process import World
from tests.distributed_helper import run_ranks
from tests.parallel.bad_state_worker import BAD_ROW

TRIALS = ["mac,1,0,fp32", "mag,2,2,fp32", "lmm,3,2,fp32", "mac,1,2,bf16", "transformer-window,0,0,fp32"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("states") / "seen.pt"
    run_ranks(["tests/parallel/bad_state_worker.py", str(output), *TRIALS], ranks=2, timeout=300)
    return torch.load(output)


@pytest.mark.parametrize("trial", TRIALS)
def test_the_others_train_as_if_the_row_had_been_reset(seen: dict[str, Any], trial: str) -> None:
    spoiled, by_hand = seen[trial]["spoiled"], seen[trial]["by hand"]
    for name in ("mended_rows", "reset_rows"):
        assert [step.pop(name) for step in spoiled["steps"]] == [(), (BAD_ROW,), ()]
        assert [step.pop(name) for step in by_hand["steps"]] == [(), (), ()]
    assert spoiled["steps"] == by_hand["steps"]
    assert not any(step["skipped"] for step in spoiled["steps"])
    files = [{path.name: path.read_bytes() for path in Path(run["folder"]).iterdir()} for run in (spoiled, by_hand)]
    assert len(files[0]) == 5 and files[0] == files[1], "weights, optimizer and states, bit for bit"


def rows_of(states: list[dict[str, Tensor]], row: int) -> dict[str, Tensor]:
    """A row of the step, from all ranks' states."""
    return {name: tensor[row % 2] for name, tensor in states[row // 2].items() if tensor.dim() and name != "restart"}


def assert_equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys() != set()
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("way", ["reset", "rollback"])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_row_that_a_step_spoils_goes_back_and_the_step_is_skipped(seen: dict[str, Any], trial: str, way: str) -> None:
    result = seen[trial][way]
    first, bad, after = result["steps"]
    assert (bad["skipped"], bad["mended_rows"], bad["bad_rows"]) == (True, (BAD_ROW,), (2, 3))
    rows = (bad["reset_rows"], bad["rolled_back_rows"])
    assert rows == (((BAD_ROW,), ()) if way == "reset" else ((), (BAD_ROW,)))
    assert math.isnan(bad["loss"]) and not math.isfinite(bad["norm"]) and result["unchanged"]
    for step in (first, after):
        assert (step["skipped"], step["mended_rows"], step["bad_rows"]) == (False, (), ())
        assert math.isfinite(step["loss"]) and math.isfinite(step["norm"])
    assert result["again"] == after, "a run that is resumed goes on alike"
    before, behind = ([states[part] for states in result["states"]] for part in (0, 1))
    for row in range(BAD_ROW):
        assert_equal(rows_of(behind, row), rows_of(seen[trial]["good"], row))
    if way == "rollback":
        assert_equal(rows_of(behind, BAD_ROW), rows_of(before, BAD_ROW))
    else:
        assert behind[1]["position"].tolist() == [32, 0]
        assert behind[1]["restart"].tolist() == [False, True]


def guard_of(*states: dict[str, Tensor], on_bad_state: str = "rollback") -> tuple[CarriedStates, StateGuard]:
    world = World(rank=1, size=2, local_rank=0, device=torch.device("cpu"))
    carried = CarriedStates(Mesh.data_parallel(world), micro_batch_size=2, accumulation=len(states))
    for index, state in enumerate(states):
        carried.put(index, state)
    return carried, StateGuard(carried, on_bad_state)


def state_of(values: list[float], cached: int = 1) -> dict[str, Tensor]:
    """An attention's state of one layer and two rows."""
    k = torch.tensor(values).view(2, 1, 1, 1).repeat(1, cached, 1, 1)
    named = {"layers.0.attention.k": k, "layers.0.attention.v": k.clone()}
    named["layers.0.attention.first_valid"] = torch.zeros(2, dtype=torch.int64)
    return {"position": torch.tensor([4, 4]), **named, "num_layers": torch.tensor(1)}


def test_finite_rows_looks_at_every_number() -> None:
    assert finite_rows(state_of([1.0, 2.0])).tolist() == [True, True]
    for bad in (math.nan, math.inf, -math.inf):
        state = state_of([1.0, 2.0], cached=3)
        state["layers.0.attention.v"][1, 2] = bad
        assert finite_rows(state).tolist() == [True, False]


def test_rows_are_numbered_over_ranks_and_micro_batches() -> None:
    _, guard = guard_of(state_of([math.nan, 1.0]), state_of([1.0, math.inf]))
    assert guard.before_step() == [2, 7]
    assert guard.before_step() == [], "they have gone back"


def test_a_state_without_a_good_one_before_it_begins_anew() -> None:
    """At the first step, and where the cache has grown since."""
    for before in ({}, state_of([5.0, 6.0], cached=1)):
        carried, guard = guard_of(before)
        assert guard.before_step() == []
        carried.put(0, state_of([1.0, math.nan], cached=2))
        assert guard.after_step([None]) == ([3], [])
        state = carried.get(0)
        assert state["restart"].tolist() == [False, True] and state["position"].tolist() == [4, 0]
        assert state["layers.0.attention.k"][:, 0, 0, 0].tolist() == [1.0, 0.0]


def test_a_row_that_goes_back_twice_is_well() -> None:
    carried, guard = guard_of(state_of([1.0, math.nan]))
    assert guard.before_step() == [3]
    carried.put(0, state_of([2.0, math.nan]))
    assert guard.after_step([None]) == ([], [3])
    state = carried.get(0)
    assert state["layers.0.attention.k"].flatten().tolist() == [2.0, 0.0]
    assert state["restart"].tolist() == [False, True], "of the state that it went back to"


def spoil_step(carried: CarriedStates, guard: StateGuard, *values: float) -> tuple[list[int], list[int]]:
    """A step that leads to a state of these values."""
    assert guard.before_step() == []
    carried.put(0, state_of(list(values)))
    return guard.after_step([None])


def test_a_row_that_is_spoiled_in_two_steps_running_begins_anew() -> None:
    carried, guard = guard_of(state_of([5.0, 6.0]))
    assert spoil_step(carried, guard, math.nan, 7.0) == ([], [2])
    assert spoil_step(carried, guard, math.nan, math.nan) == ([2], [3])
    assert carried.get(0)["layers.0.attention.k"].flatten().tolist() == [0.0, 7.0]
    assert spoil_step(carried, guard, 8.0, 9.0) == ([], [])
    assert spoil_step(carried, guard, math.nan, math.nan) == ([], [2, 3]), "a good step lies in between"
    assert carried.get(0)["layers.0.attention.k"].flatten().tolist() == [8.0, 9.0]


def test_so_it_does_where_the_run_was_resumed_in_between(tmp_path: Path) -> None:
    """On fewer ranks too: rows 2 and 3 are those of the second rank of two, or the last two of one."""
    for rank in range(2):
        world = World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"))
        carried = CarriedStates(Mesh.data_parallel(world), micro_batch_size=2, accumulation=1)
        carried.put(0, state_of([5.0, 6.0]))
        if rank == 1:
            assert spoil_step(carried, StateGuard(carried, "rollback"), 7.0, math.nan) == ([], [3])
        carried.file().write(tmp_path)
    for size, first in ((2, 2), (4, 0)):
        rank, ranks = (1, 2) if size == 2 else (0, 1)
        world = World(rank=rank, size=ranks, local_rank=rank, device=torch.device("cpu"))
        carried = CarriedStates(Mesh.data_parallel(world), micro_batch_size=size, accumulation=1)
        carried.read(tmp_path)
        assert carried.went_back == {3} and list(carried.rows(0)) == list(range(first, 4))
        guard = StateGuard(carried, "rollback")
        assert guard.before_step() == []
        carried.put(0, {n: t * math.nan if t.is_floating_point() else t for n, t in carried.get(0).items()})
        assert guard.after_step([None]) == ([3], list(range(first, 3)))
        carried.clear()
        assert carried.went_back == set()


def test_a_row_that_began_a_document_within_the_step_does_not_go_back_to_another() -> None:
    carried, guard = guard_of(state_of([5.0, 6.0]))
    assert guard.before_step() == []
    carried.put(0, state_of([math.nan, math.nan]))
    resets = torch.tensor([[False, True, False], [False, False, False]])
    assert guard.after_step([resets]) == ([2], [3])
    state = carried.get(0)
    assert state["layers.0.attention.k"].flatten().tolist() == [0.0, 6.0]
    assert state["restart"].tolist() == [True, False] and state["position"].tolist() == [0, 4]
