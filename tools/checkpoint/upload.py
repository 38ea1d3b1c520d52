"""Copies of a run's checkpoints go to its store without the run: what a hanging store or a stop has left behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from parallel import process
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import (
    CHECKPOINTS_FOLDER,
    MANIFEST,
    STAYS,
    Checkpoints,
    checkpoint_step,
    list_checkpoints,
)
from pretrain.errors import MachineError, UserError, file_error
from pretrain.folder_lock import locked
from pretrain.metrics import RunLog
from pretrain.phases import load_phases
from pretrain.resume import RECIPE_FILE
from pretrain.uploads import Uploads

_THEN = "What is not uploaded stays here"


def upload(run: Path) -> tuple[CheckpointStore, list[str]]:
    """Upload what the store that a run's recipe names does not have of its checkpoints, however long that takes, and
    remove older copies as the recipe says. Nothing else may have a process group here.

    Returns the store, and the names of the checkpoints in it, newest first.

    Raises UserError where there is no checkpoint, its recipe names no store, a run holds the folder, or the store holds
    newer checkpoints, or others of the same steps; MachineError where the store does not take one, or cannot be read.
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
        _require_same_run(store, found)
        # Of no rank that writes: run.jsonl is the run's.
        log = RunLog(run, name=run.name, is_main=False, start_step=0, total_steps=0)
        here = Checkpoints(run / CHECKPOINTS_FOLDER, len(found), world)
        with Uploads(here, store, config, log, lambda doing: None, lambda: None, then=_THEN):
            pass
        names = store.checkpoints()
    except StoreError as error:
        raise MachineError(f"checkpoint.upload: {error}; start the command again when the store can be read") from error
    finally:
        process.shutdown()
    if missing := _missing(found, names, asked.upload_keep):
        raise MachineError(
            f"{store.location}: does not have {', '.join(missing)}, for the reason above; start the command again"
        )
    return store, names


def _require_same_run(store: CheckpointStore, found: Sequence[Path]) -> None:
    """Raises UserError where a store is ahead of a folder, or has other bytes of one of its steps: the folder is an old
    copy, or its run went another way, and uploading would take back what the store has.
    """
    copies, folder = set(store.checkpoints()), found[0].parent
    newer = sorted(name for name in copies if _step(name) > _step(found[0].name))
    if newer:
        raise UserError(
            f"{store.location}: holds newer checkpoints ({', '.join(newer)}) than {folder}, whose newest is "
            f"{found[0].name}; give the folder of the run that wrote them, or remove them from the store to go back"
        )
    for path in found:
        try:
            own = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise file_error(
                error, f"{path / MANIFEST}: cannot be read ({error.strerror}); mend or move {path}"
            ) from error
        if path.name in copies and store.manifest(path.name) != own:
            raise UserError(
                f"{store.locate(path.name)}: is not the checkpoint of this step in {folder} (their {MANIFEST} differ); "
                "give the folder of the run that wrote it, or remove it from the store to put this one there"
            )


def _missing(found: Sequence[Path], copies: Sequence[str], keep: int | None) -> list[str]:
    """The checkpoints of a folder that a store does not have and, where it keeps only the newest `keep`, should."""
    names = sorted({path.name for path in found} | set(copies), key=_step, reverse=True)
    kept = names[: len(names) if keep is None else keep]
    return [path.name for path in found if path.name not in copies and (path.name in kept or (path / STAYS).exists())]


def _step(name: str) -> int:
    return checkpoint_step(Path(name)) or 0
