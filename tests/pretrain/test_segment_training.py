"""Whole training runs by segments: the losses of whole rows, killed and resumed runs, a changed cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, pretrain, write_recipe

STEPS, HALF = 4, 2
WORKER = "tests/pretrain/train_worker.py"
CONSTANT = {"kind": "constant", "warmup_tokens": 0}
EXACT = {"segment_length": 8, "boundary_states": "disk"}
TRUNCATED = {"segment_length": 8, "gradient": "truncated", "truncate_every": 1}


def make_recipe(data: Path, folder: Path, training: dict[str, Any], *, steps: int = STEPS, stage: int = 1) -> Path:
    """A recipe whose rate does not depend on how many steps there are to be."""
    path = write_recipe(
        data,
        folder,
        steps=steps,
        schedule=CONSTANT,
        training=training,
        parallel={"zero_stage": stage, "activation_checkpointing": stage == 3},
        checkpoint={"every_tokens": 128 * HALF},
        evaluation={"every_tokens": None},
    )
    return path.rename(path.with_name(f"{folder.name}-{steps}-{len(training)}.yaml"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two ranks: whole rows; segments under ZeRO 3 in one go and resumed; begun on whole rows and gone
    on by segments, with accumulation; truncated.
    """
    folder = tmp_path_factory.mktemp("runs")
    recipes = [
        make_recipe(data, folder / "whole", {}),
        make_recipe(data, folder / "exact", EXACT, stage=3),
        make_recipe(data, folder / "resumed", EXACT, stage=3, steps=HALF),
        make_recipe(data, folder / "resumed", EXACT, stage=3),
        make_recipe(data, folder / "changed", {}, steps=HALF),
        make_recipe(data, folder / "changed", {"segment_length": 16, "micro_batch_size": 1}),
        make_recipe(data, folder / "truncated", TRUNCATED),
    ]
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


@pytest.mark.parametrize("run", ["exact", "resumed", "changed"])
def test_segments_give_the_losses_of_whole_rows(runs: Path, run: str) -> None:
    expected = losses(runs / "whole")
    assert list(expected) == list(range(1, STEPS + 1))
    assert losses(runs / run) == pytest.approx(expected, rel=1e-5)
    for field in ("tokens", "gradient_norm"):
        seen, whole = ([e[field] for e in events(runs / name, "step")] for name in (run, "whole"))
        assert seen == pytest.approx(whole, rel=1e-3)


def test_a_resumed_run_repeats_every_bit(runs: Path) -> None:
    assert [event["step"] for event in events(runs / "resumed", "resume")] == [HALF]
    assert losses(runs / "resumed") == losses(runs / "exact")


def test_truncated_gradients_train_another_model(runs: Path) -> None:
    whole, truncated = losses(runs / "whole"), losses(runs / "truncated")
    assert truncated[1] == pytest.approx(whole[1], rel=1e-5)
    assert truncated[STEPS] != pytest.approx(whole[STEPS], rel=1e-5)
    assert truncated[STEPS] < truncated[1]


def test_a_run_says_where_the_states_wait(runs: Path) -> None:
    (asked,) = events(runs / "exact", "start")
    assert asked["boundary_states"]["place"] == "disk"
    (chosen,) = events(runs / "changed", "resume")
    assert chosen["boundary_states"]["place"] == "device", "a few kilobytes, where the recipe says nothing"
    assert chosen["boundary_states"]["bytes"] > 0 and "free on the device" in chosen["boundary_states"]["why"]
    assert "boundary_states" not in events(runs / "whole", "start")[0]


def test_nothing_of_the_states_on_disk_is_left(runs: Path) -> None:
    for run in ("exact", "resumed"):
        assert sorted(path.name for path in (runs / run).iterdir() if path.is_dir()) == ["checkpoints", "tensorboard"]


def test_a_killed_run_goes_on_and_leaves_nothing_behind(data: Path, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_recipe(data, folder, EXACT)
    killed = pretrain(
        recipe,
        check=False,
        kill_when=lambda: (
            len(losses(folder)) >= HALF + 1 and bool(events(folder, "save")) and any(folder.glob("boundary-states-*/*"))
        ),
    )
    assert killed.codes == [-9]
    assert not events(folder, "done")
    (folder / "boundary-states-of-it").mkdir()  # the one it was in may have been at its end
    pretrain(recipe)
    assert [event["step"] for event in events(folder, "resume")] == [HALF]
    assert losses(folder) == pytest.approx(losses(runs / "whole"), rel=1e-5)
    assert not list(folder.glob("boundary-states-*"))


def test_a_full_disk_ends_both_ranks_with_the_option_and_the_folder(
    data: Path, mount_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = mount_disk("300k")
    recipe = make_recipe(data, tmp_path / "run", EXACT)
    options = ("--folder", str(disk), "--guards.preflight", "false")  # which would find it full before
    finished = pretrain(recipe, *options, ranks=2, check=False)
    assert 2 in finished.codes and 0 not in finished.codes, finished.report()
    message = f"training.boundary_states: disk failed at {disk}/boundary-states-"
    refusals = [error for error in finished.errors if message in error]
    assert refusals and "No space left on device" in refusals[0] and "set it to host" in refusals[0]
    assert "Traceback" not in refusals[0]
    assert finished.seconds < 60
