"""Runs on every rank of test_pipeline_engine.py: trains small language models whose layers are divided over stages, or
are not, and writes what it saw.

Arguments: FOLDER TRIAL..., a trial being the fields of `Trial` joined by commas; FOLDER/<ranks>.pt is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.config import ParallelConfig
from parallel.engine import Engine, StepResult
from parallel.engines import make_engine
from parallel.mesh import Mesh
from parallel.process import World, barrier, exit_now, initialize, shutdown
from parallel.scoring import Rows
from parallel.segments import Segments
from parallel.step_gate import Limits
from tests.model_cases import build_model, random_tokens
from tests.parallel.worker_groups import leave_groups

ROWS, LENGTH, LAYERS, CLIP, RATE, STEPS, HALF = 4, 16, 3, 0.5, 2e-3, 10, 5
BEGINNINGS = ((0, 40, 56), (0, 16), (0,), (0, 8, 32, 48, 120))
"""Of each row's documents, in tokens from the first step on."""
WINDOWS = {"mac": 8, "mag": 4, "mal": 4, "lmm": 8, "lmm-softmax": 4}
"""Every how many tokens the memory is reset when rows are scored a second time; a transformer has none."""
SPOILED_STATE = "layers.2.memory.memory.weights.0"
LIMITS = {"loss limit": Limits(loss=1e-3), "norm limit": Limits(gradient_norm=1e-3)}


@dataclass(frozen=True)
class Trial:
    """A training; on the command line its fields' text."""

    case: str
    """Of tests.model_cases."""
    pipeline: int = 1
    stage: int = 1
    """Of ZeRO."""
    accumulation: int = 2
    """Micro-batches of one data rank."""
    segments: int = 0
    """0: rows are run whole."""
    truncate_every: int = 0
    """0: exact."""
    carried: int = 0
    """1: rows go on from step to step, and documents begin within them."""
    recompute: int = 0
    precision: str = "fp32"
    thorough: int = 0
    """1: also resumed and scored."""
    spoil: str = ""
    """What is not finite in the second step: "loss" or "gradient" of a micro-batch, the carried "state" of a row."""

    def __str__(self) -> str:
        return ",".join(map(str, vars(self).values()))

    @classmethod
    def parse(cls, text: str) -> Trial:
        values = zip(fields(cls), text.split(","), strict=True)
        return cls(*(value if field.type == "str" else int(value) for field, value in values))


def own_rows(trial: Trial, mesh: Mesh, step: int) -> list[Rows]:
    """This rank's micro-batches of a step; rows and segments differ in how many targets count."""
    tokens = random_tokens(ROWS, LENGTH + 1, seed=step)
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : 4 * row + step % 4] = -100
    resets = None
    if trial.carried:
        resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        for row, beginnings in enumerate(BEGINNINGS):
            resets[row, [b - step * LENGTH for b in beginnings if step * LENGTH <= b < (step + 1) * LENGTH]] = True
    size = ROWS // trial.accumulation // mesh.data.size
    starts = [(m * mesh.data.size + mesh.data.index) * size for m in range(trial.accumulation)]
    spans = [slice(start, start + size) for start in starts]
    return [Rows(tokens[s, :-1], targets[s], None if resets is None else resets[s]) for s in spans]


def build(trial: Trial, world: World) -> Engine:
    config = ParallelConfig(
        zero_stage=trial.stage,
        precision=trial.precision,
        device="cpu",
        pipeline=trial.pipeline,
    )
    mesh = Mesh.build(world, config.layout(world.size))
    model = build_model(trial.case, torch.float32, num_layers=LAYERS)
    model.set_activation_checkpointing(bool(trial.recompute))
    segments = None
    if trial.segments:
        segments = Segments(LENGTH // trial.segments, trial.segments, trial.truncate_every or None)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return make_engine(
        model,
        torch.optim.AdamW(groups, lr=0.0, betas=(0.5, 0.95), eps=1e-3),
        config,
        mesh,
        sequence_length=LENGTH,
        micro_batch_size=ROWS // trial.accumulation // mesh.data.size,
        accumulation=trial.accumulation,
        gradient_clip=CLIP,
        segments=segments,
        carry_state=bool(trial.carried),
    )


def take(trial: Trial, engine: Engine, steps: Sequence[int], limits: Limits | None = None) -> list[StepResult]:
    return [
        engine.train_step(own_rows(trial, engine.mesh, s), RATE, with_stats=s == STEPS - 1, skip_above=limits)
        for s in steps
    ]


def run(trial: Trial, world: World, folder: Path) -> dict[str, Any]:
    """Trains; if asked for also saves half way, goes on from there, and scores rows that nobody trained on."""
    folder = folder / str(world.size) / str(trial)
    if world.is_main:
        folder.mkdir(parents=True)
    barrier()
    engine = build(trial, world)
    results = take(trial, engine, range(HALF))
    half = {}
    if trial.thorough:
        engine.save(folder)
        half = engine.full_parameters()
    results += take(trial, engine, range(HALF, STEPS))
    whole = engine.full_parameters()
    seen = {
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "tokens": [int(result.tokens) for result in results],
        "stats": [{name: float(value) for name, value in layer.items()} for layer in results[-1].stats or []],
        "bubble": results[-1].bubble,
        "half": half,
        "parameters": whole,
    }
    if trial.thorough:
        held_out = own_rows(trial, engine.mesh, 99)
        seen["scored"] = engine.evaluate(held_out, with_correct=True, by_position=True)
        window = WINDOWS.get(trial.case)
        seen["by_pieces"] = engine.evaluate(held_out, piece=5, by_position=True, reset_window=window)
    engine.destroy()
    return seen | resume(trial, world, folder, whole) if trial.thorough else seen


def resume(trial: Trial, world: World, folder: Path, trained: dict[str, Tensor]) -> dict[str, Any]:
    """The second half once more, from what was saved."""
    barrier()
    engine = build(trial, world)
    engine.load(folder)
    results = take(trial, engine, range(HALF, STEPS))
    after = engine.full_parameters()
    engine.destroy()
    same = all(torch.equal(value, after[name]) for name, value in trained.items())
    return {"resumed": [float(result.loss) for result in results], "resumed_same": same, "folder": str(folder)}


def spoil(engine: Engine, what: str) -> list[Any]:
    """Have something be not finite from now on, of the last data rank's rows, in the first of the last layers or behind
    them all; what takes it back.
    """
    mesh = engine.mesh
    if mesh.place.data < mesh.layout.data - 1:
        return []
    if what == "state":
        first = {name: tensor.clone() for name, tensor in engine.carried.get(0).items()}
        if SPOILED_STATE in first:
            first[SPOILED_STATE][0] = torch.nan
            engine.carried.put(0, first)
        return []
    if what == "loss" and mesh.place.pipeline == mesh.layout.pipeline - 1:
        return [engine.module.norm.register_forward_hook(lambda *given: given[2] * torch.nan)]
    if what == "gradient":

        def spoiled(module: Any, given: Any, output: Any) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda gradient: gradient * torch.inf)

        return [engine.module.blocks[1].register_forward_hook(spoiled)]
    return []


def run_spoiled(trial: Trial, world: World) -> dict[str, Any]:
    """Three steps, of which something spoils the second, or it is above its limit."""
    engine = build(trial, world)
    results = take(trial, engine, [0])
    before = engine.full_parameters()
    hooks = spoil(engine, trial.spoil)
    results += take(trial, engine, [1], LIMITS.get(trial.spoil))
    for hook in hooks:
        hook.remove()
    after = engine.full_parameters()
    results += take(trial, engine, [2])
    engine.destroy()
    return {
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "skipped": [result.skipped for result in results],
        "held_back": [result.held_back for result in results],
        "bad_rows": [result.bad_rows for result in results],
        "reset_rows": [result.reset_rows for result in results],
        "same": all(torch.equal(value, after[name]) for name, value in before.items()),
    }


def main(folder: Path, trials: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {}
    for text in trials:
        trial = Trial.parse(text)
        seen[text] = run_spoiled(trial, world) if trial.spoil else run(trial, world, folder)
        leave_groups()
    if world.is_main:
        torch.save(seen, folder / f"{world.size}.pt")
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
