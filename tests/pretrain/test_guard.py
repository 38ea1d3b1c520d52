"""Steps that are not finite are skipped, counted and told; too many in a row end the run with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import TitansLM
from parallel.process import World
from pretrain.agreement import DivergedError
from pretrain.checkpoints import problems
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.schedule import learning_rate
from tests.training_cases import checkpoint, events, losses, weights_and_optimizer, write_recipe

MICRO_BATCHES = 2


pytestmark = pytest.mark.usefixtures("world")

Spoil = Callable[..., None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """spoil(2, 3): in the second and third step from now on the gradient is not finite, and the loss is: what an
    overflow in the backward pass alone looks like.
    """
    forward = TitansLM.forward

    def start(*steps: int) -> None:
        calls = iter(range(10**6))

        def spoiling(model: TitansLM, *arguments: Any, **options: Any) -> Any:
            output = forward(model, *arguments, **options)
            if output.loss_sum.requires_grad and next(calls) // MICRO_BATCHES + 1 in steps:
                output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
            return output

        monkeypatch.setattr(TitansLM, "forward", spoiling)

    return start


def recipe_of(data: Path, folder: Path, steps: int, *, every: int = 1, keep: int = 9, **training: Any) -> Path:
    """A checkpoint after `every` steps."""
    return write_recipe(
        data,
        folder,
        steps=steps,
        training=training,
        schedule={"kind": "constant", "warmup_tokens": 256},
        checkpoint={"every_tokens": 128 * every, "keep": keep},
        evaluation={"every_tokens": None, "tokens": 64},
    )


def trainer(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(folder, step) / "trainer.json").read_text())


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(point.step, point.value) for point in reader.Scalars(name)]


def test_a_bad_step_is_skipped_counted_and_told(
    data: Path, tmp_path: Path, world: World, spoil: Spoil, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, 4)
    spoil(2)
    train(load_phases(recipe), world)
    (skip,) = events(folder, "skip")
    assert (skip["step"], skip["tokens"], skip["in_a_row"], skip["total"]) == (2, 256, 1, 1)
    assert "phase" not in skip, "there is one"
    assert skip["gradient_norm"] == "inf" and 0 < skip["loss"] < 100 and skip["rows"] == []
    assert list(losses(folder)) == [1, 3, 4]
    assert curve(folder, "guard/skipped_steps") == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert [step for step, _ in curve(folder, "train/loss")] == [1, 3, 4]
    printed = capsys.readouterr().out
    assert "step 2: loss " in printed and "gradient norm inf: not finite, and skipped" in printed
    assert "(1 in a row, 3 end the run)" in printed and "OVERFLOW" not in printed
    assert weights_and_optimizer(folder, 1) == weights_and_optimizer(folder, 2) != weights_and_optimizer(folder, 3)
    assert [trainer(folder, step)["skipped_steps"] for step in range(1, 5)] == [0, 1, 1, 1]
    assert [trainer(folder, step)["skipped_in_a_row"] for step in range(1, 5)] == [0, 1, 0, 0]
    run = load_phases(recipe).run
    rates = [learning_rate(run.schedule, run.optimizer.lr, 128 * step, 512) for step in (1, 3, 4)]
    assert [event["learning_rate"] for event in events(folder, "step")] == rates, "the schedule goes by tokens"
    assert trainer(folder, 4)["cursor"]["position"] == 16, "and so does the data"


def test_too_many_in_a_row_end_the_run_with_a_checkpoint_that_resumes(
    data: Path, tmp_path: Path, world: World, spoil: Spoil
) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, 8, every=3, keep=1, max_bad_steps=2)
    spoil(2, 4, 5)
    message = "step 5: loss .*, gradient norm inf: not finite, the 2nd step in a row"
    with pytest.raises(DivergedError, match=message) as end:
        train(load_phases(recipe), world)
    assert f"{checkpoint(folder, 5)} holds weights and optimizer as the last good step, 3, left them" in str(end.value)
    assert "lower optimizer.lr" in str(end.value) and "training.max_bad_steps" in str(end.value)
    assert [skip["step"] for skip in events(folder, "skip")] == [2, 4, 5]
    assert events(folder)[-1]["event"] == "error" and events(folder)[-1]["type"] == "DivergedError"
    assert problems(checkpoint(folder, 5)) == []
    assert weights_and_optimizer(folder, 5) == weights_and_optimizer(folder, 3), "that one stays, whatever keep says"
    state = trainer(folder, 5)
    assert (state["skipped_steps"], state["skipped_in_a_row"], state["cursor"]["position"]) == (3, 0, 20)
    spoil(1)  # the first step behind the resume: one more may be skipped
    train(load_phases(recipe), world)
    assert [event["step"] for event in events(folder, "resume")] == [5]
    assert [(skip["step"], skip["in_a_row"], skip["total"]) for skip in events(folder, "skip")[3:]] == [(6, 1, 4)]
    assert list(losses(folder)) == [1, 3, 7, 8]
    assert events(folder)[-1]["event"] == "done"


def test_one_at_a_phases_end_stays_as_a_phases_last_checkpoint_does(
    data: Path, tmp_path: Path, world: World, spoil: Spoil
) -> None:
    """The run goes on in the next phase, and writes none there that the phase could be gone on from again."""
    folder = tmp_path / "run"
    recipe = recipe_of(data, folder, 2, keep=1, max_bad_steps=1)
    phases = load_phases(recipe, [("phases", "[{name: one}, {name: two}]")])
    spoil(2)
    with pytest.raises(DivergedError, match="step 2: "):
        train(phases, world)
    spoil()
    train(phases, world)
    assert [(skip["step"], skip["phase"]) for skip in events(folder, "skip")] == [(2, "one")]
    assert [event["step"] for event in events(folder, "resume")] == [2]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000004"]
    spoil(1)
    with pytest.raises(DivergedError, match="step 5: "):
        train(load_phases(recipe, [("phases", "[{name: one}, {name: two, training: {tokens: 512}}]")]), world)
    assert checkpoint(folder, 5).exists() and not (checkpoint(folder, 5) / "stays").exists(), "inside the phase"


def test_a_resumed_run_goes_on_counting(data: Path, tmp_path: Path, world: World, spoil: Spoil) -> None:
    folder = tmp_path / "run"
    spoil(2, 3)
    train(load_phases(recipe_of(data, folder, 3)), world)
    assert trainer(folder, 3)["skipped_in_a_row"] == 2
    spoil(1)
    with pytest.raises(DivergedError, match="step 4: .* the 3rd step in a row"):
        train(load_phases(recipe_of(data, folder, 6)), world)
    assert events(folder, "skip")[-1]["total"] == 3


def test_a_good_step_in_between_begins_the_count_anew(data: Path, tmp_path: Path, world: World, spoil: Spoil) -> None:
    folder = tmp_path / "run"
    spoil(1, 2, 4, 5)
    train(load_phases(recipe_of(data, folder, 6)), world)
    assert [skip["in_a_row"] for skip in events(folder, "skip")] == [1, 2, 1, 2]
    assert list(losses(folder)) == [3, 6]
