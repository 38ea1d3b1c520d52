"""One folder of tokenised shards, opened and checked: documents by number, tokens by position."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.files import OpenFiles
from pretrain.data.format import DTYPES, INDEX_DTYPE, MANIFEST_NAME, Manifest, no_manifest
from pretrain.data.stores import LocalStore, NoRoomError, Store, StoreConfig, open_store
from pretrain.errors import UserError

Verify = Literal["sizes", "hashes"]
REQUESTS_AT_A_TIME = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made a shard set; `path` is the copy beside the shards, or of a remote set the one that the
    cache keeps while the set is open."""

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

    def __init__(
        self, store: Store, manifest: Manifest, index: np.ndarray, token_bytes: np.ndarray, tokenizer: Path
    ) -> None:
        self.store = store
        """Where the shards lie."""
        self.folder: Path | str = store.folder if isinstance(store, LocalStore) else store.place
        """The set's folder; of a remote one its URL, as text."""
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.document_tokens: np.ndarray = index["tokens"].astype(np.int64)
        """int64 [documents]: tokens of each document in stored order, EOS included."""
        self.token_bytes = token_bytes
        """int64 [vocab_size]: UTF-8 bytes of text that each token stands for."""
        entry = manifest.tokenizer
        self.tokenizer = TokenizerInfo(
            tokenizer, entry.sha256, entry.vocab_size, entry.unk_id, entry.bos_id, entry.eos_id, entry.pad_id
        )
        # The view skips np.memmap's own indexing, which takes longer than reading a short document.
        self._index = index.view(np.ndarray)
        self._dtype = DTYPES[manifest.dtype]
        self._files = OpenFiles(lambda number: store.open_file(manifest.shards[number]), store.max_open_files)
        self._told_no_room = False

    @classmethod
    def open(
        cls,
        location: str | Path,
        verify: Verify = "sizes",
        share: int = 0,
        shares: int = 1,
        config: StoreConfig | None = None,
        read_through: bool | None = None,
    ) -> "ShardSet":
        """Opens the set at a folder or URL (`config`: how URLs are read) and checks it.

        Always checked: the manifest against its fingerprint; the index, token_bytes and tokenizer against their sha256;
        presence and bytes of each shard; the index against the manifest. With verify="hashes", each shard's sha256 too:
        of every `shares`-th shard from the `share`-th on, so that processes can divide the reading. Of remote shards
        those of the share alone are asked for, and hashes are checked when a shard is fetched.
        `read_through`: whether a remote shard that is read by byte ranges is hashed before; None: with verify="hashes".
        Raises UserError naming the file, what was expected and what was found.
        """
        store = open_store(location, config, hashes=verify == "hashes" if read_through is None else read_through)
        try:
            manifest = read_manifest(store)
            paths = [store.keep(entry) for entry in (manifest.index, manifest.token_bytes, manifest.tokenizer)]
            _check_shards(store, manifest, verify, share, shares)
            index = np.load(paths[0], mmap_mode="r", allow_pickle=False)
            _check_index(store, manifest, index)
            token_bytes = np.load(paths[1], allow_pickle=False).astype(np.int64)
            if token_bytes.shape != (manifest.tokenizer.vocab_size,):
                where = store.locate(manifest.token_bytes.name)
                raise UserError(f"{where}: shape {token_bytes.shape}, not one number a token")
        except BaseException:
            store.close()
            raise
        return cls(store, manifest, index, token_bytes, paths[2])

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
            path = self.store.locate(self.manifest.shards[record.shard].name)
            raise UserError(
                f"{path}: damaged: document {document} holds token {int(tokens.max())}, the vocabulary has "
                f"{self.tokenizer.vocab_size}; find all damage with `python -m tools.shards verify {self.folder}`"
            )
        return tokens

    def close(self) -> None:
        """Closes the open files; reading again opens them again. What a cache keeps of a remote set may go then."""
        self._files.close()
        self.store.close()

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        shard = self.manifest.shards[number]
        path = self.store.locate(shard.name)
        try:
            data = self._files.read(number, size, offset)
        except NoRoomError as error:
            if not self._told_no_room:
                self._told_no_room = True
                log.warning("%s: read by byte ranges, since it cannot be kept: %s", self.folder, error)
            return self.store.read_range(shard, offset, size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; restore the shard and resume") from error
        if len(data) < size:
            raise UserError(
                f"{path}: was cut while in use: {size} bytes expected at offset {offset}, found {len(data)}; the whole "
                f"file should have {shard.bytes}; restore the shard and resume"
            )
        return data


def read_manifest(store: Store) -> Manifest:
    """The manifest of the set in a store; raises UserError when it is missing, damaged or was changed."""
    path = store.locate(MANIFEST_NAME)
    try:
        data = store.read(MANIFEST_NAME)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); build the shards again") from None
    if data is not None:
        return Manifest.parse(data, path)
    if isinstance(store, LocalStore):
        raise UserError(no_manifest(store.folder))
    raise UserError(f"{path}: no such file; give the URL of a shard set, the folder that holds its {MANIFEST_NAME}")


def _check_shards(store: Store, manifest: Manifest, verify: Verify, share: int, shares: int) -> None:
    """Presence and bytes of every shard, of remote ones of the share; hashes of the share if asked."""
    own = manifest.shards[share::shares]
    if isinstance(store, LocalStore):
        for number, shard in enumerate(manifest.shards):
            store.check(shard, hashes=verify == "hashes" and number % shares == share)
        return
    with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
        for _ in pool.map(lambda shard: store.check(shard, hashes=verify == "hashes"), own):
            pass


def _check_index(store: Store, manifest: Manifest, index: np.ndarray) -> None:
    path = store.locate(manifest.index.name)
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
