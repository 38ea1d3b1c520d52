"""Runs on every rank of test_guard_streams.py: trains recipes one after another, spoiling rows' carried states.

Arguments: PLAN=RECIPE.yaml..., a plan being `none`, `state` (a number of row 3's state is not finite before step 3),
`by-hand` (row 3 begins anew there) or `within` (both rows of rank 1 become not finite within the first step, but for
the very first, in which a document begins in one of them alone; RECIPE.json says which one, and the step).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from model import ModelState
from parallel.engine import Engine
from parallel.process import exit_now, initialize, shutdown
from parallel.scoring import Batch
from pretrain.loop import train
from pretrain.phases import load_phases

STEP, ROW = 3, 3
ROWS = [2, 3]
"""Of rank 1."""


def spoil_before(engine: Engine, plan: str) -> None:
    """Row 3 is the second one of rank 1."""
    state = engine.carried.get(0)
    if plan == "state":
        name = next(name for name in state if name.endswith("memory.weights.0"))
        broken = state[name].clone()
        broken[1].view(-1)[7] = float("inf")
        engine.carried.put(0, state | {name: broken})
    elif plan == "by-hand":
        engine.carried.put(0, ModelState.from_tensors(state).reset_rows(torch.tensor([False, True])).flat())


def spoil_within(engine: Engine) -> None:
    """The next forward pass leads to a loss and to states of all rows that are not finite."""
    forward = engine.module.forward

    def spoiled(*arguments: Any, **options: Any) -> Any:
        vars(engine.module).pop("forward")
        output = forward(*arguments, **options)
        state = output.state.flat()
        name = next(name for name in state if name.endswith("memory.weights.0"))
        state = ModelState.from_tensors(state | {name: state[name] * float("nan")})
        return output._replace(loss_sum=output.loss_sum * float("nan"), state=state)

    engine.module.forward = spoiled


def rows_with_a_beginning(batch: Batch) -> list[int]:
    return [row for row, begins in zip(ROWS, batch.resets.any(1).tolist(), strict=True) if begins]


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    take = Engine.train_step
    for argument in arguments:
        plan, path = argument.split("=")
        steps, told = iter(range(1, 1000)), Path(path).with_suffix(".json")

        def spoiling(
            engine: Engine, batches: list[Batch], *given: Any, plan: str = plan, steps: Any = steps, told: Path = told,
            **options: Any,
        ) -> Any:  # fmt: skip
            step = next(steps)
            if world.rank == 1 and plan != "within" and step == STEP:
                spoil_before(engine, plan)
            elif world.rank == 1 and plan == "within" and step > 1 and not told.exists():
                begun = rows_with_a_beginning(batches[0])
                if len(begun) == 1:
                    spoil_within(engine)
                    told.write_text(json.dumps({"step": step, "begun": begun}))
            return take(engine, batches, *given, **options)

        Engine.train_step = spoiling
        overrides = [("data.order", "streams"), ("data.reset_memory", str(plan == "within").lower())]
        train(load_phases(path, overrides), world)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
