"""Runs on every rank of test_carried_states.py: rows that go on from step to step, saved and gone on with.

Argument: FOLDER, the trials' folders below FOLDER/<ranks>. One rank takes half of the steps and saves; two take all of
them, and then the second half again behind what the one saved.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.config import ParallelConfig
from parallel.engine import Engine, StepResult
from parallel.mesh import Mesh
from parallel.process import World, barrier, exit_now, initialize, shutdown
from parallel.scoring import Rows
from parallel.segments import Segments
from tests.model_cases import build_model, random_tokens

ROWS, LENGTH, STEPS, HALF, RATE = 4, 16, 4, 2, 3e-3
BEGINNINGS = ((0, 40, 56), (0, 16), (0,), (0, 8, 32, 48))
"""Of each row's documents, in tokens from the first step on: at a step's first token, inside, several in one step."""


@dataclass(frozen=True)
class Trial:
    case: str
    stage: int
    segments: int | None = None
    accumulation: int = 1
    recompute: bool = False

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


TRIALS = [
    Trial("mac", 1, accumulation=2),
    Trial("mac", 2),
    Trial("mac", 3, segments=2),
    Trial("mag", 2, segments=2, accumulation=2),
    Trial("mal", 3, recompute=True),
    Trial("lmm", 3, segments=4),
    # Forgetting to zero uses the initial weights where a row begins anew alone, on one rank and not on another.
    *(Trial("lmm-softmax", stage) for stage in (2, 3)),
    Trial("transformer-window", 2),
]


def streams() -> Rows:
    """What every row reads over all steps: [ROWS, STEPS * LENGTH]."""
    tokens = random_tokens(ROWS, STEPS * LENGTH + 1, seed=3)
    targets = tokens[:, 1:].clone()
    resets = torch.zeros(ROWS, STEPS * LENGTH, dtype=torch.bool)
    for row, beginnings in enumerate(BEGINNINGS):
        resets[row, list(beginnings)] = True
        targets[row, : 3 * row] = -100
    return Rows(tokens[:, :-1], targets, resets)


def own_rows(world: World, step: int, accumulation: int) -> list[Rows]:
    """This rank's micro-batches of a step."""
    size = ROWS // accumulation // world.size
    span = slice(step * LENGTH, (step + 1) * LENGTH)
    starts = [(m * world.size + world.rank) * size for m in range(accumulation)]
    return [Rows(*(x[s : s + size, span] for x in streams())) for s in starts]


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.5, 0.95), weight_decay=0.1)


def build(trial: Trial, world: World, accumulation: int) -> Engine:
    model = build_model(trial.case, torch.float32)
    model.set_activation_checkpointing(trial.recompute)
    gathered = {"keep_gathered_below": 20} if trial.stage == 3 else {}
    return Engine(
        model,
        optimizer_of(model),
        ParallelConfig(zero_stage=trial.stage, precision="fp32", device="cpu", **gathered),
        Mesh.data_parallel(world),
        micro_batch_size=ROWS // accumulation // world.size,
        accumulation=accumulation,
        gradient_clip=0.0,
        segments=None if trial.segments is None else Segments(LENGTH // trial.segments, trial.segments),
        carry_state=True,
    )


def take(engine: Engine, world: World, steps: range) -> list[StepResult]:
    return [engine.train_step(own_rows(world, step, engine.accumulation), RATE) for step in steps]


def run(trial: Trial, world: World, folder: Path, other: Path) -> dict[str, list[float] | bool]:
    """The losses in one go, and those behind `other`'s checkpoint in micro-batches of another size; and whether rows
    that are told to begin anew behind it do.
    """
    engine = build(trial, world, trial.accumulation)
    results = take(engine, world, range(HALF))
    folder.mkdir(exist_ok=True, parents=True)
    engine.save(folder)
    if world.size == 1:
        engine.destroy()
        return {"losses": [float(r.loss) for r in results]}
    engine.evaluate(own_rows(world, STEPS - 1, 1))
    results += take(engine, world, range(HALF, STEPS))
    engine.destroy()
    barrier()
    resumed = build(trial, world, 3 - trial.accumulation)
    resumed.load(other)
    again = take(resumed, world, range(HALF, STEPS))
    resumed.load(other, with_carried=False)
    begins = not any(resumed.carried.get(m) for m in range(resumed.accumulation))
    resumed.destroy()
    return {
        "losses": [float(r.loss) for r in results],
        "resumed": [float(r.loss) for r in again],
        "begins": begins,
    }


def main(folder: Path) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    own, other = folder / str(world.size), folder / "1"
    seen = {str(trial): run(trial, world, own / str(trial), other / str(trial)) for trial in TRIALS}
    if world.is_main:
        torch.save(seen, own / "seen.pt")
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
