"""Rows that go on from step to step, against documents by hand: in every ZeRO stage, whole and by segments, saved by
one number of ranks and gone on with by another.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import ModelState
from parallel.carried_states import CarriedStates
from parallel.process import World
from tests.distributed_helper import run_ranks
from tests.model_cases import build_model, random_tokens
from tests.parallel.carried_worker import HALF, LENGTH, ROWS, STEPS, TRIALS, Trial, optimizer_of, streams
from tests.streams_by_hand import train_by_hand

WORKER = "tests/parallel/carried_worker.py"

Seen = dict[str, dict[str, Any]]


@cache
def by_hand(case: str) -> list[float]:
    model = build_model(case, torch.float32)
    return train_by_hand(model, optimizer_of(model), **vars(streams()), steps=STEPS)


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


def states_of(world_size: int, rank: int, accumulation: int, size: int) -> CarriedStates:
    world = World(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"))
    return CarriedStates(world, micro_batch_size=size, accumulation=accumulation)


def written(folder: Path, world_size: int, accumulation: int, size: int) -> ModelState:
    """The state of 4 rows after a few tokens, written by so many ranks."""
    folder.mkdir()
    state = build_model("mag", torch.float32)(random_tokens(ROWS, 11)).state
    state = state.reset_rows(torch.tensor([False, False, True, False]))
    for rank in range(world_size):
        carried = states_of(world_size, rank, accumulation, size)
        for m in range(accumulation):
            rows = carried.rows(m)
            flat = {n: t[rows.start : rows.stop] if t.dim() else t for n, t in state.flat().items()}
            if not flat["restart"].any():
                del flat["restart"]
            carried.put(m, flat)
        carried.write(folder)
    return state


@pytest.mark.parametrize("saved", [(1, 1, 4), (1, 4, 1), (2, 2, 1), (4, 1, 1)])
@pytest.mark.parametrize("loaded", [(1, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_any_layout_reads_what_any_other_wrote_bit_for_bit(tmp_path: Path, saved: tuple, loaded: tuple) -> None:
    state = written(tmp_path / "state", *saved)
    for rank in range(loaded[0]):
        carried = states_of(loaded[0], rank, *loaded[1:])
        carried.read(tmp_path / "state")
        for m in range(loaded[1]):
            found, rows = ModelState.from_tensors(carried.get(m)).tensors(), carried.rows(m)
            assert ("restart" in found) == (2 in rows)
            for name, tensor in state.tensors().items():
                if name == "restart" and 2 not in rows:
                    continue
                assert torch.equal(found[name], tensor[rows.start : rows.stop] if tensor.dim() else tensor), name


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "transformer-window"])
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_rows_go_on_in_another_precision(tmp_path: Path, case: str, saved: torch.dtype, loaded: torch.dtype) -> None:
    """As from their states rounded to it by hand."""
    tokens, carried = random_tokens(ROWS, 30), states_of(1, 0, 1, ROWS)
    carried.put(0, build_model(case, saved)(tokens[:, :11]).state.flat())
    carried.write(tmp_path)
    carried.read(tmp_path)
    model = build_model(case, loaded)
    types = {name: tensor.dtype for name, tensor in model(tokens[:, :11]).state.flat().items()}
    rounded = {name: tensor.to(types[name]) for name, tensor in carried.get(0).items()}
    assert any(tensor.dtype != rounded[name].dtype for name, tensor in carried.get(0).items())
    got, expected = (model(tokens[:, 11:], ModelState.from_tensors(state)) for state in (carried.get(0), rounded))
    assert torch.equal(got.logits, expected.logits)
    assert {name: tensor.dtype for name, tensor in got.state.flat().items()} == types


def test_other_rows_and_none_at_all_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "state", 2, 1, 2)
    with pytest.raises(ValueError, match="holds the states of 4 rows, and a step has 6: rows that go on"):
        states_of(1, 0, 3, 2).read(tmp_path / "state")
    (tmp_path / "state" / "carried-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="holds the states of 2 rows, and a step has 4"):
        states_of(1, 0, 1, 4).read(tmp_path / "state")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no carried states"):
        states_of(1, 0, 1, 4).read(tmp_path / "none")


def test_rows_that_have_read_nothing_begin(tmp_path: Path) -> None:
    states_of(1, 0, 2, 2).write(tmp_path)
    carried = states_of(1, 0, 1, 4)
    carried.put(0, {"position": torch.ones(4)})
    carried.read(tmp_path)
    assert carried.get(0) == {}


def test_what_is_put_is_kept_whatever_becomes_of_it() -> None:
    carried, tensor = states_of(1, 0, 1, 4), torch.ones(4, 2, requires_grad=True)
    carried.put(0, {"x": (2 * tensor)[:, :1]})
    kept = carried.get(0)["x"]
    assert not kept.requires_grad and kept.untyped_storage().nbytes() == 16
    earlier = carried.get(0)
    carried.put(0, {"x": torch.zeros(4, 1)})
    carried.put(0, earlier)
    assert torch.equal(carried.get(0)["x"], 2 * torch.ones(4, 1))
