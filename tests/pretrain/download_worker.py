"""Runs on every rank: `download_worker.py FOLDER STORE` downloads the newest checkpoint, rank 1 slowly, piece by piece,
each rank watched by a watchdog of less time than that takes; prints the checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from parallel.process import exit_now, initialize, shutdown
from parallel.watchdog import Watchdog
from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import Checkpoints
from pretrain.resume import choose_checkpoint

WATCHED_SECONDS, PIECES, PIECE_SECONDS = 4.0, 10, 0.7
FETCH = CheckpointStore.fetch


def slowly(store: CheckpointStore, name: str, file: str, target: Path, keep_on: Callable[[], None]) -> None:
    """The first file comes in pieces."""
    CheckpointStore.fetch = FETCH
    for _ in range(PIECES):
        keep_on()
        time.sleep(PIECE_SECONDS)
    FETCH(store, name, file, target, keep_on)


def main(folder: Path, location: Path) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    if world.rank == 1:
        CheckpointStore.fetch = slowly
    with Watchdog(WATCHED_SECONDS, rank=world.rank, ranks=world.size, field="the test") as watchdog:
        watchdog.feed("the choice")
        here, store = Checkpoints(folder, 2, world), CheckpointStore(location)
        print(choose_checkpoint(here, "auto", print, store, watchdog.feed, watchdog.rest))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
