"""Runs on every rank of test_bad_states.py: trains with carried states, one row of which is spoiled, and writes what it
saw.

Arguments: OUTPUT.pt TRIAL..., a trial being `case,stage,segments,precision`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model import ModelState
from parallel.bad_states import OnBadState
from parallel.config import ParallelConfig
from parallel.engine import Engine, StepResult
from parallel.mesh import Mesh
from parallel.process import World, exit_now, gather_objects, initialize, shutdown
from parallel.scoring import Rows
from parallel.segments import Segments
from tests.model_cases import build_model, random_tokens

RANKS, ROWS, LENGTH = 2, 4, 16
"""Rows of a step, two a rank in one micro-batch."""
BAD_ROW = 3
"""The second row of the last rank."""
BAD = torch.tensor([False, True])


def own_rows(world: World, step: int) -> list[Rows]:
    tokens = random_tokens(ROWS, LENGTH + 1, seed=step)[2 * world.rank : 2 * world.rank + 2]
    return [Rows(tokens[:, :-1], tokens[:, 1:])]


def build(trial: str, world: World, on_bad_state: OnBadState = "reset") -> Engine:
    case, stage, segments, precision = trial.split(",")
    model = build_model(case, torch.float32)
    count = int(segments)
    return Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.0),
        ParallelConfig(zero_stage=int(stage), precision=precision, device="cpu"),
        Mesh.data_parallel(world),
        micro_batch_size=2,
        accumulation=1,
        gradient_clip=0.5,
        segments=Segments(LENGTH // count, count) if count else None,
        carry_state=True,
        on_bad_state=on_bad_state,
    )


def take(engine: Engine, world: World, step: int) -> StepResult:
    return engine.train_step(own_rows(world, step), 1e-2)


def poisoned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One number of the second row is not finite: of a memory's weights, or of the attention's keys."""
    name = next(name for name in state if name.endswith(("memory.weights.0", "attention.k")))
    tensor = state[name].clone()
    tensor[1].view(-1)[5] = float("nan")
    return state | {name: tensor}


def seen(result: StepResult) -> dict[str, Any]:
    values = {"loss": float(result.loss), "norm": float(result.grad_norm), "skipped": result.skipped}
    rows = {"reset_rows": result.reset_rows, "rolled_back_rows": result.rolled_back_rows}
    return values | rows | {"bad_rows": result.bad_rows, "mended_rows": result.mended_rows}


def save(engine: Engine, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save(folder)
    dist.barrier()
    return str(folder)


def between_steps(trial: str, world: World, folder: Path, spoil: bool) -> dict[str, Any]:
    """A state that is spoiled between two steps; or the row put back by hand."""
    engine = build(trial, world)
    results = [take(engine, world, 0)]
    if world.rank == RANKS - 1:
        state = engine.carried.get(0)
        by_hand = ModelState.from_tensors(state).reset_rows(BAD).flat()
        engine.carried.put(0, poisoned(state) if spoil else by_hand)
    results += [take(engine, world, step) for step in (1, 2)]
    written = save(engine, folder)
    engine.destroy()
    return {"steps": [seen(result) for result in results], "folder": written}


def within_step(trial: str, world: World, folder: Path, on_bad_state: OnBadState) -> dict[str, Any]:
    """A row that becomes not finite within the second step; the step after it, here and from a checkpoint."""
    engine = build(trial, world, on_bad_state)
    results = [take(engine, world, 0)]
    before = engine.carried.get(0)
    forward = engine.module.forward

    def spoiled(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        state = ModelState.from_tensors(poisoned(output.state.flat()))
        return output._replace(loss_sum=output.loss_sum * float("nan"), state=state)

    weights = engine.full_parameters()
    if world.rank == RANKS - 1:
        engine.module.forward = spoiled
    results.append(take(engine, world, 1))
    vars(engine.module).pop("forward", None)
    unchanged = all(torch.equal(weights[name], now) for name, now in engine.full_parameters().items())
    behind = engine.carried.get(0)
    written = save(engine, folder)
    results.append(take(engine, world, 2))
    engine.destroy()
    resumed = build(trial, world, on_bad_state)
    resumed.load(Path(written))
    again = take(resumed, world, 2)
    resumed.destroy()
    states = gather_objects((before, behind))
    steps = [seen(result) for result in results]
    return {"steps": steps, "again": seen(again), "states": states, "unchanged": unchanged}


def states_of_good_steps(trial: str, world: World) -> list[dict[str, Tensor]]:
    """What the first step's weights make of the first two steps' rows, all of them well, by rank."""
    engine = build(trial, world)
    take(engine, world, 0)
    forward = engine.module.forward

    def without_learning(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        return output._replace(loss_sum=output.loss_sum * float("nan"))

    engine.module.forward = without_learning
    take(engine, world, 1)
    states = gather_objects(engine.carried.get(0))
    engine.destroy()
    return states


def main(output: str, trials: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        folder = Path(output).with_name(trial)
        found[trial] = {
            "spoiled": between_steps(trial, world, folder / "spoiled", True),
            "by hand": between_steps(trial, world, folder / "by-hand", False),
            "reset": within_step(trial, world, folder / "reset", "reset"),
            "rollback": within_step(trial, world, folder / "rollback", "rollback"),
            "good": states_of_good_steps(trial, world),
        }
    if world.is_main:
        torch.save(found, output)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
