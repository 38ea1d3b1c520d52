"""Whole training runs in a pipeline of two stages: the losses of one process, by segments too, resumed, and gone on
with in another layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed_helper import run_ranks
from tests.training_cases import assert_exports_the_same, events, losses, write_recipe

STEPS, HALF = 4, 2
WORKER = "tests/pretrain/train_worker.py"
SEGMENTS = {"segment_length": 8}


def make_recipe(
    data: Path, folder: Path, steps: int = STEPS, *, pipeline: int = 2, **sections: Mapping[str, Any]
) -> Path:
    """A recipe whose rate does not depend on how many steps there are to be."""
    shared = {
        "schedule": {"kind": "constant", "warmup_tokens": 0},
        "parallel": {"pipeline": pipeline},
        "checkpoint": {"every_tokens": 128 * HALF},
        "evaluation": {"every_tokens": 128 * HALF, "tokens": 200},
        "logging": {"every_steps": 1, "memory_every_steps": 1},
    }
    path = write_recipe(data, folder, steps=steps, **(shared | sections))
    return path.rename(path.with_name(f"{folder.name}-{steps}-{pipeline}.yaml"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on whole rows; two stages by segments, resumed half way."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks([WORKER, str(make_recipe(data, folder / "alone", pipeline=1))], ranks=1, timeout=300)
    recipes = [make_recipe(data, folder / "segments", steps, training=SEGMENTS) for steps in (HALF, STEPS)]
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


def test_the_losses_are_those_of_one_process(runs: Path) -> None:
    expected = losses(runs / "alone")
    assert list(expected) == [1, 2, 3, 4]
    assert losses(runs / "segments") == pytest.approx(expected, rel=1e-5)
    norms, others = ([event["gradient_norm"] for event in events(runs / run, "step")] for run in ("segments", "alone"))
    assert norms == pytest.approx(others, rel=1e-4)
    assert [event["step"] for event in events(runs / "segments", "resume")] == [HALF]


def test_held_out_scores_are_those_of_one_process(runs: Path) -> None:
    scores, expected = (events(runs / name, "eval") for name in ("segments", "alone"))
    assert len(scores) == len(expected) == 2
    for found, other in zip(scores, expected, strict=True):
        assert (found["tokens"], found["loss"]) == (other["tokens"], pytest.approx(other["loss"], rel=1e-5))


def test_what_stages_saved_is_exported_whole(runs: Path, tmp_path: Path) -> None:
    assert_exports_the_same(runs / "segments", runs / "alone", tmp_path, step=STEPS)


@pytest.mark.slow
def test_streams_go_on_in_every_stage_and_behind_another_layout(data: Path, tmp_path: Path) -> None:
    streams = {"order": "streams"}
    run_ranks([WORKER, str(make_recipe(data, tmp_path / "alone", pipeline=1, data=streams))], ranks=1, timeout=300)
    recipes = [
        make_recipe(data, tmp_path / "streams", HALF, data=streams),
        make_recipe(data, tmp_path / "streams", data=streams),
        make_recipe(data, tmp_path / "to-data-parallel", HALF, data=streams),
        make_recipe(data, tmp_path / "to-data-parallel", pipeline=1, data=streams),
        make_recipe(data, tmp_path / "to-pipeline", HALF, pipeline=1, data=streams),
        make_recipe(data, tmp_path / "to-pipeline", data=streams),
    ]
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    for run in ("streams", "to-data-parallel", "to-pipeline"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_the_bubble_is_told(runs: Path) -> None:
    assert all(event["bubble"] > 0 for event in events(runs / "segments", "step"))
    assert not any("bubble" in event for event in events(runs / "alone", "step"))
