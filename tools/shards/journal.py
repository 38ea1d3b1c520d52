"""What a build has finished, so that one that was killed goes on: a line for each shard, and its part of the index."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pretrain.data.format import INDEX_DTYPE, ShardEntry
from pretrain.data.stores import LocalStore
from pretrain.durable import sync
from pretrain.errors import UserError

NAME = "journal.jsonl"
VERSION = 1


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    shard: ShardEntry
    documents_sha256: str


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is on the disk."""

    entry: ShardEntry
    index: np.ndarray
    """INDEX_DTYPE [documents]: its part of the set's index."""

    documents_sha256: str
    """sha256 over the sha256 of each document's text, in order."""


class Journal:
    """The journal in a folder. `begin` or `read` it, then `add`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME

    @property
    def has_shards(self) -> bool:
        """Whether there is a journal, and a shard in it."""
        return self._path.is_file() and self._path.read_bytes().count(b"\n") > 1

    def begin(self, build: dict[str, Any]) -> None:
        """Writes the first line: what the build is of, as values of JSON."""
        self._append({"version": VERSION, "build": build})

    def read(self, build: dict[str, Any], shards_folder: Path) -> dict[str, list[FinishedShard]] | None:
        """The finished shards of each part, in order; None where there is no journal of this very build.

        Raises UserError for a line that is no such line, and a shard that is not as it was finished.
        """
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        if json.dumps({"version": VERSION, "build": build}).encode() != lines[0]:
            return None
        finished: dict[str, list[FinishedShard]] = {}
        # The last piece is empty, or a line that a kill cut.
        for text in lines[1:-1]:
            try:
                line = _Line.model_validate_json(text)
                LocalStore(shards_folder / line.part).check(line.shard, hashes=True)
                index = np.load(self._rows_path(line.part, line.shard), allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{error}; the build that was killed cannot go on: remove {self._folder} to begin anew"
                ) from None
            finished.setdefault(line.part, []).append(FinishedShard(line.shard, index, line.documents_sha256))
        with open(self._path, "r+b") as file:
            file.truncate(len(b"\n".join(lines[:-1])) + 1)
        return finished

    def add(self, part: str, shard: FinishedShard) -> None:
        """Notes a shard whose tar is on the disk."""
        path = self._rows_path(part, shard.entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, shard.index.astype(INDEX_DTYPE), allow_pickle=False)
        sync(path)
        sync(path.parent)
        self._append(
            _Line(part=part, shard=shard.entry, documents_sha256=shard.documents_sha256).model_dump(mode="json")
        )

    def _rows_path(self, part: str, entry: ShardEntry) -> Path:
        return self._folder / "index" / part / f"{entry.name}.npy"

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
