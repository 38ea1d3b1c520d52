"""Spikes in a run: told, skipped without a trace, gone back behind with their data left out, and the same through a
kill at any place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.process import World
from pretrain.agreement import DivergedError
from pretrain.loop import train
from pretrain.phases import load_phases
from tests.pretrain.spikes_by_place import Killed, numbers, spikes_at
from tests.training_cases import VOCABULARY, checkpoint, events, losses, recipe_fields, weights_and_optimizer

GUARDS = {"on_spike": "skip", "loss_z": 30.0, "gradient_norm_z": 50.0, "window": 12, "warmup_steps": 10}
MODEL = {
    "preset": "transformer-tiny",
    "vocab_size": VOCABULARY,
    "dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_dim": 24,
}
EVERY = 4
"""Steps between checkpoints."""


pytestmark = pytest.mark.usefixtures("world")


def recipe_of(data: Path, folder: Path, steps: int, *, every: int = EVERY, **guards: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fields = recipe_fields(
        data,
        folder,
        steps=steps,
        training={"micro_batch_size": 4},
        schedule={"kind": "cosine", "warmup_tokens": 256},
        checkpoint={"every_tokens": 128 * every, "keep": 99},
        evaluation={"every_tokens": None, "tokens": 64},
    )
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields | {"model": MODEL, "guards": GUARDS | guards}))
    return path


def trainer(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(folder, step) / "trainer.json").read_text())


def curve(folder: Path, name: str) -> dict[int, float]:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {point.step: point.value for point in reader.Scalars(name)}


def test_a_spike_is_skipped_without_a_trace_and_training_goes_on(
    data: Path, tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with spikes_at(13):
        train(load_phases(recipe_of(data, folder, 17, every=1)), world)
    (spike,) = events(folder, "spike")
    assert (spike["step"], spike["tokens"], spike["action"]) == (14, 1792, "skip")
    assert (spike["in_a_row"], spike["total"]) == (1, 1)
    assert (spike["of_tokens"], spike["of_rows"]) == ([13 * 128, 14 * 128], [13 * 4, 14 * 4])
    assert spike["loss"] > 100 and spike["z"]["loss"] > 30 and spike["z"]["gradient_norm"] > 50
    assert not events(folder, "skip") and not events(folder, "rollback"), "it is finite, and one alone"
    assert weights_and_optimizer(folder, 13) == weights_and_optimizer(folder, 14) != weights_and_optimizer(folder, 15)
    assert trainer(folder, 14)["spikes"]["in_a_row"] == 1 and trainer(folder, 15)["spikes"]["in_a_row"] == 0
    assert trainer(folder, 14)["spikes"]["losses"] == trainer(folder, 13)["spikes"]["losses"], "nothing to compare with"
    assert list(losses(folder)) == list(range(1, 18)) and losses(folder)[14] == spike["loss"]
    assert set(curve(folder, "guard/spikes").values()) == {0, 1}
    z = curve(folder, "guard/loss_z")
    assert list(z) == list(range(11, 18)) and z[14] == pytest.approx(spike["z"]["loss"], rel=1e-6)
    assert max(value for step, value in z.items() if step != 14) < 10
    assert len(curve(folder, "guard/gradient_norm_z")) == 7
    assert "step 14: loss " in (printed := capsys.readouterr().out) and "skipped; weights and optimizer" in printed


def test_log_tells_and_changes_nothing(data: Path, tmp_path: Path, world: World) -> None:
    told, off = tmp_path / "told", tmp_path / "off"
    with spikes_at(12, 14):
        train(load_phases(recipe_of(data, told, 16, on_spike="log")), world)
        train(load_phases(recipe_of(data, off, 16, on_spike="log", loss_z=None, gradient_norm_z=None)), world)
    assert [(spike["step"], spike["action"]) for spike in events(told, "spike")] == [(13, "log"), (15, "log")]
    assert not events(off, "spike")
    assert losses(told) == losses(off)
    assert weights_and_optimizer(told, 16) == weights_and_optimizer(off, 16) != {}


SPIKES = (14, 15, 16)
STEPS = 20


def assert_went_back_once(folder: Path, seen: list[int]) -> None:
    assert seen == list(range(len(seen))), "no data twice, and none but the spikes' is left out"
    assert [spike["step"] for spike in events(folder, "spike")] == numbers(SPIKES)
    (back,) = events(folder, "rollback")
    assert (back["from_step"], back["to_step"], back["first_spike"]) == (17, 12, 15)
    assert (back["tokens"], back["to_tokens"], back["rows"]) == (17 * 128, 12 * 128, [14 * 4, 17 * 4])
    assert weights_and_optimizer(folder, 17) == weights_and_optimizer(folder, 12)
    state, earlier = trainer(folder, 17), trainer(folder, 12)
    assert (state["step"], state["tokens"], state["cursor"]["position"]) == (17, 12 * 128, 17 * 4)
    assert state["spikes"] == earlier["spikes"] | {"total": 3, "rollbacks": 1}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A run with three spikes in a row that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with spikes_at(*SPIKES) as place:
        train(load_phases(recipe_of(data, folder, STEPS, max_spikes=3)), world)
    assert_went_back_once(folder, place.seen)
    return folder


def test_spikes_in_a_row_go_back_and_the_run_has_all_its_tokens(whole: Path) -> None:
    last = STEPS + 5  # two steps that were taken, and three that were not, do not count
    assert events(whole)[-1]["event"] == "done" and events(whole)[-1]["tokens"] == STEPS * 128
    assert max(losses(whole)) == last and trainer(whole, last)["tokens"] == STEPS * 128
    rates = {event["tokens"]: event["learning_rate"] for event in events(whole, "step")}
    by_step = {event["step"]: event for event in events(whole, "step")}
    for step in range(18, last + 1):
        assert by_step[step]["tokens"] == (step - 5) * 128
        assert by_step[step]["learning_rate"] == rates[by_step[step]["tokens"]], "the schedule goes by tokens"
    assert not [step for step, value in losses(whole).items() if value > 20 and step not in numbers(SPIKES)]


@pytest.mark.parametrize("dies_at", [15, 16, 17, 18])
def test_a_run_killed_anywhere_in_it_is_bitwise_the_same(
    data: Path, tmp_path: Path, world: World, whole: Path, dies_at: int
) -> None:
    """In the row of spikes, between two of them, and behind the way back."""
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, STEPS, every=1 if dies_at == 16 else EVERY, max_spikes=3)
    with spikes_at(*SPIKES, dies_at=dies_at), pytest.raises(Killed):
        train(load_phases(recipe), world)
    with spikes_at(*SPIKES) as place:
        train(load_phases(recipe), world)
    if dies_at == 16:  # it has checkpoints of other steps: it goes back to the one before the spikes
        assert place.seen[0] == 16 and events(folder, "rollback")[-1]["to_step"] == 14
        return
    assert place.seen[0] == (12 if dies_at < 17 else 17), "from the newest checkpoint, which the way back wrote"
    last = STEPS + 5
    assert {s: v for s, v in losses(folder).items() if s > 12} == {s: v for s, v in losses(whole).items() if s > 12}
    assert weights_and_optimizer(folder, last) == weights_and_optimizer(whole, last) != {}
    assert trainer(folder, last) == trainer(whole, last)


def test_a_run_that_goes_back_too_often_ends_with_a_checkpoint(data: Path, tmp_path: Path, world: World) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, STEPS, max_spikes=2, max_rollbacks=1)
    with (
        spikes_at(14, 15, 17, 18),
        pytest.raises(DivergedError, match="step 19: 2 steps in a row, from step 18") as end,
    ):
        train(load_phases(recipe), world)
    assert "the phase went back 1 time(s) already, as often as guards.max_rollbacks allows" in str(end.value)
    assert str(checkpoint(folder, 19)) in str(end.value)
    assert [back["to_step"] for back in events(folder, "rollback")] == [12]
    assert events(folder)[-1]["type"] == "DivergedError"
    with spikes_at() as place:
        train(load_phases(recipe), world)
    assert place.seen[0] == 19 and events(folder)[-1]["event"] == "done"


def test_without_an_earlier_checkpoint_there_is_nothing_to_go_back_to(data: Path, tmp_path: Path, world: World) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, STEPS, every=STEPS, max_spikes=2)
    with spikes_at(14, 15), pytest.raises(DivergedError, match="no whole checkpoint of this phase from before"):
        train(load_phases(recipe), world)
    assert not events(folder, "rollback") and checkpoint(folder, 16).is_dir()


def test_a_later_phase_goes_back_to_its_beginning_at_most(data: Path, tmp_path: Path, world: World) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, 12, every=STEPS, max_spikes=2)
    phases = "[{name: one}, {name: two, training: {tokens: 1920}, checkpoint: {every_tokens: null}}]"
    with spikes_at(11, 12) as place:  # the first phase's last step, and two of the second
        train(load_phases(recipe, [("phases", phases)]), world)
    found = [(spike["step"], spike["phase"]) for spike in events(folder, "spike")]
    assert found == [(12, "one"), (24, "two"), (25, "two")]
    (back,) = events(folder, "rollback")
    assert (back["phase"], back["from_step"], back["to_step"], back["to_tokens"]) == ("two", 25, 12, 12 * 128)
    assert weights_and_optimizer(folder, 25) == weights_and_optimizer(folder, 12)
    assert place.seen == [*range(12), *range(28)], "15 steps of the second phase, and the 13 that do not count"
    assert events(folder)[-1]["tokens"] == 27 * 128
