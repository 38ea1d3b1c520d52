"""Checkpoints that are whole or not there.

Every rank writes its files into a hidden folder and makes them durable; when all have, rank 0 writes the manifest
with the sha256 of each file, renames the folder and moves `latest`. A run that dies at any moment of this leaves
the earlier checkpoints as they were. Loading checks every byte first and takes the newest checkpoint that is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from parallel import process
from parallel.process import World
from pretrain.agreement import SharedUserError
from pretrain.durable import file_sha256, sync

MANIFEST = "manifest.json"
LATEST = "latest"
STAYS = "stays"
"""An empty file in checkpoints that are not removed when newer ones come."""
_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
"""Where they are in a run's folder."""
_NAME = re.compile(r"step-(\d{8,})")

FileEntries = dict[str, dict[str, str | int]]


def checkpoint_name(step: int) -> str:
    """The folder's name for the state after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and checkpoint_step(path) is not None]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0, reverse=True)


def problems(folder: Path, *, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint: an empty list when every file has the bytes that were written.

    Args:
        share, shares: check only every `shares`-th file from the `share`-th on, so that ranks can divide the reading.

    Raises OSError for what cannot be read now and may be whole all the same.
    """
    manifest = folder / MANIFEST
    try:
        text = manifest.read_text(encoding="utf-8")
        files: FileEntries = json.loads(text)["files"]
        if text != _manifest_text(files):
            return [f"{manifest} is altered (it does not have the sha256 that it names)"]
    except FileNotFoundError:
        return [f"{manifest} is missing"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{manifest} is damaged ({error})"]
    found = []
    for name in sorted(files)[share::shares]:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                found.append(f"{path} has {size} bytes, {expected['bytes']} were written")
            elif file_sha256(path) != expected["sha256"]:
                found.append(f"{path} is altered (its sha256 is not the manifest's)")
        except FileNotFoundError:
            found.append(f"{path} is missing")
    return found


def finished_file(path: Path) -> dict[str, str | int]:
    """Bring a file of a checkpoint that is being written to the disk; what the manifest says of it. Raises OSError."""
    # safetensors writes for the owner alone, and the one who exports may be another.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync(path)
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def publish(partial: Path, final: Path, files: FileEntries) -> None:
    """Make a checkpoint of a folder beside it whose files are finished, at once. Raises OSError."""
    _write_durable(partial / MANIFEST, _manifest_text(files))
    sync(partial)
    partial.rename(final)
    sync(final.parent)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together."""

    folder: Path
    keep: int
    world: World

    def save(self, step: int, write: Callable[[Path], Sequence[Path]], *, stays: bool = False) -> Path:
        """Write the checkpoint of `step` and return its folder.

        Args:
            write: writes this rank's files into the folder it is given and returns their paths.
            stays: whether it is kept when `keep` newer ones are there.

        Raises:
            SharedUserError: a rank could not write (no space, say). The unfinished folder is gone, the earlier
                ones are untouched.
        """
        final = self.folder / checkpoint_name(step)
        partial = self.folder / f".partial-{final.name}"
        self._on_main(lambda: self._make_room(partial), partial)
        entries: FileEntries = {}
        error = None
        try:
            for path in write(partial):
                entries[path.name] = finished_file(path)
        except (OSError, SafetensorError) as failure:
            error = _explain(failure, partial)
        gathered = process.gather_objects((entries, error))
        message = process.first_error(error)
        if message is not None:
            self._give_up(partial, message)
        files = {name: entry for part, _ in gathered for name, entry in part.items()}
        self._on_main(lambda: self._publish(partial, final, files, stays), partial)
        return final

    def newest_whole(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose every byte is right; None when the run has none.

        A damaged one is renamed to `damaged-...`, so that later saves do not meet it, and `report` is told what is
        wrong.

        Raises:
            SharedUserError: there are checkpoints but none is whole, or one cannot be read.
        """
        candidates = process.broadcast_object(list_checkpoints(self.folder))
        if not candidates:
            return None
        for candidate in candidates:
            found = self.check(candidate)
            if not found:
                return candidate
            report(f"checkpoint {candidate.name} is damaged and not used: {'; '.join(found)}")
            self._on_main(lambda path=candidate: _set_aside(path), candidate)
        raise SharedUserError(
            f"no checkpoint in {self.folder} is whole (they are kept there as damaged-*); restore one from a copy, "
            "or start over with --resume never and another --folder"
        )

    def check(self, folder: Path) -> list[str]:
        """What is wrong with one checkpoint, the ranks dividing the reading; the same list on every rank.

        Raises:
            SharedUserError: a rank cannot read it (an error of the disk, say): it may be whole all the same.
        """
        own, error = [], None
        try:
            own = problems(folder, share=self.world.rank, shares=self.world.size)
        except OSError as failure:
            error = _explain(failure, folder)
        if message := process.first_error(error):
            raise SharedUserError(
                f"checkpoint {folder.name} cannot be read: {message}; nothing was changed: try again once it can be "
                "read, or move it away to go on from the one before"
            )
        parts = process.gather_objects(own)
        return list(dict.fromkeys(problem for part in parts for problem in part))

    def _make_room(self, partial: Path) -> None:
        for left in (*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, files: FileEntries, stays: bool) -> None:
        if stays:
            _write_durable(partial / STAYS, "")
        publish(partial, final, files)
        temporary = self.folder / f".{LATEST}"
        _write_durable(temporary, final.name + "\n")
        temporary.replace(self.folder / LATEST)
        sync(self.folder)
        others = [path for path in list_checkpoints(self.folder) if path != final]  # whatever their numbers
        for old in others[self.keep - 1 :]:
            if (old / STAYS).exists():
                continue
            hidden = old.with_name(f".removed-{old.name}")  # so that a death here leaves no half of a checkpoint
            old.rename(hidden)
            shutil.rmtree(hidden)

    def _on_main(self, action: Callable[[], None], partial: Path) -> None:
        error = None
        if self.world.is_main:
            try:
                action()
            except OSError as failure:
                error = _explain(failure, partial)
        message = process.broadcast_object(error)
        if message is not None:
            self._give_up(partial, message)

    def _give_up(self, partial: Path, message: str) -> None:
        if self.world.is_main and partial.name.startswith(".partial-"):
            shutil.rmtree(partial, ignore_errors=True)
        process.barrier()
        newest = next((path.name for path in list_checkpoints(self.folder)), None)
        kept = (
            f"the earlier checkpoints are untouched (newest: {newest})" if newest else "there is no earlier checkpoint"
        )
        raise SharedUserError(f"checkpoint not written: {message}; {kept}")


def loud(message: str) -> None:
    """Print a message that nobody should miss to the error stream."""
    line = "!" * 100
    print(f"{line}\n{message}\n{line}", file=sys.stderr, flush=True)


def _manifest_text(files: FileEntries) -> str:
    # It vouches for itself too: any altered byte of it makes it differ from this text of what it says.
    body = {"version": _VERSION, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _explain(failure: OSError | SafetensorError, folder: Path) -> str:
    text = str(failure)
    place = getattr(failure, "filename", None) or folder
    if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        free = shutil.disk_usage(folder.parent).free
        return (
            f"no space left for {place} ({free / 1e6:.1f} MB free); free some, lower checkpoint.keep, or move `folder`"
        )
    return f"{place}: {getattr(failure, 'strerror', None) or text}"


def _set_aside(folder: Path) -> None:
    target = folder.with_name(f"damaged-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def _write_durable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
