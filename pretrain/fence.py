"""A fencing token: of the copies of a run that believe to be the only one, the one that started last is right.

The lock of a run's folder holds on one node. A job that was requeued because its node is cut off runs on there, unseen,
while its next copy starts elsewhere. So each copy takes the next number of `fence.json` when it starts, and reads the
file again before it changes what is shared: an older copy finds a number that is not its own, and ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.process import World
from pretrain.agreement import SharedUserError, agreed
from pretrain.durable import sync
from pretrain.errors import UserError, file_error

FENCE_FILE = "fence.json"


class FencedOffError(SharedUserError):
    """Another copy of the run has taken its folder over."""


@dataclass(frozen=True)
class Fence:
    """The number that a copy of a run took in the run's folder."""

    path: Path
    number: int
    token: str
    """Tells two copies apart that took the same number at the same moment: the one whose file stayed is right."""

    def check(self) -> None:
        """Raises FencedOffError when another copy has taken a number since, OSError when the file cannot be read."""
        try:
            found = _read(self.path)
        except ValueError as error:
            raise OSError(errno.EIO, f"damaged ({error})", str(self.path)) from error
        if (found.get("number"), found.get("token")) != (self.number, self.token):
            where = ", ".join(f"{name} {found[name]}" for name in ("host", "pid", "job") if found.get(name) is not None)
            raise FencedOffError(
                f"{self.path}: another copy of this run took its folder over (number {found.get('number')}, {where}; "
                f"this one is {self.number}). This copy ends and changes nothing there any more; do not start it again"
            )


def take_fence(folder: Path, world: World) -> Fence | None:
    """Fence off all earlier copies of the run in this folder. Every rank calls it, behind the folder's lock; rank 0
    has the fence.

    Raises SharedUserError when the file is damaged or cannot be written.
    """
    fence = None
    with agreed():
        if world.is_main:
            fence = _take(folder / FENCE_FILE)
    return fence


def held_by_older_copy(folder: Path) -> bool:
    """Whether the copy that took the fence of this folder last is of the same Slurm job as this process, from before
    the job was requeued.
    """
    job, restart = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    try:
        found = _read(folder / FENCE_FILE)
        return job is not None and found.get("job") == job and int(found.get("restart") or 0) < restart
    except (OSError, ValueError):
        return False


def _take(path: Path) -> Fence:
    try:
        number = int(_read(path)["number"]) + 1 if path.exists() else 1
        token = uuid.uuid4().hex
        environment = {"job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT")}
        entry = {"number": number, "token": token, "host": socket.gethostname(), "pid": os.getpid(), **environment}
        temporary = path.with_name(f".{path.name}-{token}")
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        message = f"{path}: {error.strerror or error}; give a --folder that can be written"
        raise file_error(error, message) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); when no other copy of this run is there any more, remove the file"
        ) from error
    return Fence(path, number, token)


def _read(path: Path) -> dict[str, Any]:
    entry = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entry, dict):
        raise ValueError(f"{path} holds no entry")
    return entry
