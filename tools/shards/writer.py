"""Writes one shard set: tars, index, manifest, as `pretrain.data.format` describes them.

The tars are written by hand, not with tarfile's or webdataset's writer: every header is fixed (ustar, mtime 0, no
owner), the sha256 is taken on the way, and the offset of each document is known without reading back.
"""

import hashlib
import os
import shutil
import tarfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.format import (
    DTYPES,
    EOS_SEPARATOR,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    TOKENS_SUFFIX,
    FileEntry,
    Manifest,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
)
from pretrain.durable import file_sha256, sync
from tools.encoding import Tokenizer
from tools.shards.journal import FinishedShard


class _Tar:
    """One tar under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.tokens = self.bytes = 0
        self._digest = hashlib.sha256()
        self._documents_digest = hashlib.sha256()
        self._index = array("q")
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by finish() or close()

    def add(self, key: str, data: bytes, row: tuple[int, int, int], digest: bytes) -> None:
        """Adds a document as a member; `row`: its number of the shard, tokens, and bytes of text in the index."""
        header = tarfile.TarInfo(key + TOKENS_SUFFIX)
        header.size = len(data)
        header.mode = 0o444
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        shard, tokens, text_bytes = row
        self._index.extend((shard, self.bytes, tokens, text_bytes))
        self._documents_digest.update(digest)
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self.documents += 1
        self.tokens += tokens

    def finish(self) -> FinishedShard:
        """Ends the tar and brings it to the disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = ShardEntry(
            name=self.path.name,
            sha256=self._digest.hexdigest(),
            bytes=self.bytes,
            documents=self.documents,
            tokens=self.tokens,
        )
        rows = np.frombuffer(self._index, np.int64).reshape(-1, len(INDEX_DTYPE)).astype("<i8")
        return FinishedShard(entry, rows.view(INDEX_DTYPE)[:, 0], self._documents_digest.hexdigest())

    def close(self) -> None:
        """Closes the file of a tar that will not be finished."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class SetWriter:
    """Writes a set into a folder: `add` documents, then `finish`."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        dtype: str,
        shard_tokens: int,
        *,
        finished: Sequence[FinishedShard] = (),
        on_shard: Callable[[FinishedShard], None] = lambda shard: None,
    ) -> None:
        """A shard is closed before the document that would take it over `shard_tokens`; a document is never divided.

        Args:
            dtype: one of DTYPES, that holds every id.
            finished: shards that are in the folder already: their documents are not added again. What else is there is
                removed.
            on_shard: is called with every further shard once it is on the disk.
        """
        folder.mkdir(parents=True, exist_ok=True)
        known = {shard.entry.name for shard in finished}
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._finished = list(finished)
        self._on_shard = on_shard
        self._tar: _Tar | None = None
        self.documents = sum(shard.entry.documents for shard in finished)
        self.tokens = sum(shard.entry.tokens for shard in finished)
        self.text_bytes = sum(int(shard.index["text_bytes"].sum()) for shard in finished)

    def add(self, tokens: bytes, text_bytes: int, digest: bytes) -> None:
        """Adds a document: its tokens, EOS included, as raw numbers of the dtype; the UTF-8 bytes of its text, and
        their sha256.
        """
        number = len(tokens) // DTYPES[self._dtype].itemsize
        if self._tar is not None and self._tar.tokens + number > self._shard_tokens:
            self._finish_shard()
        if self._tar is None:
            self._tar = _Tar(self._folder / f"shards-{len(self._finished):06d}.tar")
        self._tar.add(f"{self.documents:012d}", tokens, (len(self._finished), number, text_bytes), digest)
        self.documents += 1
        self.tokens += number
        self.text_bytes += text_bytes

    def finish(self, split: SplitEntry) -> Manifest:
        """Writes what stands beside the shards, the manifest last."""
        if self._tar is not None:
            self._finish_shard()
        index = np.concatenate([shard.index for shard in self._finished])
        shards = tuple(shard.entry for shard in self._finished)
        return write_beside(
            self._folder, self._tokenizer, index, shards, dtype=self._dtype, split=split, separator=EOS_SEPARATOR
        )

    def _finish_shard(self) -> None:
        shard = self._tar.finish()
        self._tar = None
        sync(self._folder)
        self._finished.append(shard)
        self._on_shard(shard)

    def close(self) -> None:
        """Closes the open tar of a set that will not be finished."""
        if self._tar is not None:
            self._tar.close()


def write_beside(
    folder: Path,
    tokenizer: Tokenizer,
    index: np.ndarray,
    shards: tuple[ShardEntry, ...],
    *,
    dtype: str,
    split: SplitEntry,
    separator: str,
) -> Manifest:
    """Writes what stands beside the shards: index, bytes of tokens, tokenizer, and the manifest last."""

    def entry(name: str) -> FileEntry:
        path = folder / name
        return FileEntry(name=name, sha256=file_sha256(path), bytes=path.stat().st_size)

    np.save(folder / INDEX_NAME, index, allow_pickle=False)
    np.save(folder / TOKEN_BYTES_NAME, tokenizer.token_bytes().astype("<u2"), allow_pickle=False)
    if not (folder / TOKENIZER_NAME).exists() or not tokenizer.path.samefile(folder / TOKENIZER_NAME):
        shutil.copyfile(tokenizer.path, folder / TOKENIZER_NAME)
    manifest = Manifest(
        dtype=dtype,
        tokenizer=TokenizerEntry(
            **entry(TOKENIZER_NAME).model_dump(),
            vocab_size=tokenizer.vocab_size,
            unk_id=tokenizer.unk_id,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        ),
        separator=separator,
        split=split,
        documents=len(index),
        tokens=int(index["tokens"].sum()),
        text_bytes=int(index["text_bytes"].sum()),
        index=entry(INDEX_NAME),
        token_bytes=entry(TOKEN_BYTES_NAME),
        shards=shards,
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    for written in (INDEX_NAME, TOKEN_BYTES_NAME, TOKENIZER_NAME, MANIFEST_NAME):
        sync(folder / written)
    sync(folder)
    return manifest
