"""Checkpoints that are whole or not there.

Every rank writes its files into a hidden folder and makes them durable; when all have, rank 0 writes the manifest
with the sha256 of each file, renames the folder and moves `latest`. A run that dies at any moment of this leaves
the earlier checkpoints as they were. Loading checks every byte first and takes the newest checkpoint that is whole.
`pretrain.saver` does this beside the steps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from safetensors import SafetensorError

from parallel import process
from parallel.process import World
from pretrain.agreement import SharedMachineError, SharedUserError
from pretrain.checkpoint_disk import TooLargeError, alarmed, explain, free_name, move, remove
from pretrain.durable import file_sha256, finished_file, sync, write_durable
from pretrain.fence import Fence, FencedOffError

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
        files = parse_manifest(manifest.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return [f"{manifest} is missing"]
    except ValueError as error:
        return [f"{manifest} is {error}"]
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


def parse_manifest(text: str) -> FileEntries:
    """The files that a manifest names. Raises ValueError for any text but what was written: it vouches for itself."""
    try:
        files: FileEntries = json.loads(text)["files"]
        if text == _manifest_text(files):
            return files
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged ({error})") from error
    raise ValueError("altered (it does not have the sha256 that it names)")


def publish(partial: Path, final: Path, files: FileEntries) -> None:
    """Make a checkpoint of a folder beside it whose files are finished, at once. Raises OSError."""
    _write_manifest(partial, files)
    _rename(partial, final)


class SaveError(SharedMachineError):
    """A checkpoint was not written; the earlier ones are untouched."""


class NoneWholeError(SharedUserError):
    """There are checkpoints, and each is damaged."""


class Copies(Protocol):
    """Copies of checkpoints in another place, made beside the steps."""

    def holds(self, checkpoint: str) -> bool:
        """Whether the checkpoint of this name has its copy; rank 0 knows."""

    def begin(self) -> None:
        """Copy what has none; every rank calls it behind a save."""

    def look(self) -> None:
        """Tell how that went; every rank calls it between steps."""


@dataclass(frozen=True)
class Written:
    """The files of a checkpoint to be, on a disk."""

    step: int
    partial: Path
    """The folder that becomes the checkpoint."""
    files: FileEntries
    """All ranks'."""
    own: FileEntries
    """Of them, this rank's."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together."""

    folder: Path
    keep: int
    world: World
    fence: Fence | None = None
    """Rank 0's: read before anything in the folder is removed or gets its name."""
    group: process.SideGroup | None = None
    """What `save` talks to the other ranks in, where it is called beside training."""
    staging: Path | None = None
    """Where each rank writes its files first; None: where they become a checkpoint."""
    copies: Copies | None = None
    """What is not among them is not removed for newer ones, while there is room."""

    def save(
        self,
        step: int,
        write: Callable[[Path], Iterable[Path]],
        *,
        num_bytes: int = 0,
        stays: bool = False,
        spare: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` and return its folder.

        Args:
            write: writes this rank's files into the folder it is given and gives their paths, each of which is brought
                to the disk and read again before the next one is asked for.
            num_bytes: how much that is, at least: where all ranks' are more than is free, nothing is written.
            stays: whether it is kept when `keep` newer ones are there.
            spare: how many more than `keep` are left.
            report: told on rank 0 what could not be removed, which the next save tries again, and what else went wrong
                behind the checkpoint, which is written all the same; `loud` unless given.

        Raises:
            SaveError: a rank could not write (no space, say). The unfinished folder is gone, if it can be removed, the
                earlier ones are untouched.
            FencedOffError: another copy of the run has taken the folder over.
        """
        written = self.write(step, write, num_bytes=num_bytes, report=report)
        return self.publish(written, stays=stays, spare=spare, report=report)

    def write(
        self,
        step: int,
        write: Callable[[Path], Iterable[Path]],
        *,
        num_bytes: int = 0,
        report: Callable[[str], None] | None = None,
        waits: Callable[[], None] = lambda: None,
    ) -> Written:
        """The first half of `save`, behind which the files are on the disk of `staging` where there is one.

        Args:
            waits: called when this rank's files are finished, or failed, and others' may not be.
        """
        # Of this copy of the run alone, so that ranks of an older one never write among the files of a newer one.
        copy = "" if self.fence is None else f"-{self.fence.number}"
        name = free_name(self.folder / f".partial-{checkpoint_name(step)}{copy}")
        named = process.gather_objects((name, num_bytes), self.group)
        partial, asked = self.folder / named[0][0], sum(size for _, size in named)
        self._on_main(lambda: self._make_room(partial, asked, report or loud), partial)
        place = partial if self.staging is None else self._staged
        entries: FileEntries = {}
        error = None
        try:
            if place != partial:
                if place.exists():
                    shutil.rmtree(place)
                place.mkdir(parents=True)
            for path in write(place):
                entries[path.name] = finished_file(path)
        except (OSError, SafetensorError) as failure:
            error = explain(failure, place)
        waits()
        self._require_no_error(error, partial)
        gathered = process.gather_objects(entries, self.group)
        return Written(step, partial, {name: entry for part in gathered for name, entry in part.items()}, entries)

    def publish(
        self, written: Written, *, stays: bool = False, spare: int = 0, report: Callable[[str], None] | None = None
    ) -> Path:
        """The second half of `save`."""
        partial, final = written.partial, self.folder / checkpoint_name(written.step)
        if self.staging is not None:
            error = None
            try:
                move(self._staged, partial, written.own)
            except OSError as failure:
                error = explain(failure, partial)
            self._require_no_error(error, partial)
        self._on_main(lambda: self._publish(partial, final, written.files, stays, report or loud), partial)
        self._on_main(lambda: self._retire(final, self.keep + spare, report or loud), final)
        return final

    @property
    def _staged(self) -> Path:
        """This rank's folder on its node's disk, which other runs and ranks leave alone."""
        assert self.staging is not None, "files are staged"
        run = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12]
        return self.staging / f"{self.folder.resolve().parent.name}-{run}" / f"rank-{self.world.rank:05d}"

    def _require_no_error(self, error: str | None, partial: Path) -> None:
        message = process.first_error(error, self.group)
        if message is not None:
            self._on_main(self._require_no_newer_copy, partial)  # it removes what this one has begun
            self._give_up(partial, message)

    def newest_whole(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose every byte is right; None when the run has none.

        A damaged one is renamed to `damaged-...`, so that later saves do not meet it, and `report` is told what is
        wrong.

        Raises:
            NoneWholeError: there are checkpoints but none is whole.
            SharedUserError: not all ranks see them.
            SharedMachineError: one cannot be read.
        """
        own = list_checkpoints(self.folder)
        candidates = process.broadcast_object(own)
        if not candidates:
            self.require_seen_alike(bool(own), self.folder)
            return None
        for candidate in candidates:
            found = self.check(candidate)
            if not found:
                return candidate
            report(f"checkpoint {candidate.name} is damaged and not used: {'; '.join(found)}")
            self._on_main(lambda path=candidate: self._set_aside(path), candidate)
        raise NoneWholeError(
            f"no checkpoint in {self.folder} is whole (they are kept there as damaged-*); restore one from a copy, "
            "or start over with --resume never and another --folder"
        )

    def check(self, folder: Path) -> list[str]:
        """What is wrong with one checkpoint, the ranks dividing the reading; the same list on every rank.

        Raises:
            SharedUserError: some ranks see the folder and others do not.
            SharedMachineError: a rank cannot read it (an error of the disk, say): it may be whole all the same.
        """
        self.require_seen_alike(os.path.isdir(folder), folder)
        own, error = [], None
        try:
            own = problems(folder, share=self.world.rank, shares=self.world.size)
        except OSError as failure:
            error = explain(failure, folder)
        if message := process.first_error(error):
            raise SharedMachineError(
                f"checkpoint {folder.name} cannot be read: {message}; nothing was changed: try again once it can be "
                "read, or move it away to go on from the one before"
            )
        parts = process.gather_objects(own)
        return list(dict.fromkeys(problem for part in parts for problem in part))

    def require_seen_alike(self, seen: bool, what: Path) -> None:
        """Raises SharedUserError where some ranks have seen something and others have not."""
        views = process.gather_objects((seen, socket.gethostname()))
        blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(views) if not sees]
        if 0 < len(blind) < len(views):
            more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
            raise SharedUserError(
                f"{what} is not there for {', '.join(blind[:3])}{more}, and is for other ranks: a run's checkpoints "
                "must be on a file system that all nodes share, under the same path; mount it there, or give one that "
                "is"
            )

    def require_no_newer_copy(self) -> None:
        """Raises FencedOffError when another copy of the run has taken the folder over, SaveError when that cannot be
        found out. Not beside a save.
        """
        self._on_main(self._require_no_newer_copy, self.folder)

    def _require_no_newer_copy(self) -> None:
        if self.fence is not None:
            self.fence.check()

    def _set_aside(self, checkpoint: Path) -> None:
        self._require_no_newer_copy()
        target = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if target.exists():
            shutil.rmtree(target)
        checkpoint.rename(target)

    def _make_room(self, partial: Path, asked: int, report: Callable[[str], None]) -> None:
        self._require_no_newer_copy()
        for left in (*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")):
            with alarmed(f"what an earlier save left is not removed: {left}", report):
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        for old in self._outdated(list_checkpoints(self.folder)[self.keep :]) if self.copies is not None else ():
            if shutil.disk_usage(partial).free >= asked:
                break
            with alarmed(f"{old} is not removed", report):
                remove(old, report)
                if not self.copies.holds(old.name):
                    report(f"{old.name} is removed and was not uploaded: there is no room for the next one beside it")
        if shutil.disk_usage(partial).free < asked:  # found out before the logs of the run meet a full disk
            raise TooLargeError(errno.ENOSPC, f"{asked / 1e6:.1f} MB are to be written", str(partial))

    def _publish(
        self, partial: Path, final: Path, files: FileEntries, stays: bool, report: Callable[[str], None]
    ) -> None:
        if stays:
            write_durable(partial / STAYS, "")
        _write_manifest(partial, files)
        self._require_no_newer_copy()
        if final.exists():  # of a copy that was fenced off in the middle of this
            self._require_no_newer_copy()
            remove(final, report)
        _rename(partial, final)

    def _retire(self, final: Path, keep: int, report: Callable[[str], None]) -> None:
        """Behind the publication of `final`, which nothing that fails here takes back."""
        with alarmed(f"{final.name} is written, but {self.folder / LATEST} does not name it", report):
            self._require_no_newer_copy()
            temporary = self.folder / f".{LATEST}"
            write_durable(temporary, final.name + "\n")
            temporary.replace(self.folder / LATEST)
            sync(self.folder)
        with alarmed(f"{final.name} is written, but older checkpoints are not removed", report):
            self._require_no_newer_copy()
            others = [path for path in list_checkpoints(self.folder) if path != final]  # whatever their numbers
            for old in self._outdated(others[keep - 1 :]):
                if self.copies is None or self.copies.holds(old.name):
                    with alarmed(f"{old} is not removed", report):
                        remove(old, report)

    def _outdated(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Of those behind the newest, the ones that do not stay, oldest first."""
        return [path for path in reversed(checkpoints) if not (path / STAYS).exists()]

    def _on_main(self, action: Callable[[], None], partial: Path) -> None:
        error, is_fenced_off = None, False
        if self.world.is_main:
            try:
                action()
            except FencedOffError as fenced:
                error, is_fenced_off = str(fenced), True
            except OSError as failure:
                error = explain(failure, partial)
        message, is_fenced_off = process.broadcast_object((error, is_fenced_off), self.group)
        if is_fenced_off:
            raise FencedOffError(message)
        if message is not None:
            self._give_up(partial, message)

    def _give_up(self, partial: Path, message: str) -> NoReturn:
        if self.world.is_main and partial.name.startswith(".partial-"):
            shutil.rmtree(partial, ignore_errors=True)
        process.gather_objects(None, self.group)  # nobody looks before it is gone
        kept = "the earlier checkpoints are untouched"
        with contextlib.suppress(OSError):  # of the disk that failed: the ranks stay in step
            newest = next((path.name for path in list_checkpoints(self.folder)), None)
            kept = f"{kept} (newest: {newest})" if newest else "there is no earlier checkpoint"
        raise SaveError(f"checkpoint not written: {message}; {kept}")


def loud(message: str) -> None:
    """Print a message that nobody should miss to the error stream."""
    line = "!" * 100
    print(f"{line}\n{message}\n{line}", file=sys.stderr, flush=True)


def _manifest_text(files: FileEntries) -> str:
    # It vouches for itself too: any altered byte of it makes it differ from this text of what it says.
    body = {"version": _VERSION, "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _rename(partial: Path, final: Path) -> None:
    partial.rename(final)
    sync(final.parent)


def _write_manifest(partial: Path, files: FileEntries) -> None:
    write_durable(partial / MANIFEST, _manifest_text(files))
    sync(partial)
