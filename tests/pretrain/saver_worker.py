"""Runs on every rank: chooses checkpoints in folders that ranks see differently, and trains recipes one after another
while saves go wrong on one of them.

Arguments: FOLDER, then PLAN=RECIPE.yaml..., a plan being `slow` (rank 1 writes slowly), `once` (its second save meets a
full disk), `always` (each of its saves does), `overtaken` (another copy of the run starts while the second save is
written), `killed` (rank 1 dies between two files that it uploads, once the first checkpoint is in the store), `refused`
(the store takes nothing of rank 1), `hung` (it never answers rank 1, which is asked to stop then) or another (nothing
goes wrong). How training ended on this rank is left in
RECIPE-RANK.json, and what it chose in FOLDER/views-RANK.json; FOLDER may be -.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from parallel.host_copies import TensorFile
from parallel.process import World, exit_now, initialize, shutdown
from pretrain import uploads
from pretrain.agreement import SharedUserError
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import (
    CHECKPOINTS_FOLDER,
    MANIFEST,
    Checkpoints,
    checkpoint_name,
    list_checkpoints,
    publish,
)
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.preemption import Preempted, listen
from pretrain.resume import choose_checkpoint
from pretrain.uploads import Uploads

WRITE, PUBLISH, PUT, BEGIN = TensorFile.write, Checkpoints._publish, CheckpointStore.put, Uploads.begin


def go_wrong(plan: str, run: Path, world: World) -> None:
    """Until the next call of this."""
    saves = [0]

    def write(file: TensorFile, folder: Path) -> Path:
        if world.rank == 1 and plan != "killed" and file.name.startswith("state"):
            saves[0] += 1
            if plan == "slow":
                time.sleep(0.2)
            elif plan == "always" or (plan == "once" and saves[0] == 2):
                raise OSError(28, "No space left on device", str(folder / file.name))
        return WRITE(file, folder)

    def publish(checkpoints: Checkpoints, partial: Path, *arguments: Any) -> None:
        saves[0] += plan == "overtaken"
        if plan == "overtaken" and saves[0] == 2:
            newer = json.loads((run / "fence.json").read_text()) | {"number": 2, "token": "newer"}
            (run / "fence.json").write_text(json.dumps(newer))
        PUBLISH(checkpoints, partial, *arguments)

    def put(store: CheckpointStore, checkpoint: str, *arguments: Any) -> None:
        if plan == "killed" and world.rank == 1 and checkpoint != checkpoint_name(4):
            saves[0] += 1
            if saves[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        if plan == "refused" and world.rank == 1:
            raise StoreError("503")
        if plan == "hung" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait()
        PUT(store, checkpoint, *arguments)

    def begin(copies: Uploads) -> None:
        BEGIN(copies)
        while plan == "killed" and list_checkpoints(run / CHECKPOINTS_FOLDER):
            if copies._store.has(checkpoint_name(4), MANIFEST):
                break
            time.sleep(0.01)

    TensorFile.write, Checkpoints._publish, CheckpointStore.put, Uploads.begin = write, publish, put, begin


VIEWS = {"first": ([1], []), "second": ([], [1]), "both": ([1], [1]), "late": ([1], [1, 2]), "none": ([], [])}
"""The steps of the checkpoints that rank 0 and rank 1 see in a folder of one name."""


def choose(folder: Path, world: World) -> dict[str, dict[str, str | None]]:
    """By view and by --resume, the checkpoint that is chosen, or the error; of a folder below each rank's own."""
    found: dict[str, dict[str, str | None]] = {}
    for view, steps in VIEWS.items():
        own = folder / f"rank-{world.rank}" / view
        own.parent.mkdir(exist_ok=True)
        for step in steps[world.rank]:
            partial = own / ".partial"
            partial.mkdir(parents=True)
            publish(partial, own / checkpoint_name(step), {})
        os.chdir(own.parent)
        found[view] = {}
        for resume in ("auto", "never", f"{view}/{checkpoint_name(1)}"):
            try:
                chosen = choose_checkpoint(Checkpoints(Path(view), 2, world), resume, print)
                found[view][resume] = str(chosen)
            except SharedUserError as error:
                found[view][resume] = f"error: {error}"
    return found


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    uploads.LAST_PAUSE_SECONDS = 0.01
    listen()
    world = initialize("cpu")
    if arguments[0] != "-":
        place, folder = Path.cwd(), Path(arguments[0])
        (folder / f"views-{world.rank}.json").write_text(json.dumps(choose(folder, world)))
        os.chdir(place)
    for argument in arguments[1:]:
        plan, path = argument.split("=")
        phases, ended = load_phases(path), {"type": None, "message": None}
        go_wrong(plan, phases.run.folder, world)
        try:
            train(phases, world)
        except (SharedUserError, Preempted) as error:
            ended = {"type": type(error).__name__, "message": str(error)}
        Path(path).with_name(f"{Path(path).stem}-{world.rank}.json").write_text(json.dumps(ended))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
