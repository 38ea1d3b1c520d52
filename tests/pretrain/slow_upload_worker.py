"""Runs on every rank: `slow_upload_worker.py FOLDER` saves a checkpoint below FOLDER and uploads it to FOLDER/store,
rank 1 slowly, piece by piece, while rank 0 has nothing to send any more; each waits less for a store that takes none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from parallel.process import exit_now, initialize, shutdown, side_group
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import Checkpoints
from pretrain.uploads import Uploads
from tests.upload_cases import Told, never_asked

WAITED_SECONDS, PIECES, PIECE_SECONDS = 2.0, 20, 0.2
PUT = CheckpointStore.put


def slowly(
    store: CheckpointStore, checkpoint: str, file: str, source: Path | bytes, keep_on: Callable[[], None] = lambda: None
) -> None:
    for _ in range(PIECES):
        keep_on()
        time.sleep(PIECE_SECONDS)
    PUT(store, checkpoint, file, source, keep_on)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    if world.rank == 1:
        CheckpointStore.put = slowly

    def write(place: Path) -> list[Path]:
        path = place / f"rank-{world.rank}.bin"
        path.write_bytes(bytes(100))
        return [path]

    here, location = Checkpoints(folder / "checkpoints", 2, world, group=side_group(5)), folder / "store"
    here.save(1, write)
    config = CheckpointConfig(upload=location, upload_end_wait_seconds=WAITED_SECONDS)
    begun = time.monotonic()
    with Uploads(here, CheckpointStore(location), config, Told(), lambda _: None, never_asked):
        pass
    assert time.monotonic() - begun >= PIECES * PIECE_SECONDS > WAITED_SECONDS
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
