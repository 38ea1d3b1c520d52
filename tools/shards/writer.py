"""Writes one shard set: tars, index, manifest, as `pretrain.data.format` describes them.

The tars are written by hand, not with tarfile's or webdataset's writer: every header is fixed (ustar, mtime 0, no
owner), the sha256 is taken on the way, and the offset of each document is known without reading back.
"""

import hashlib
import os
import shutil
import tarfile
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.format import (
    DTYPES,
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
    token_dtype,
)
from pretrain.durable import file_sha256, sync
from tools.encoding import Tokenizer


class _Tar:
    """One tar under way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.tokens = self.bytes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by finish() or close()

    def add(self, key: str, data: bytes, tokens: int) -> int:
        """Adds a member; returns the offset of its data in the file."""
        header = tarfile.TarInfo(key + TOKENS_SUFFIX)
        header.size = len(data)
        header.mode = 0o444
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self.documents += 1
        self.tokens += tokens
        return offset

    def finish(self) -> ShardEntry:
        """Ends the tar and brings it to the disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardEntry(
            name=self.path.name,
            sha256=self._digest.hexdigest(),
            bytes=self.bytes,
            documents=self.documents,
            tokens=self.tokens,
        )

    def close(self) -> None:
        """Closes the file of a tar that will not be finished."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class SetWriter:
    """Writes a set into a new folder: `add` documents, then `finish`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        """A shard is closed before the document that would take it over `shard_tokens`; a document is never divided."""
        folder.mkdir()
        self.documents = self.tokens = self.text_bytes = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shard_tokens = shard_tokens
        self._shards: list[ShardEntry] = []
        self._index = array("q")
        self._tar: _Tar | None = None

    def add(self, tokens: list[int], text_bytes: int) -> None:
        """Adds a document: its tokens without EOS, and the UTF-8 bytes of its text."""
        data = np.array([*tokens, self._tokenizer.eos_id], DTYPES[self._dtype])
        if self._tar is not None and self._tar.tokens + len(data) > self._shard_tokens:
            self._shards.append(self._tar.finish())
            self._tar = None
        if self._tar is None:
            self._tar = _Tar(self._folder / f"shards-{len(self._shards):06d}.tar")
        offset = self._tar.add(f"{self.documents:012d}", data.tobytes(), len(data))
        self._index.extend((len(self._shards), offset, len(data), text_bytes))
        self.documents += 1
        self.tokens += len(data)
        self.text_bytes += text_bytes

    def finish(self, split: SplitEntry) -> Manifest:
        """Writes what stands beside the shards, the manifest last."""
        if self._tar is not None:
            self._shards.append(self._tar.finish())
            self._tar = None
        index = np.frombuffer(self._index, np.int64).reshape(-1, len(INDEX_DTYPE)).astype("<i8").view(INDEX_DTYPE)[:, 0]
        np.save(self._folder / INDEX_NAME, index, allow_pickle=False)
        np.save(self._folder / TOKEN_BYTES_NAME, self._tokenizer.token_bytes().astype("<u2"), allow_pickle=False)
        shutil.copyfile(self._tokenizer.path, self._folder / TOKENIZER_NAME)
        tokenizer = self._tokenizer
        manifest = Manifest(
            dtype=self._dtype,
            tokenizer=TokenizerEntry(
                **self._entry(TOKENIZER_NAME).model_dump(),
                vocab_size=tokenizer.vocab_size,
                unk_id=tokenizer.unk_id,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
            ),
            split=split,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            index=self._entry(INDEX_NAME),
            token_bytes=self._entry(TOKEN_BYTES_NAME),
            shards=tuple(self._shards),
        )
        path = self._folder / MANIFEST_NAME
        path.write_text(manifest.to_json())
        for written in (INDEX_NAME, TOKEN_BYTES_NAME, TOKENIZER_NAME, MANIFEST_NAME):
            sync(self._folder / written)
        sync(self._folder)
        return manifest

    def close(self) -> None:
        """Closes the open tar of a set that will not be finished."""
        if self._tar is not None:
            self._tar.close()

    def _entry(self, name: str) -> FileEntry:
        path = self._folder / name
        return FileEntry(name=name, sha256=file_sha256(path), bytes=path.stat().st_size)
