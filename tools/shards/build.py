"""Builds training and validation shards from documents.

This process reads the documents in order, and writes; others encode them (`tools.shards.encoder`). So the shards do not
depend on the number of processes.

Everything is written into a folder OUTPUT.building beside the output, whose folder `shards` is renamed to the output at
the end: an interrupted build leaves nothing under the output's name. What it has finished is noted in a journal there;
the same build reads the documents again, but goes on with encoding where that ends. Another build of the same output
removes what is left of it.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.format import DTYPES, MANIFEST_NAME, PARTS, Manifest, SplitEntry, token_dtype
from pretrain.durable import sync
from pretrain.errors import UserError
from tools.command import Progress, count, writing
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.shards.encoder import Encoders
from tools.shards.journal import FinishedShard, Journal
from tools.shards.writer import SetWriter

DEFAULT_SHARD_TOKENS = 1 << 26
DEFAULT_VALIDATION_FRACTION = 0.01
# Bytes of text encoded in one call: enough that the call's cost vanishes, little enough that progress is seen.
BATCH_BYTES = 1 << 20
SHARDS = "shards"


@dataclass(frozen=True)
class Built:
    """What a build made: the manifest of each part, and what it took."""

    manifests: dict[str, Manifest]
    seconds: float
    tokens: int
    """Tokens that were encoded, without those of shards that an earlier, killed build had finished."""
    duplicates: int
    """Documents left out because their text had been there before."""


class _Item(NamedTuple):
    """A document on its way to a writer."""

    part: str
    text: bytes
    digest: bytes
    bytes_read: int


class _Finished:
    """The documents of a part's finished shards, which are read again but not encoded again."""

    def __init__(self, shards: list[FinishedShard], folder: Path) -> None:
        self._shards = list(reversed(shards))
        self._folder = folder
        self._begin()

    def take(self, digest: bytes) -> bool:
        """Whether the part's next document is one of them; raises UserError where it is another than it was."""
        if not self._shards:
            return False
        self._digest.update(digest)
        self._left -= 1
        if not self._left:
            if self._digest.hexdigest() != self._shards[-1].documents_sha256:
                raise self._changed()
            self._shards.pop()
            self._begin()
        return True

    def require_all_taken(self) -> None:
        """Raises UserError where there are fewer documents than there were."""
        if self._shards:
            raise self._changed()

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self._left = self._shards[-1].entry.documents if self._shards else 0

    def _changed(self) -> UserError:
        return UserError(
            f"{self._folder}: the documents of {self._shards[-1].entry.name} are not those that the killed build read, "
            "so it cannot go on: remove the folder to begin anew"
        )


@dataclass
class _Sorter:
    """Divides documents into parts, and leaves out those that were there before or are in finished shards."""

    validation_fraction: float
    deduplicate: bool
    finished: dict[str, _Finished]
    duplicates: int = 0
    _seen: set[bytes] = field(default_factory=set)

    def batches(self, reader: DocumentReader) -> Iterator[tuple[list[_Item], list[bytes]]]:
        """The documents to encode, and their texts, some at a time. Raises UserError where those of finished shards are
        others than they were.
        """
        items: list[_Item] = []
        size = 0
        for document in reader:
            text = document.text.encode()
            digest = hashlib.sha256(text).digest()
            if self.deduplicate:
                if digest in self._seen:
                    self.duplicates += 1
                    continue
                self._seen.add(digest)
            part = _part(digest, self.validation_fraction)
            if self.finished[part].take(digest):
                continue
            items.append(_Item(part, text, digest, document.bytes_read))
            size += len(text)
            if size >= BATCH_BYTES:
                yield items, [item.text for item in items]
                items, size = [], 0
        for finished in self.finished.values():
            finished.require_all_taken()
        if items:
            yield items, [item.text for item in items]


def build(
    reader: DocumentReader,
    tokenizer_path: Path,
    output: Path,
    *,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    deduplicate: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> Built:
    """Builds OUTPUT/train and, for a fraction above 0, OUTPUT/validation, with `workers` processes that encode; goes on
    where the same build was killed.

    Raises UserError for an output that is in use or not empty, a tokenizer without EOS or that would lose text,
    documents that cannot be read, a part that would be empty, and a disk that is full; the output is untouched then.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction}: must be at least 0 and below 1")
    _check_output(output, overwrite)
    tokenizer = open_with_eos(tokenizer_path)
    _check_parts(reader, validation_fraction)
    parts = PARTS if validation_fraction else PARTS[:1]
    dtype = token_dtype(tokenizer.vocab_size)
    description = {
        "tokenizer_sha256": tokenizer.sha256,
        "shard_tokens": shard_tokens,
        "validation_fraction": validation_fraction,
        "deduplicate": deduplicate,
        "options": {**vars(reader.options)},
        "files": [[str(file.location), file.bytes, file.changed] for file in reader.files],
    }
    with _building(output) as folder:
        journal, finished = _begun(folder, parts, description)
        sorter = _Sorter(validation_fraction, deduplicate, {part: _Finished(finished[part], folder) for part in parts})
        writers = {
            part: SetWriter(
                folder / SHARDS / part,
                tokenizer,
                dtype,
                shard_tokens,
                finished=finished[part],
                on_shard=partial(journal.add, part),
            )
            for part in parts
        }
        progress = Progress(reader.bytes_total)
        try:
            tokens = _write_documents(reader, sorter, Encoders(tokenizer, DTYPES[dtype], workers), writers, progress)
            manifests = {
                part: writer.finish(SplitEntry(part=part, validation_fraction=validation_fraction))
                for part, writer in writers.items()
            }
        finally:
            progress.close()
            for writer in writers.values():
                writer.close()
        _publish(folder / SHARDS, output)
        shutil.rmtree(folder)
    return Built(manifests, progress.seconds, tokens, sorter.duplicates)


def belongs_to_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out, by the hash of its UTF-8 text: equal documents stay on one side."""
    return _part(hashlib.sha256(text).digest(), fraction) == "validation"


def open_with_eos(path: Path) -> Tokenizer:
    """The tokenizer in a file; raises UserError for one that would lose text or has no EOS."""
    tokenizer = Tokenizer.open(path)
    if tokenizer.eos_id is None:
        raise UserError(f"{path}: has no EOS token, which ends every document; train one with tools.tokenizer")
    return tokenizer


def _part(digest: bytes, fraction: float) -> str:
    return "validation" if int.from_bytes(digest[:8], "big") < fraction * 2**64 else "train"


def _write_documents(
    reader: DocumentReader,
    sorter: _Sorter,
    encoders: Encoders,
    writers: dict[str, SetWriter],
    progress: Progress,
) -> int:
    """Encodes and writes all documents; returns how many tokens that were."""
    before = sum(writer.tokens for writer in writers.values())
    total = 0
    with encoders:
        for items, encoded in encoders.encode(sorter.batches(reader)):
            for item, tokens in zip(items, encoded, strict=True):
                writers[item.part].add(tokens, len(item.text), item.digest)
            total = sum(writer.tokens for writer in writers.values()) - before
            progress.update(items[-1].bytes_read, f"{count(total)} tokens, {count(total / progress.seconds)} tokens/s")
    return total


def _begun(
    folder: Path, parts: Sequence[str], description: dict[str, Any]
) -> tuple[Journal, dict[str, list[FinishedShard]]]:
    """The journal of a build, and the shards that were finished before; of another build nothing is left."""
    journal = Journal(folder)
    finished = journal.read(description, folder / SHARDS)
    if finished is None:
        if journal.has_shards:
            print(f"{folder}: removed: a build of other input, tokenizer or options left it", file=sys.stderr)
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        journal.begin(description)
    elif finished:
        number = sum(map(len, finished.values()))
        print(f"{folder}: goes on after {number} finished shards; their documents are read again", file=sys.stderr)
    return journal, {part: (finished or {}).get(part, []) for part in parts}


def _check_parts(reader: DocumentReader, fraction: float) -> None:
    """Reads until each part has a document, so that an empty part is known before hours of encoding, not after."""
    empty = set(PARTS if fraction else PARTS[:1])
    documents = 0
    for document in reader:
        documents += 1
        empty.discard("validation" if belongs_to_validation(document.text.encode(), fraction) else "train")
        if not empty:
            return
    if not documents:
        raise UserError(f"{', '.join(map(str, reader.inputs))}: no document with text")
    raise UserError(
        f"--validation-fraction {fraction}: none of the {documents} documents fell into {' or '.join(empty)}; give 0 "
        "for no validation set, another fraction, or divide text files into documents with --separator"
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: exists and is no folder; choose another --output")
    entries = sorted(path.name for path in output.iterdir())
    if not entries:
        return
    if not overwrite:
        raise UserError(
            f"{output}: is not empty; choose another --output, or replace the shards in it with --overwrite"
        )
    if foreign := [name for name in entries if name not in PARTS or not (output / name / MANIFEST_NAME).is_file()]:
        raise UserError(f"{output}: holds more than shards ({', '.join(foreign[:3])}), which --overwrite would delete")


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """The folder beside `output` that it is built in, locked against a second build. When the build fails, the folder
    stays if it holds finished shards, which a further try goes on from.
    """
    folder = output.with_name(output.name + ".building")
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another build is writing there; wait for it or choose another --output"
                ) from None
            try:
                yield folder
            except BaseException:
                if Journal(folder).has_shards:
                    print(f"{folder}: holds finished shards, from which the same command goes on", file=sys.stderr)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        finally:
            os.close(lock)


def _publish(folder: Path, output: Path) -> None:
    """Renames the finished folder to `output`, which is absent, empty, or holds shards that may be replaced."""
    sync(folder)
    old = output.with_name(output.name + ".replaced")
    if output.is_dir() and any(output.iterdir()):
        if old.exists():
            shutil.rmtree(old)
        output.rename(old)
    folder.rename(output)
    sync(output.parent)
    if old.exists():
        shutil.rmtree(old)
