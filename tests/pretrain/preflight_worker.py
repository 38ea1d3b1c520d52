"""Runs on every rank of test_preflight.py: looks at the ranks, of which the last one is not as it should be.

Arguments: OUTPUT.json RECIPE.yaml CASE...; what each case came to is written there by rank 0, and must be the same on
all ranks.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from parallel import process
from parallel.process import World
from pretrain import preflight as module
from pretrain import shared_folder
from pretrain.checkpoints import CHECKPOINTS_FOLDER
from pretrain.errors import UserError
from pretrain.loop import train
from pretrain.phases import Phases, load_phases
from tests.worker_results import hand_over


def other_torch(phases: Phases, real: Callable[[Phases], dict[str, str]] = module.versions_here) -> dict[str, str]:
    return real(phases) | {"torch": "2.11.0"}


def other_source() -> str:
    return "0" * 12


def full_disk(folder: Path) -> Any:
    return shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)


CASES: dict[str, dict[str, Any]] = {
    "well": {},
    "torch": {"versions_here": other_torch},
    "source": {"source_hash": other_source},
    "disk": {"shutil.disk_usage": full_disk},
    "left": {"shutil.disk_usage": full_disk},
    "clock": {},
    "variable": {},
}


def leave(phases: Phases, case: str) -> None:
    """What a save that was killed leaves, more than a checkpoint takes."""
    left = phases.run.folder / CHECKPOINTS_FOLDER / ".partial-step-00000004-1"
    shutil.rmtree(left.parent, ignore_errors=True)
    if case == "left":
        left.mkdir(parents=True)
        (left / "weights").write_bytes(bytes(2 * 10**6))


def look(world: World, phases: Phases, case: str) -> dict[str, Any]:
    is_last = world.rank == world.size - 1
    if world.is_main:
        leave(phases, case)
    process.barrier()
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "7"} if case == "variable" and is_last else {}):
        patches = [patch.object(module, name, value) for name, value in CASES[case].items() if "." not in name]
        patches += [patch(f"pretrain.preflight.{name}", value) for name, value in CASES[case].items() if "." in name]
        for each in patches if is_last else []:
            each.start()
        try:
            ahead = 60.0 if case == "clock" and is_last else 0.0
            report = module.preflight(phases, world, clock=lambda: time.time() + ahead)
            return {"lines": report.lines(), "fields": report.fields()}
        except UserError as error:
            return {"error": str(error)}
        finally:
            for each in patches if is_last else []:
                each.stop()


def apart(world: World, phases: Phases) -> dict[str, Any]:
    """Train in a folder that is relative to where each rank stands, which is not the same for all."""
    here, folder = Path.cwd(), phases.run.folder
    alone = folder.with_name(f"rank{world.rank}")
    alone.mkdir()
    os.chdir(alone)
    try:
        with patch.object(shared_folder, "SECONDS", 0.5):
            train(load_phases(folder.with_suffix(".yaml"), [("folder", "run")]), world)
    except UserError as error:
        return {"error": str(error), "files": sorted(str(path) for path in Path("run").rglob("*"))}
    finally:
        os.chdir(here)
    return {}


def main(output: str, recipe: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    world = process.initialize("cpu")
    phases = load_phases(recipe)
    seen = {case: process.gather_objects(look(world, phases, case)) for case in cases}
    seen["apart"] = process.gather_objects(apart(world, phases))
    hand_over(world, output, seen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
