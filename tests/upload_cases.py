"""What tests of uploads share: a log that is read, checkpoints of random bytes, and folders as on new nodes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import Checkpoints
from pretrain.metrics import RunLog
from pretrain.resume import choose_checkpoint
from pretrain.uploads import Uploads

SECONDS = 30.0
Opened = Callable[..., Uploads]
Asked = Callable[[], signal.Signals | None]


def never_asked() -> None:
    """No signal."""


class Told(RunLog):
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def kinds(self) -> list[tuple[str, int | None]]:
        return [(event["event"], event.get("step")) for event in self.events]


def write(folder: Path) -> Sequence[Path]:
    paths = [folder / "state.bin", folder / "model.json", folder / "trainer.json"]
    for path in paths:
        path.write_bytes(os.urandom(1000))
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def elsewhere(here: Checkpoints, tmp_path: Path, store: CheckpointStore) -> Checkpoints:
    """As on a new node."""
    folder = tmp_path / "new"
    if folder.exists():
        shutil.rmtree(folder)
    return replace(here, folder=folder / "checkpoints")


def go_on(checkpoints: Checkpoints, store: CheckpointStore, said: list[str]) -> Path | None:
    return choose_checkpoint(checkpoints, "auto", said.append, store)


def waited_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()
