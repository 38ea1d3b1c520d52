"""A whole run on two ranks whose rows carry their state: one row's is not finite, and the others do not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config import load_recipe
from pretrain.errors import UserError
from tests.distributed_helper import run_ranks
from tests.pretrain.spoiling_worker import ROW, ROWS, STEP
from tests.training_cases import events, losses, write_recipe

STEPS = 5


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spoiled, reset by hand, left alone, and spoiled within a step: four rows on two ranks. `output` is what the main
    rank printed.
    """
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        plan: write_recipe(data, folder / plan, steps=STEPS, parallel={"zero_stage": 2})
        for plan in ("state", "by-hand", "none")
    }
    recipes["within"] = write_recipe(data, folder / "within", steps=2 * STEPS, training={"on_bad_state": "rollback"})
    plans = [f"{plan}={path}" for plan, path in recipes.items()]
    finished = run_ranks(["tests/pretrain/spoiling_worker.py", *plans], ranks=2, timeout=300)
    (folder / "output").write_text(finished.outputs[0])
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


def test_a_row_that_cannot_go_back_is_said_to_begin_anew(runs: Path) -> None:
    """Under rollback, where a document began in it within the step that spoiled it; the other row goes back."""
    spoiled = json.loads((runs / "within.json").read_text())
    (anew,) = spoiled["begun"]
    (back,) = {*ROWS} - {anew}
    told = [(event["step"], event["action"], event["rows"]) for event in events(runs / "within", "bad_state")]
    assert told == [(spoiled["step"], "reset", [anew]), (spoiled["step"], "rollback", [back])]
    assert [event["total"] for event in events(runs / "within", "bad_state")] == [2, 2]
    assert [(event["step"], event["rows"]) for event in events(runs / "within", "skip")] == [(spoiled["step"], ROWS)]
    assert len(losses(runs / "within")) == 2 * STEPS - 1 and events(runs / "within")[-1]["event"] == "done"
    printed = (runs / "output").read_text()
    assert f"step {spoiled['step']}: the state of rows {anew} is not finite; they begin anew" in printed
    assert f"step {spoiled['step']}: the state of rows {back} is not finite; they go on from their last good" in printed


def test_rolling_back_belongs_to_rows_that_carry_a_state(data: Path, tmp_path: Path) -> None:
    path = write_recipe(data, tmp_path / "run")
    with pytest.raises(UserError, match="training.on_bad_state is rollback, but no row carries a state"):
        load_recipe(path, [("training.on_bad_state", "rollback")])
    streams = [("data.order", "streams"), ("training.on_bad_state", "rollback")]
    assert load_recipe(path, streams).training.on_bad_state == "rollback"
