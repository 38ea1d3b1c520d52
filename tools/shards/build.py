"""Builds training and validation shards from documents.

Everything is written into a folder OUTPUT.building beside the output, which is renamed at the end: an interrupted build
leaves nothing under the output's name. The next build of that output removes what a killed one left.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.format import MANIFEST_NAME, PARTS, Manifest, SplitEntry
from pretrain.durable import sync
from pretrain.errors import UserError
from tools.command import Progress, count, writing
from tools.documents import Document, DocumentReader
from tools.encoding import Tokenizer
from tools.shards.writer import SetWriter

DEFAULT_SHARD_TOKENS = 1 << 26
DEFAULT_VALIDATION_FRACTION = 0.01
# Characters encoded in one call: enough that the call's cost vanishes, little enough that progress is seen.
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Built:
    """What a build made: the manifest of each part, and the time it took."""

    manifests: dict[str, Manifest]
    seconds: float


def build(
    reader: DocumentReader,
    tokenizer_path: Path,
    output: Path,
    *,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    overwrite: bool = False,
) -> Built:
    """Builds OUTPUT/train and, for a fraction above 0, OUTPUT/validation.

    Raises UserError for an output that is in use or not empty, a tokenizer without EOS or that would lose text,
    documents that cannot be read, a part that would be empty, and a disk that is full; the output is untouched then.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction}: must be at least 0 and below 1")
    _check_output(output, overwrite)
    tokenizer = Tokenizer.open(tokenizer_path)
    if tokenizer.eos_id is None:
        raise UserError(
            f"{tokenizer_path}: has no EOS token, which ends every document; train one with tools.tokenizer"
        )
    _check_parts(reader, validation_fraction)
    progress = Progress(reader.bytes_total)
    with _building(output) as folder:
        parts = PARTS if validation_fraction else PARTS[:1]
        writers = {part: SetWriter(folder / part, tokenizer, shard_tokens) for part in parts}
        try:
            _write_documents(reader, tokenizer, writers, validation_fraction, progress)
            manifests = {
                part: writer.finish(SplitEntry(part=part, validation_fraction=validation_fraction))
                for part, writer in writers.items()
            }
        finally:
            progress.close()
            for writer in writers.values():
                writer.close()
        _publish(folder, output)
    return Built(manifests, progress.seconds)


def belongs_to_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out, by the hash of its UTF-8 text: equal documents stay on one side."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < fraction * 2**64


def _write_documents(
    reader: DocumentReader, tokenizer: Tokenizer, writers: dict[str, SetWriter], fraction: float, progress: Progress
) -> None:
    for batch in _batches(reader):
        for document, tokens in zip(batch, tokenizer.encode_documents([item.text for item in batch]), strict=True):
            text = document.text.encode()
            part = "validation" if belongs_to_validation(text, fraction) else "train"
            writers[part].add(tokens, len(text))
        total = sum(writer.tokens for writer in writers.values())
        progress.update(batch[-1].bytes_read, f"{count(total)} tokens, {count(total / progress.seconds)} tokens/s")


def _batches(reader: DocumentReader) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in reader:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
    """A fresh folder beside `output`, locked against a second build, removed at the end if it is still there."""
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
                for left in folder.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
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
