"""A gradient that is not finite ends the run, also at a step that nothing is recorded of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import TitansLM
from parallel import process
from parallel.process import World
from pretrain.finite import FiniteWatch
from pretrain.loop import train
from pretrain.phases import load_phases
from tests.training_cases import events, make_data, write_recipe

MICRO_BATCHES = 2
BAD_STEP = 2


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[World]:
    alone = process.initialize("cpu")
    yield alone
    process.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def spoil_the_gradient_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss stays finite: what an overflow in the backward pass alone looks like."""
    forward, calls = TitansLM.forward, iter(range(1000))

    def spoiling(model: TitansLM, *arguments: Any, **options: Any) -> Any:
        output = forward(model, *arguments, **options)
        if next(calls) // MICRO_BATCHES + 1 == BAD_STEP and output.loss_sum.requires_grad:
            output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(TitansLM, "forward", spoiling)


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 1, "precision": "bf16"}])
def test_a_bad_step_between_two_records_ends_the_run(
    data: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, parallel: dict[str, Any]
) -> None:
    spoil_the_gradient_of_one_step(monkeypatch)
    folder = tmp_path / "run"
    path = write_recipe(data, folder, steps=8, parallel=parallel, logging={"every_steps": 4})
    with pytest.raises(FloatingPointError, match=rf"step {BAD_STEP}: loss \d.*, gradient norm (inf|nan): not finite"):
        train(load_phases(path), world)
    assert not events(folder, "step")
    assert not events(folder, "save")


def test_the_first_of_several_bad_steps_is_named() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    for step, (loss, norm) in enumerate([(1.0, 2.0), (float("nan"), 3.0), (1.0, float("inf")), (1.0, 1.0)], start=1):
        watch.note(step, torch.tensor(loss), torch.tensor(norm))
    with pytest.raises(FloatingPointError, match=r"step 2: loss nan, gradient norm 3\.0"):
        watch.require_finite()
