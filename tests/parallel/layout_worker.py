"""Runs on every rank of test_layouts.py: trains small models in several layouts, one after another, and writes what it
saw. Arguments: OUTPUT.pt TRIAL... (tests.parallel.layouts), all of as many ranks as run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from model import TitansLM
from parallel.config import ParallelConfig
from parallel.distribute import distribute
from parallel.engine import Engine
from parallel.engines import make_engine
from parallel.mesh import Layout, Mesh
from parallel.process import World, exit_now, initialize, shutdown
from parallel.scoring import Rows
from parallel.segments import Segments
from pretrain.optimizer import OptimizerConfig, build_optimizer
from tests.model_cases import build_model, random_tokens
from tests.parallel.layouts import Trial
from tests.parallel.worker_groups import leave_groups

ROWS, LENGTH, SEGMENTS, ACCUMULATION, CLIP, RATE = 4, 16, 2, 2, 0.5, 3e-3


def own_rows(mesh: Mesh, step: int, mode: str) -> list[Rows]:
    """This rank's micro-batches of a step. Rows differ in how many targets count; in streams documents begin in mid-row
    of some.
    """
    tokens = random_tokens(ROWS, LENGTH + 1, seed=step % 2)  # twice the same rows, so that there is something to learn
    targets = tokens[:, 1:].clone()
    resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        targets[row, : 3 * row + step % 2] = -100
        resets[row, 8 * (row % 2)] = (row + step) % 3 == 0
    size = ROWS // ACCUMULATION // mesh.data.size
    starts = [(m * mesh.data.size + mesh.data.index) * size for m in range(ACCUMULATION)]
    parts = (tokens[:, :-1], targets, *([resets] if mode == "streams" else []))
    return [Rows(*(part[s : s + size] for part in parts)) for s in starts]


def model_of(trial: Trial) -> TitansLM:
    """The whole model."""
    return build_model(trial.case, torch.float32, vocab_size=32, num_heads=4, dim=32, num_layers=trial.layers)


def build(trial: Trial, mesh: Mesh) -> Engine:
    model = model_of(trial)
    distribute(model, mesh, shard_norms=bool(trial.sharded))
    segments = None
    if trial.mode in ("segments", "streams"):
        segments = Segments(LENGTH // SEGMENTS, SEGMENTS, 1 if trial.mode == "streams" else None)
    gathered = {"keep_gathered_below": 20} if trial.stage == 3 else {}
    sizes = {
        "tensor": trial.tensor,
        "tensor_shard_norms": bool(trial.sharded),
        "pipeline": trial.pipeline,
        "sequence": trial.sequence,
    }
    return make_engine(
        model,
        # With the usual eps an element whose gradient is rounding alone would take a whole step of its sign.
        build_optimizer(model, OptimizerConfig(eps=1e-3), mesh.world.device),
        ParallelConfig(
            zero_stage=trial.stage,
            precision="bf16" if trial.mode == "bf16" else "fp32",
            device="cpu",
            **gathered,
            **sizes,
        ),
        mesh,
        sequence_length=LENGTH,
        micro_batch_size=ROWS // ACCUMULATION // mesh.data.size,
        accumulation=ACCUMULATION,
        gradient_clip=CLIP,
        segments=segments,
        carry_state=trial.mode == "streams",
    )


def run(trial: Trial, world: World) -> dict[str, Any]:
    mesh = Mesh.build(world, Layout(trial.pipeline, trial.data, trial.sequence, trial.tensor))
    engine = build(trial, mesh)
    results = [
        engine.train_step(own_rows(mesh, step, trial.mode), RATE, with_stats=step == trial.steps - 1)
        for step in range(trial.steps)
    ]
    scored = engine.evaluate(own_rows(mesh, 99, trial.mode)[:1], with_correct=True, piece=12, by_position=True)
    parameters = engine.full_parameters()
    engine.destroy()
    return {
        "losses": torch.tensor([float(result.loss) for result in results]),
        "norms": torch.tensor([float(result.grad_norm) for result in results]),
        "stats": torch.tensor([float(value) for layer in results[-1].stats or [] for value in layer.values()]),
        "evaluated": (scored.nats, scored.tokens, scored.correct, [vars(part) for part in scored.positions]),
        "parameters": parameters,
    }


def main(output: str, trials: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {}
    for text in trials:
        seen[text] = run(Trial.parse(text), world)
        leave_groups()
    if world.is_main:
        torch.save(seen, Path(output))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
