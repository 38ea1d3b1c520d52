"""Runs on every rank of test_segmented_engine.py: trains small language models, whole and by segments, and writes what
it saw.

Arguments: OUTPUT.pt TRIAL..., a trial being the fields of `Trial` in order, joined by commas.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.boundary_states import Place
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.process import World, exit_now, initialize, shutdown
from parallel.scoring import Rows
from parallel.segments import Segments
from parallel.state_files import StateReader
from tests.model_cases import build_model, random_tokens

ROWS, LENGTH, STEPS, CLIP = 4, 16, 2, 0.5
BETA = 0.5
SUMS = {"allreduce_", "reduce_", "_reduce_scatter_base_"}
OTHERS = {"_allgather_base_", "allgather_", "broadcast_", "barrier"}


@dataclass(frozen=True)
class Trial:
    """A training; on the command line its fields' text."""

    case: str
    """Of tests.model_cases."""
    stage: int
    segments: int = 0
    """0: rows are run whole."""
    truncate_every: int = 0
    """0: exact."""
    accumulation: int = 1
    recompute: bool = False
    """Activation checkpointing."""
    precision: str = "fp32"
    place: Place = "device"
    reduce: str = "step"
    """`ParallelConfig.reduce_gradients`."""

    def __str__(self) -> str:
        return ",".join(str(int(value) if isinstance(value, bool) else value) for value in vars(self).values())

    @classmethod
    def parse(cls, text: str) -> Trial:
        case, stage, segments, every, accumulation, recompute, precision, place, reduce = text.split(",")
        numbers = (int(stage), int(segments), int(every), int(accumulation))
        return cls(case, *numbers, bool(int(recompute)), precision, place, reduce)


def own_rows(world: World, step: int, accumulation: int) -> list[Rows]:
    """This rank's micro-batches of a step; rows and segments differ in how many targets count."""
    tokens = random_tokens(ROWS, LENGTH + 1, seed=step)
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : 4 * row + step % 4] = -100
    size = ROWS // accumulation // world.size
    starts = [(m * world.size + world.rank) * size for m in range(accumulation)]
    return [Rows(tokens[s : s + size, :-1], targets[s : s + size]) for s in starts]


def build(trial: Trial, world: World, folder: Path) -> Engine:
    model = build_model(trial.case, torch.float32)
    model.set_activation_checkpointing(trial.recompute)
    segments = None
    if trial.segments:
        length = LENGTH // trial.segments
        segments = Segments(length, trial.segments, trial.truncate_every or None, trial.place, folder)
    options = {"keep_gathered_below": 20} if trial.stage == 3 else {}
    return Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.0, betas=(BETA, 0.95), weight_decay=0.1),
        ParallelConfig(
            zero_stage=trial.stage,
            precision=trial.precision,
            device="cpu",
            reduce_gradients=trial.reduce,
            **options,
        ),
        Mesh.data_parallel(world),
        micro_batch_size=ROWS // trial.accumulation // world.size,
        accumulation=trial.accumulation,
        gradient_clip=CLIP,
        segments=segments,
    )


def first_gradients(engine: Engine, world: World, folder: Path) -> dict[str, Tensor]:
    """On rank 0 every parameter's gradient of the first step, after clipping: its first moment over 1 - beta."""
    folder.mkdir(exist_ok=True)
    engine.save(folder)
    dist.barrier()
    if not world.is_main:
        return {}
    with StateReader(folder) as reader:
        return {
            name: reader.read("exp_avg", name, 0, shape.numel()) / (1 - BETA) for name, shape in engine.shapes.items()
        }


class Reductions(TorchDispatchMode):
    """While it is active: the numbers of elements of the tensors that ranks sum, whatever calls it. Counters, losses
    and norms are among them, with an element each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            assert name in SUMS or name in OTHERS, f"a collective that the test does not know: {name}"
            if name in SUMS:
                tensors = args[1] if name == "_reduce_scatter_base_" else args[0]
                self.sizes += [t.numel() for t in ([tensors] if isinstance(tensors, Tensor) else tensors)]
        return func(*args, **(kwargs or {}))


def run(trial: Trial, world: World, folder: Path) -> dict[str, object]:
    engine = build(trial, world, folder / "boundaries")
    results = []
    for step in range(STEPS):
        rows = own_rows(world, step, trial.accumulation)
        with Reductions() as reductions:
            results.append(engine.train_step(rows, 3e-3, with_stats=step == STEPS - 1))
        if step == 0:
            gradients = first_gradients(engine, world, folder / str(trial))
    scored = engine.evaluate(own_rows(world, 99, 1))
    engine.destroy()
    return {
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "gradients": gradients,
        "reduced": sum(reductions.sizes) / engine.num_parameters,
        "tokens": [int(result.tokens) for result in results],
        "stats": [{name: float(value) for name, value in layer.items()} for layer in results[-1].stats or []],
        "evaluated": scored.nats,
    }


def main(output: str, trials: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {text: run(Trial.parse(text), world, Path(output).parent) for text in trials}
    if world.is_main:
        torch.save(seen, output)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
