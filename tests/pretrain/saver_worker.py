"""Runs on every rank: trains recipes one after another while saves go wrong on one of them.

Arguments: PLAN=RECIPE.yaml..., a plan being `slow` (rank 1 writes slowly), `once` (its second save meets a full disk),
`always` (each of its saves does) or `overtaken` (another copy of the run starts while the second save is written).
How training ended on this rank is left in RECIPE-RANK.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from parallel.host_copies import TensorFile
from parallel.process import World, exit_now, initialize, shutdown
from pretrain.agreement import SharedUserError
from pretrain.checkpoints import Checkpoints
from pretrain.loop import train
from pretrain.phases import load_phases

WRITE, PUBLISH = TensorFile.write, Checkpoints._publish


def go_wrong(plan: str, run: Path, world: World) -> None:
    """Until the next call of this."""
    saves = [0]

    def write(file: TensorFile, folder: Path) -> Path:
        if world.rank == 1 and file.name.startswith("state"):
            saves[0] += 1
            if plan == "slow":
                time.sleep(0.2)
            elif plan == "always" or (plan == "once" and saves[0] == 2):
                raise OSError(28, "No space left on device", str(folder / file.name))
        return WRITE(file, folder)

    def publish(checkpoints: Checkpoints, partial: Path, *arguments: Any) -> None:
        saves[0] += 1
        if plan == "overtaken" and saves[0] == 2:
            newer = json.loads((run / "fence.json").read_text()) | {"number": 2, "token": "newer"}
            (run / "fence.json").write_text(json.dumps(newer))
        PUBLISH(checkpoints, partial, *arguments)

    TensorFile.write, Checkpoints._publish = write, publish


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    for argument in arguments:
        plan, path = argument.split("=")
        phases, ended = load_phases(path), {"type": None, "message": None}
        go_wrong(plan, phases.run.folder, world)
        try:
            train(phases, world)
        except SharedUserError as error:
            ended = {"type": type(error).__name__, "message": str(error)}
        Path(path).with_name(f"{Path(path).stem}-{world.rank}.json").write_text(json.dumps(ended))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
