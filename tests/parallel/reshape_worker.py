"""Runs on every rank of test_reshape.py: half of a training in one layout, the other half in another.

Arguments: OUTPUT.pt FOLDER TASK..., a task being TRIAL (the first half, saved below FOLDER) or TRIAL>TRIAL (the second
half in the second layout, behind what the first saved); trials are those of tests.parallel.layouts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from parallel.mesh import Layout, Mesh
from parallel.process import World, barrier, exit_now, gather_objects, initialize, shutdown
from parallel.saved_state import written_here
from tests.parallel.layout_worker import RATE, build, own_rows
from tests.parallel.layouts import Trial
from tests.parallel.worker_groups import leave_groups

STEPS = 10
HALF = STEPS // 2


def run(task: str, world: World, folder: Path) -> dict[str, Any]:
    before, _, after = task.partition(">")
    trial = Trial.parse(after or before)
    mesh = Mesh.build(world, Layout(trial.pipeline, trial.data, trial.sequence, trial.tensor))
    engine = build(trial, mesh)
    if after:
        engine.load(folder / before)
    steps = range(HALF, STEPS) if after else range(HALF)
    results = [engine.train_step(own_rows(mesh, step, trial.mode), RATE) for step in steps]
    written = list(written_here(engine._fragments(), mesh, trial.stage))
    if not after:
        (folder / before).mkdir(parents=True, exist_ok=True)
        engine.save(folder / before)
        barrier()
    parameters = engine.full_parameters()
    engine.destroy()
    return {
        "losses": torch.tensor([float(result.loss) for result in results]),
        "norms": torch.tensor([float(result.grad_norm) for result in results]),
        "parameters": parameters,
        "written": gather_objects([f"{f.parameter} {f.part} {f.start} {f.numel}" for f in written]),
    }


def main(output: str, folder: str, tasks: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {}
    for task in tasks:
        seen[task] = run(task, world, Path(folder))
        leave_groups()
    if world.is_main:
        torch.save(seen, Path(output))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
