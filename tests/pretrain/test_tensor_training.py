"""Whole runs of a small MAC on tensor ranks: they learn and score what data-parallel ranks do, and each goes on from
the other's checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, make_data, write_recipe

WORKER = "tests/pretrain/train_worker.py"
STEPS = 6
RUNS = {
    "data": [(STEPS, {"tensor": 1})],
    "tensor": [(STEPS, {"tensor": 2, "zero_stage": 3})],
    "tensor-then-data": [(3, {"tensor": 2}), (STEPS, {"tensor": 1})],
    "data-then-tensor": [(3, {"tensor": 1}), (STEPS, {"tensor": 2, "zero_stage": 0})],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data, recipes = make_data(tmp_path_factory.mktemp("data")), []
    schedule = {"kind": "constant", "warmup_tokens": 0}
    for name, parts in RUNS.items():
        for steps, parallel in parts:
            path = write_recipe(data, folder / name, steps=steps, parallel=parallel, schedule=schedule)
            recipes.append(path.rename(folder / f"{name}-{steps}.yaml"))
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


@pytest.mark.parametrize("run", list(RUNS)[1:])
def test_tensor_ranks_learn_what_data_parallel_ranks_do(runs: Path, run: str) -> None:
    expected, found = losses(runs / "data"), losses(runs / run)
    assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-5)
    norms = [[event["gradient_norm"] for event in events(runs / each, "step")] for each in ("data", run)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_held_out_text_is_scored_once(runs: Path) -> None:
    (expected,), (found,) = (events(runs / run, "eval") for run in ("data", "tensor"))
    assert (found["scored_tokens"], found["text_bytes"]) == (expected["scored_tokens"], expected["text_bytes"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
