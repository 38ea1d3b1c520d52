"""Runs on every rank of test_skipped_steps.py: trains with a spoiled step among others and without it, and writes what
it saw.

Arguments: OUTPUT.json LAYOUT..., as engine_worker.py takes them.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import Engine, StepResult
from parallel.process import World, initialize
from parallel.step_gate import Limits
from tests.parallel.engine_worker import Output, Small, build, own_rows, rate
from tests.worker_results import hand_over

STEPS = 3
SPOILED = {"gradient at 0": ("gradient", 0), "gradient at 1": ("gradient", 1), "loss at 2": ("loss", 2)}
"""What is not finite in a step before which of the others."""
HELD_BACK = {
    "loss above at 1": ("loss", 1),
    "norm above at 0": ("gradient_norm", 0),
    "norm above at 2": ("gradient_norm", 2),
}
"""What is above its limit in a step before which of the others."""
WIDE = 100.0
ACCUMULATION = 2


def spoil(module: Small, what: str) -> None:
    """From now on the second micro-batch's loss, or its gradient alone, is not finite."""
    forward, calls = module.forward, iter(range(ACCUMULATION))

    def spoiled(*arguments: Any, **options: Any) -> Output:
        output = forward(*arguments, **options)
        if next(calls) == 0:
            return output
        if what == "loss":  # its gradient is finite
            return Output(**{**vars(output), "loss_sum": output.loss_sum + float("nan")})
        output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return output

    module.forward = spoiled


def take(engine: Engine, world: World, step: int, limits: Limits | None) -> StepResult:
    return engine.train_step(own_rows(world, step, ACCUMULATION), rate(step), skip_above=limits)


def trial(world: World, layout: str, folder: Path, case: str) -> dict[str, Any]:
    """Three steps, and one in between that is spoiled on the last rank, or above a limit: what they saw, and what is
    saved in the end.
    """
    engine = build(world, layout, ACCUMULATION)
    results, skipped = [], {}
    what, place = SPOILED.get(case) or HELD_BACK.get(case) or ("", None)
    wide = Limits(WIDE, WIDE) if case in HELD_BACK else None
    for step in range(STEPS):
        if step == place:
            if case in SPOILED and world.rank == world.size - 1:
                spoil(engine.module, what)
            bad = take(engine, world, 50, Limits(**{what: 1e-3}) if case in HELD_BACK else None)
            vars(engine.module).pop("forward", None)
            skipped = {key: value for key, value in asdict(bad).items() if key in ("skipped", "held_back", "bad_rows")}
            skipped |= {"loss": float(bad.loss), "norm": float(bad.grad_norm)}
            engine.save(made(folder / "behind"))  # also where no step was taken yet
        results.append(take(engine, world, step, wide))
    engine.save(made(folder))
    engine.destroy()
    losses = [(float(r.loss), float(r.grad_norm), r.skipped or r.held_back) for r in results]
    return {"steps": losses, "bad": skipped, "folder": str(folder)}


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return folder


def main(output: str, layouts: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        folder = Path(output).with_name(layout)
        seen[layout] = {case: trial(world, layout, folder / case, case) for case in ("none", *SPOILED, *HELD_BACK)}
    hand_over(world, output, seen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
