"""Whole runs on synthetic rows: killed ones go on bit for bit, every layout scores alike, other data is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.mesh import Mesh
from parallel.process import World
from pretrain.config import load_recipe
from pretrain.data import TokenizerInfo
from pretrain.errors import UserError
from pretrain.loop import open_training_data
from pretrain.phases import load_phases
from pretrain.plan import describe
from pretrain.resume import check_fits, read_trainer_state
from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, pretrain, write_synthetic_recipe
from tools.export import main as export

STEPS = 14
WORKER = "tests/pretrain/train_worker.py"


def write(folder: Path, **sections: Any) -> Path:
    """A recipe of recall, small enough for seconds."""
    return write_synthetic_recipe(folder, steps=STEPS, **sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks in one launch, never stopped: ZeRO 1 and 3."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = [write(folder / f"zero{stage}", parallel={"zero_stage": stage}) for stage in (1, 3)]
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=200)
    return folder


def scores(folder: Path) -> dict[int, tuple[float, int, int]]:
    return {e["step"]: (e["loss"], e["scored_tokens"], e["correct"]) for e in events(folder, "eval")}


def test_a_killed_run_goes_on_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = write(folder, parallel={"zero_stage": 3})
    killed = pretrain(recipe, ranks=2, check=False, kill_when=lambda: len(losses(folder)) >= 9)
    assert set(killed.codes) == {-9} and not events(folder, "done")
    # Another number of workers as well: it must not move the rows.
    pretrain(recipe, "--data.num_workers", "0", ranks=2)
    (resume,) = events(folder, "resume")
    assert resume["step"] in (4, 8, 12)
    assert losses(folder) == losses(runs / "zero3")
    assert len(losses(folder)) == STEPS
    assert scores(folder) == scores(runs / "zero3")


def test_layouts_agree_on_loss_and_accuracy(runs: Path) -> None:
    assert losses(runs / "zero3") == pytest.approx(losses(runs / "zero1"), rel=1e-5)
    last = scores(runs / "zero1")[STEPS]
    assert last[1] == 8 * 4, "of 250 held-out tokens, 8 rows of 4 answers"
    assert scores(runs / "zero3")[STEPS][2] == last[2]


def test_accuracy_is_among_the_curves_and_bits_per_byte_is_not(runs: Path) -> None:
    reader = EventAccumulator(str(runs / "zero1" / "tensorboard")).Reload()
    curves = {name: reader.Scalars(name) for name in reader.Tags()["scalars"]}
    assert "evaluation/bits_per_byte" not in curves
    drawn = {point.step: point.value for point in curves["evaluation/accuracy"]}
    written = {step: right / scored for step, (_, scored, right) in scores(runs / "zero1").items()}
    assert drawn == pytest.approx(written) and STEPS in drawn
    assert {event["step"]: event["accuracy"] for event in events(runs / "zero1", "eval")} == written


def test_a_checkpoint_of_data_without_a_tokenizer_holds_none_and_is_not_exported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs / "zero1" / "checkpoints" / f"step-{STEPS:08d}"
    assert checkpoint.is_dir() and not list(checkpoint.glob("tokenizer*"))
    assert export([str(checkpoint), "--output", str(tmp_path / "model")]) == 2
    assert "data without a tokenizer (data.kind synthetic)" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_going_on_with_text_is_refused(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "zero1" / "checkpoints" / f"step-{STEPS:08d}"
    tokenizer = TokenizerInfo(tmp_path, "0" * 64, 400, None, None, 2, None)
    with pytest.raises(UserError, match="was trained without a tokenizer, and the recipe's data.kind"):
        check_fits(checkpoint, load_phases(runs / "zero1.yaml"), tokenizer)


def test_the_dry_run_says_what_the_task_is(runs: Path) -> None:
    text = describe(load_phases(runs / "zero1.yaml"), 2)
    assert "# data                recall, 35 different tokens, rows of up to 32; guessing gets 12 % right" in text
    assert "# held-out data       rows of the same task from another stream" in text


def test_another_task_is_refused_at_resume(runs: Path) -> None:
    recipe = load_recipe(runs / "zero1.yaml", [("data.task.num_values", "9")])
    state = read_trainer_state(runs / "zero1" / "checkpoints" / f"step-{STEPS:08d}")
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"data\.task is not what the run began with"):
        open_training_data(
            recipe, recipe.batches(1), Mesh.data_parallel(world), recipe.data.open(0, grid=1).train, state
        )
