"""A whole run on two ranks whose rows carry their state: one row's is not finite, and the others do not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config import load_recipe
from pretrain.errors import UserError
from tests.distributed_helper import run_ranks
from tests.pretrain.spoiling_worker import ROW, STEP
from tests.training_cases import events, losses, make_data, write_recipe

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spoiled, reset by hand, and left alone: four rows on two ranks, five steps each."""
    folder = tmp_path_factory.mktemp("runs")
    plans = []
    for plan in ("state", "by-hand", "none"):
        plans.append(f"{plan}={write_recipe(data, folder / plan, steps=STEPS, parallel={'zero_stage': 2})}")
    run_ranks(["tests/pretrain/spoiling_worker.py", *plans], ranks=2, timeout=300)
    return folder


def test_the_other_rows_train_as_if_the_row_had_been_reset(runs: Path) -> None:
    assert losses(runs / "state") == losses(runs / "by-hand")
    assert list(losses(runs / "state")) == list(range(1, STEPS + 1))
    assert losses(runs / "state") != losses(runs / "none")
    last = [runs / plan / "checkpoints" / f"step-{STEPS:08d}" for plan in ("state", "by-hand")]
    files = [{p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in last]
    assert len(files[0]) >= 4 and files[0] == files[1], "weights, optimizer and carried states"


def test_it_is_in_the_log_and_among_the_curves(runs: Path) -> None:
    (event,) = events(runs / "state", "bad_state")
    assert (event["step"], event["rows"], event["action"], event["total"]) == (STEP, [ROW], "reset", 1)
    assert not events(runs / "state", "skip")
    assert events(runs / "state")[-1]["event"] == "done"
    reader = EventAccumulator(str(runs / "state" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {point.step: point.value for point in reader.Scalars("guard/bad_states")}
    assert points == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert not events(runs / "none", "bad_state")


def test_rolling_back_belongs_to_rows_that_carry_a_state(data: Path, tmp_path: Path) -> None:
    path = write_recipe(data, tmp_path / "run")
    with pytest.raises(UserError, match="training.on_bad_state is rollback, but no row carries a state"):
        load_recipe(path, [("training.on_bad_state", "rollback")])
    streams = [("data.order", "streams"), ("training.on_bad_state", "rollback")]
    assert load_recipe(path, streams).training.on_bad_state == "rollback"
