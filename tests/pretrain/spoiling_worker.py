"""Runs on every rank of test_guard_streams.py: trains recipes one after another, spoiling a row's carried state.

Arguments: PLAN=RECIPE.yaml..., a plan being `none`, `state` (a number of row 3's state is not finite before step 3) or
`by-hand` (row 3 begins anew there).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from model import ModelState
from parallel.engine import Engine
from parallel.process import exit_now, initialize, shutdown
from pretrain.loop import train
from pretrain.phases import load_phases

STEP, ROW = 3, 3


def spoil(engine: Engine, plan: str) -> None:
    """Row 3 is the second one of rank 1."""
    state = engine.carried.get(0)
    if plan == "state":
        name = next(name for name in state if name.endswith("memory.weights.0"))
        broken = state[name].clone()
        broken[1].view(-1)[7] = float("inf")
        engine.carried.put(0, state | {name: broken})
    elif plan == "by-hand":
        engine.carried.put(0, ModelState.from_tensors(state).reset_rows(torch.tensor([False, True])).flat())


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    take = Engine.train_step
    for argument in arguments:
        plan, path = argument.split("=")
        steps = iter(range(1, 1000))

        def spoiling(engine: Engine, *given: Any, plan: str = plan, steps: Any = steps, **options: Any) -> Any:
            if next(steps) == STEP and world.rank == 1:
                spoil(engine, plan)
            return take(engine, *given, **options)

        Engine.train_step = spoiling
        train(load_phases(path, [("data.order", "streams")]), world)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
