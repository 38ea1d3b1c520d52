"""One folder of tokenised shards, opened and checked: documents by number, tokens by position."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.files import OpenFiles
from pretrain.data.format import DTYPES, INDEX_DTYPE, FileEntry, Manifest
from pretrain.durable import file_sha256
from pretrain.errors import UserError

Verify = Literal["sizes", "hashes"]


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made a shard set; `path` is the copy inside the set's folder."""

    path: Path
    sha256: str
    vocab_size: int
    unk_id: int | None
    bos_id: int | None
    eos_id: int
    pad_id: int | None


class Record(NamedTuple):
    """Where a document is: the number of its shard, and its first token's offset in bytes from the tar's start."""

    shard: int
    offset: int
    tokens: int
    text_bytes: int


class ShardSet:
    """A shard set (format: `pretrain.data.format`). Reading is thread-safe; open with `ShardSet.open`."""

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray, token_bytes: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.document_tokens: np.ndarray = index["tokens"].astype(np.int64)
        """int64 [documents]: tokens of each document in stored order, EOS included."""
        self.token_bytes = token_bytes
        """int64 [vocab_size]: UTF-8 bytes of text that each token stands for."""
        entry = manifest.tokenizer
        self.tokenizer = TokenizerInfo(
            folder / entry.name, entry.sha256, entry.vocab_size, entry.unk_id, entry.bos_id, entry.eos_id, entry.pad_id
        )
        # The view skips np.memmap's own indexing, which takes longer than reading a short document.
        self._index = index.view(np.ndarray)
        self._dtype = DTYPES[manifest.dtype]
        self._files = OpenFiles([str(folder / shard.name) for shard in manifest.shards])

    @classmethod
    def open(cls, folder: str | Path, verify: Verify = "sizes", share: int = 0, shares: int = 1) -> "ShardSet":
        """Opens `folder` and checks it.

        Always checked: the manifest against its fingerprint; the index, token_bytes and tokenizer against their sha256;
        presence and bytes of each shard; the index against the manifest. With verify="hashes", each shard's sha256 too:
        of every `shares`-th shard from the `share`-th on, so that processes can divide the reading.
        Raises UserError naming the file, what was expected and what was found.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        for entry in (manifest.index, manifest.token_bytes, manifest.tokenizer):
            check_file(folder, entry, hashes=True)
        for number, shard in enumerate(manifest.shards):
            check_file(folder, shard, hashes=verify == "hashes" and number % shares == share)
        index = np.load(folder / manifest.index.name, mmap_mode="r", allow_pickle=False)
        _check_index(folder, manifest, index)
        token_bytes = np.load(folder / manifest.token_bytes.name, allow_pickle=False).astype(np.int64)
        if token_bytes.shape != (manifest.tokenizer.vocab_size,):
            raise UserError(f"{folder / manifest.token_bytes.name}: shape {token_bytes.shape}, not one number a token")
        return cls(folder, manifest, index, token_bytes)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.manifest.documents

    @property
    def tokens(self) -> int:
        """Number of tokens, EOS included."""
        return self.manifest.tokens

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.manifest.text_bytes

    def record(self, document: int) -> Record:
        """The index's entry of a document; raises IndexError for a number outside the set."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        return Record(*self._index[document].item())

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop (exclusive; None: the end) of a document, as uint16 or uint32 [stop - start].

        Raises IndexError for a range outside the document, UserError for a shard that is gone, cut, or holds ids
        outside the vocabulary.
        """
        record = self.record(document)
        stop = record.tokens if stop is None else stop
        if not 0 <= start <= stop <= record.tokens:
            raise IndexError(f"tokens {start}..{stop} of document {document}, which has {record.tokens}")
        width = self._dtype.itemsize
        data = self._pread(record.shard, (stop - start) * width, record.offset + start * width)
        tokens = np.frombuffer(data, self._dtype)
        # An id out of range would surface as a device-side assertion of the embedding, far from its cause.
        if tokens.size and int(tokens.max()) >= self.tokenizer.vocab_size:
            path = self.folder / self.manifest.shards[record.shard].name
            raise UserError(
                f"{path}: damaged: document {document} holds token {int(tokens.max())}, the vocabulary has "
                f"{self.tokenizer.vocab_size}; find all damage with `python -m tools.shards verify {self.folder}`"
            )
        return tokens

    def close(self) -> None:
        """Closes the open files; reading again opens them again."""
        self._files.close()

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            data = self._files.read(number, size, offset)
        except OSError as error:
            path = self.folder / self.manifest.shards[number].name
            raise UserError(f"{path}: cannot be read: {error.strerror}; restore the shard and resume") from error
        if len(data) < size:
            shard = self.manifest.shards[number]
            raise UserError(
                f"{self.folder / shard.name}: was cut while in use: {size} bytes expected at offset {offset}, found "
                f"{len(data)}; the whole file should have {shard.bytes}; restore the shard and resume"
            )
        return data


def check_file(folder: Path, entry: FileEntry, *, hashes: bool) -> None:
    """Checks presence and bytes of a file of a set, and its sha256 if asked; raises UserError naming what differs."""
    path = folder / entry.name
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing ({error.strerror}): expected {entry.bytes} bytes; restore the file") from None
    if found != entry.bytes:
        raise UserError(f"{path}: damaged: expected {entry.bytes} bytes, found {found}; restore the file")
    if not hashes:
        return
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore the file") from error
    if digest != entry.sha256:
        raise UserError(f"{path}: damaged: expected sha256 {entry.sha256}, found {digest}; restore the file")


def _check_index(folder: Path, manifest: Manifest, index: np.ndarray) -> None:
    path = folder / manifest.index.name
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.documents,):
        raise UserError(f"{path}: {index.dtype} {index.shape}, expected {manifest.documents} records of {INDEX_DTYPE}")
    numbers = np.arange(len(manifest.shards))
    first = np.searchsorted(index["shard"], numbers)
    last = np.searchsorted(index["shard"], numbers, side="right")
    total = np.concatenate([[0], np.cumsum(index["tokens"])])
    for number, shard in enumerate(manifest.shards):
        documents, tokens = int(last[number] - first[number]), int(total[last[number]] - total[first[number]])
        if (documents, tokens) != (shard.documents, shard.tokens):
            raise UserError(
                f"{path}: shard {shard.name} has {documents} documents and {tokens} tokens in the index, "
                f"{shard.documents} and {shard.tokens} in the manifest; build the shards again"
            )
    if int(total[-1]) != manifest.tokens or int(index["text_bytes"].sum()) != manifest.text_bytes:
        raise UserError(f"{path}: totals differ from those of the manifest; build the shards again")
