"""Runs on every rank of test_skipped_steps.py: trains with a spoiled step among others and without it, and writes what
it saw.

Arguments: OUTPUT.json LAYOUT..., as engine_worker.py takes them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import Engine, StepResult
from parallel.process import World, exit_now, initialize, shutdown
from tests.parallel.engine_worker import Output, Small, build, own_rows, rate

STEPS = 3
SPOILED = {"gradient at 0": ("gradient", 0), "gradient at 1": ("gradient", 1), "loss at 2": ("loss", 2)}
"""What is not finite in a step before which of the others."""
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


def take(engine: Engine, world: World, step: int) -> StepResult:
    return engine.train_step(own_rows(world, step, ACCUMULATION), rate(step))


def trial(world: World, layout: str, folder: Path, spoiled: tuple[str, int] | None) -> dict[str, Any]:
    """Three steps, and one in between that is spoiled on the last rank: what they saw, and what is saved in the end."""
    engine = build(world, layout, ACCUMULATION)
    results, skipped = [], {}
    for step in range(STEPS):
        if spoiled is not None and step == spoiled[1]:
            if world.rank == world.size - 1:
                spoil(engine.module, spoiled[0])
            bad = take(engine, world, 50)
            vars(engine.module).pop("forward", None)
            skipped = {key: value for key, value in asdict(bad).items() if key in ("skipped", "bad_rows")}
            skipped |= {"loss": float(bad.loss), "norm": float(bad.grad_norm)}
            engine.save(made(folder / "behind"))  # also where no step was taken yet
        results.append(take(engine, world, step))
    engine.save(made(folder))
    engine.destroy()
    losses = [(float(result.loss), float(result.grad_norm), result.skipped) for result in results]
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
        cases = {"none": None, **SPOILED}
        seen[layout] = {name: trial(world, layout, folder / name, spoiled) for name, spoiled in cases.items()}
    if world.is_main:
        Path(output).write_text(json.dumps(seen))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
