"""Copies of a run's checkpoints go to its store without the run: what a hanging store or a stop has left behind."""

from __future__ import annotations

import math
from pathlib import Path

from parallel import process
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, list_checkpoints
from pretrain.errors import UserError
from pretrain.folder_lock import locked
from pretrain.metrics import RunLog
from pretrain.phases import load_phases
from pretrain.resume import RECIPE_FILE
from pretrain.uploads import Uploads


def upload(run: Path) -> tuple[CheckpointStore, list[str]]:
    """Upload what the store that a run's recipe names does not have of its checkpoints, however long that takes, and
    remove older copies as the recipe says. Nothing else may have a process group here.

    Returns the store, and the names of the checkpoints in it, newest first.

    Raises UserError where there is no checkpoint, or its recipe names no store, or a run holds the folder; MachineError
    where the store does not take the newest one, or cannot be read.
    """
    if not list_checkpoints(run / CHECKPOINTS_FOLDER):
        raise UserError(f"{run / CHECKPOINTS_FOLDER}: holds no checkpoint; give the folder of a run")
    # A run would remove here, and from the store, what is being sent.
    with locked(run, busy="a run is training in it", place="a folder"):
        return _upload(run)


def _upload(run: Path) -> tuple[CheckpointStore, list[str]]:
    found = list_checkpoints(run / CHECKPOINTS_FOLDER)
    asked = load_phases(found[0] / RECIPE_FILE).run.checkpoint
    if asked.upload is None:
        raise UserError(f"{found[0] / RECIPE_FILE}: names no checkpoint.upload; set it, and train on")
    config = CheckpointConfig(upload=asked.upload, upload_keep=asked.upload_keep, upload_end_wait_seconds=math.inf)
    world = process.initialize("cpu")
    try:
        store = CheckpointStore(asked.upload)
        # Of no rank that writes: run.jsonl is the run's.
        log = RunLog(run, name=run.name, is_main=False, start_step=0, total_steps=0)
        here = Checkpoints(run / CHECKPOINTS_FOLDER, len(found), world)
        with Uploads(here, store, config, log, lambda doing: None, lambda: None):
            pass
        return store, store.checkpoints()
    except StoreError as error:
        raise UserError(f"checkpoint.upload: {error}") from error
    finally:
        process.shutdown()
