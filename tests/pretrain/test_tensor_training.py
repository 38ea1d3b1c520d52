"""Whole runs of a small MAC on tensor ranks: they learn and score what data-parallel ranks do, and each goes on from
the other's checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed_helper import run_ranks
from tests.training_cases import assert_exports_the_same, assert_same_learning, assert_same_scores, write_recipe

WORKER = "tests/pretrain/train_worker.py"
STEPS = 4
RUNS = {
    "data": [(STEPS, {"tensor": 1})],
    "tensor": [(STEPS, {"tensor": 2, "zero_stage": 3})],
    "tensor-then-data": [(2, {"tensor": 2}), (STEPS, {"tensor": 1})],
    "data-then-tensor": [(2, {"tensor": 1}), (STEPS, {"tensor": 2, "zero_stage": 0})],
}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    recipes = []
    schedule = {"kind": "constant", "warmup_tokens": 0}
    for name, parts in RUNS.items():
        for steps, parallel in parts:
            path = write_recipe(data, folder / name, steps=steps, parallel=parallel, schedule=schedule)
            recipes.append(path.rename(folder / f"{name}-{steps}.yaml"))
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


@pytest.mark.parametrize("run", list(RUNS)[1:])
def test_tensor_ranks_learn_what_data_parallel_ranks_do(runs: Path, run: str) -> None:
    assert_same_learning(runs / run, runs / "data", steps=STEPS)


def test_held_out_text_is_scored_once(runs: Path) -> None:
    assert_same_scores(runs / "tensor", runs / "data")


@pytest.mark.parametrize("run", ["tensor", "data-then-tensor"])
def test_what_tensor_ranks_saved_is_exported_whole(runs: Path, run: str, tmp_path: Path) -> None:
    assert_exports_the_same(runs / run, runs / "data", tmp_path, step=STEPS)
