"""Whole runs of a small MAG on ranks that share rows, as streams whose documents begin inside rows: they learn and
score what data-parallel ranks do, and each goes on from the other's checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed_helper import run_ranks
from tests.training_cases import assert_same_learning, assert_same_scores, events, recipe_fields

WORKER = "tests/pretrain/train_worker.py"
STEPS = 4
SHARED = {"sequence": 2, "zero_stage": 3, "activation_checkpointing": True}
RUNS = {
    "data": [(STEPS, {"zero_stage": 1})],
    "sequence": [(STEPS, SHARED)],
    "sequence-then-data": [(2, {"sequence": 2}), (STEPS, {"zero_stage": 2})],
    "data-then-sequence": [(2, {"zero_stage": 3}), (STEPS, {"sequence": 2, "zero_stage": 2})],
}
FIELDS: dict[str, dict[str, Any]] = {
    "model": {"preset": "mag-tiny", "segment": None, "window": 12},
    "training": {"segment_length": 16},
    "evaluation": {"context": 45, "tokens": 300, "by_position": True, "reset_window": 16},  # ends in an odd stretch
    "schedule": {"kind": "constant", "warmup_tokens": 0},
}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    recipes = []
    for name, parts in RUNS.items():
        for steps, parallel in parts:
            fields = recipe_fields(data, folder / name, steps=steps, parallel=parallel, **FIELDS)
            fields["data"] |= {"order": "streams", "reset_memory": True}
            recipes.append(folder / f"{name}-{steps}.yaml")
            recipes[-1].write_text(yaml.safe_dump(fields))
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


@pytest.mark.parametrize("run", list(RUNS)[1:])
def test_ranks_that_share_rows_learn_what_data_parallel_ranks_do(runs: Path, run: str) -> None:
    assert_same_learning(runs / run, runs / "data", steps=STEPS)


def test_held_out_text_is_scored_once_by_position_too(runs: Path) -> None:
    assert_same_scores(runs / "sequence", runs / "data")
    (expected,), (found,) = (events(runs / run, "positions")[0]["losses"] for run in ("data", "sequence"))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4) and found["loss_reset"] != found["loss"]
