"""Whether all ranks see the same run folder: found out at the start, not at the first checkpoint."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from parallel import process
from parallel.process import World
from pretrain.agreement import agreed
from pretrain.errors import UserError
from pretrain.fence import Fence

SECONDS = 20.0
"""For which a rank looks again: network file systems show other nodes' files late."""


def require_shared(folder: Path, fence: Fence | None, world: World) -> None:
    """Every rank calls it behind rank 0's taking the fence, which it holds.

    Raises SharedUserError when a rank does not see this fence in the folder: it has another folder of that name.
    """
    expected = process.broadcast_object(None if fence is None else (socket.gethostname(), fence.path.name, fence.token))
    if expected is None:
        return
    host, name, token = expected
    with agreed():
        if not world.is_main and not _shows(folder / name, token):
            raise UserError(
                f"folder {folder.absolute()} on {socket.gethostname()} is not the one that rank 0 has on {host} "
                f"({name}, which that wrote there, is not in it): give a --folder on a file system that all nodes share"
            )


def _shows(path: Path, token: str) -> bool:
    until = time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # which makes NFS ask its server again
            if token in path.read_text(encoding="utf-8", errors="replace"):
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.2)
