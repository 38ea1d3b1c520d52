"""One folder of tokenised shards, opened and checked: documents by number, tokens by position."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pretrain.data.damage import Damage, DamagedShard
from pretrain.data.files import OpenFiles
from pretrain.data.format import DTYPES, INDEX_DTYPE, MANIFEST_NAME, FileEntry, Manifest, no_manifest
from pretrain.data.stores import DamagedError, LocalStore, NoRoomError, Store, StoreConfig, open_store
from pretrain.data.stores.errors import DAMAGE
from pretrain.durable import file_sha256
from pretrain.errors import UserError

Verify = Literal["sizes", "hashes"]
OnDamage = Literal["stop", "skip"]
REQUESTS_AT_A_TIME = 16
_COPIED_DOCUMENTS = 10_000_000

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
        # A copy is faster to read from; of a large index it would take more memory than it is worth.
        lengths = index["tokens"].view(np.ndarray)
        if len(lengths) <= _COPIED_DOCUMENTS:
            lengths = lengths.astype(np.int32 if int(lengths.max()) < 2**30 else np.int64)
        self.document_tokens: np.ndarray = lengths
        """int32 or int64 [documents]: tokens of each document in stored order, EOS included."""
        self.shard_documents = np.cumsum([0, *(shard.documents for shard in manifest.shards)])
        """int64 [shards + 1]: the first document of each shard, and behind the last."""
        self.shard_tokens = np.array([shard.tokens for shard in manifest.shards])
        """int64 [shards]: tokens of each shard."""
        self.skipped: dict[int, str] = {}
        """Shards by number whose documents are left out, and what was found of each."""
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
        on_damage: OnDamage = "stop",
    ) -> "ShardSet":
        """Opens the set at a folder or URL (`config`: how URLs are read) and checks it.

        Always checked: the manifest against its fingerprint; the index, token_bytes and tokenizer against their sha256;
        presence and bytes of each shard; the index against the manifest. With verify="hashes", each shard's sha256 too:
        of every `shares`-th shard from the `share`-th on, so that processes can divide the reading. Of remote shards
        those of the share alone are asked for, and hashes are checked when a shard is fetched. With on_damage="skip",
        shards that differ are put among the skipped ones. Nothing is remembered of an earlier open: a process that has
        no share (0 of 1) asks for every remote shard, and hashes the index, each time that it opens a set.
        `read_through`: whether a remote shard that is read by byte ranges is hashed before; None: with verify="hashes".
        Raises UserError naming the file, what was expected and what was found.
        """
        store = open_store(location, config, hashes=verify == "hashes" if read_through is None else read_through)
        try:
            manifest = read_manifest(store)
            paths = [store.keep(entry) for entry in (manifest.index, manifest.token_bytes, manifest.tokenizer)]
            skipped = _check_shards(store, manifest, verify, share, shares, on_damage)
            index = np.load(paths[0], mmap_mode="r", allow_pickle=False)
            _check_index(store, manifest, index)
            token_bytes = np.load(paths[1], allow_pickle=False).astype(np.int64)
            if token_bytes.shape != (manifest.tokenizer.vocab_size,):
                where = store.locate(manifest.token_bytes.name)
                raise UserError(f"{where}: shape {token_bytes.shape}, not one number a token")
        except BaseException:
            store.close()
            raise
        shards = cls(store, manifest, index, token_bytes, paths[2])
        shards.skipped.update(skipped)
        return shards

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
        if tokens.size and int(tokens.max()) >= self.tokenizer.vocab_size:
            raise self._outside_vocabulary(record.shard, document, int(tokens.max()))
        return tokens

    def gather(
        self, documents: np.ndarray, firsts: np.ndarray, counts: np.ndarray, places: np.ndarray, size: int, fill: int
    ) -> np.ndarray:
        """Pieces of documents in one array, uint16 or uint32 [size]: of document documents[i] the tokens firsts[i] and
        on, counts[i] of them, at places[i] and on; `fill` where there is no piece. All int64 [pieces].

        Raises DamagedShard for a shard that is gone, cut, or holds ids outside the vocabulary, and UserError for one
        that cannot be read.
        """
        covered = int(counts.sum()) == size
        out = np.empty(size, self._dtype) if covered else np.full(size, fill, self._dtype)
        if not len(documents):
            return out
        width = self._dtype.itemsize
        records = self._index[documents]
        order = np.argsort(records["shard"], kind="stable")
        shards = records["shard"][order]
        ranges = np.stack([records["offset"] + firsts * width, places * width, counts * width], 1)[order]
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
        view = memoryview(out.view(np.uint8))
        for start, stop in pairwise(edges):
            self._read_into(int(shards[start]), ranges[start:stop].tolist(), view)
        # An id out of range would surface as a device-side assertion of the embedding, far from its cause.
        if int(out.max()) >= self.tokenizer.vocab_size:
            found = int(np.argmax(out))
            piece = int(np.flatnonzero((places <= found) & (found < places + counts))[0])
            raise self._outside_vocabulary(int(records["shard"][piece]), int(documents[piece]), int(out[found]))
        return out

    @property
    def damage(self) -> list[Damage]:
        """The shards that are left out."""
        return [Damage(str(self.folder), number, found) for number, found in self.skipped.items()]

    def is_skipped(self, documents: np.ndarray) -> np.ndarray | None:
        """bool [n]: which of the documents are left out; None where none of the set is."""
        if not self.skipped:
            return None
        return np.isin(np.searchsorted(self.shard_documents, documents, side="right") - 1, list(self.skipped))

    def limit_open_files(self, *, of: int) -> None:
        """Keeps fewer files open, as one of so many sets that a process reads from at a time."""
        self._files.limit = max(1, self.store.max_open_files // of)

    def close(self) -> None:
        """Closes the open files; reading again opens them again. What a cache keeps of a remote set may go then."""
        self._files.close()
        self.store.close()

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            data = self._files.read(number, size, offset)
        except NoRoomError as error:
            return self._read_range(number, offset, size, error)
        except OSError as error:
            raise self._unreadable(number, error) from error
        except DamagedError as error:
            raise self._damaged(number, "", error) from error
        if len(data) < size:
            raise self._damaged(
                number, f"was cut while in use: {size} bytes expected at offset {offset}, found {len(data)}"
            )
        return data

    def _read_into(self, number: int, ranges: list[list[int]], out: memoryview) -> None:
        """Reads ranges of (offset in the shard, start in `out`, size)."""
        try:
            cut = self._files.read_into(number, ranges, out)
        except NoRoomError as error:
            for offset, start, size in ranges:
                out[start : start + size] = self._read_range(number, offset, size, error)
            return
        except OSError as error:
            raise self._unreadable(number, error) from error
        except DamagedError as error:
            raise self._damaged(number, "", error) from error
        if cut is not None:
            raise self._damaged(number, f"was cut while in use: it ends in what was read at offset {cut}")

    def _read_range(self, number: int, offset: int, size: int, why: NoRoomError) -> bytes:
        """A piece of a remote shard that the cache has no room for."""
        if not self._told_no_room:
            self._told_no_room = True
            log.warning("%s: read by byte ranges, since it cannot be kept: %s", self.folder, why)
        try:
            return self.store.read_range(self.manifest.shards[number], offset, size)
        except DamagedError as error:
            raise self._damaged(number, "", error) from error

    def _unreadable(self, number: int, error: OSError) -> UserError:
        """The error for a shard that cannot be read: its own where it is gone or its disk is broken, not where only
        this process cannot read it.
        """
        if error.errno in DAMAGE:
            return self._damaged(number, f"cannot be read: {error.strerror}")
        path = self.store.locate(self.manifest.shards[number].name)
        return UserError(f"{path}: cannot be read: {error.strerror}; mend that and resume")

    def _outside_vocabulary(self, number: int, document: int, token: int) -> DamagedShard:
        return self._damaged(
            number,
            f"damaged: document {document} holds token {token}, the vocabulary has {self.tokenizer.vocab_size}; find "
            f"all damage with `python -m tools.shards verify {self.folder}`",
        )

    def _damaged(self, number: int, what: str, error: DamagedError | None = None) -> DamagedShard:
        """The error for a shard of which `what` is known, or which its store found damaged, `error`."""
        shard = self.manifest.shards[number]
        if error is None:
            found = found_of(self.store, shard)
            expected = f"{shard.bytes} bytes of sha256 {shard.sha256}"
            what = f"{self.store.locate(shard.name)}: {what}; expected {expected}, found {found}; restore the shard"
        else:
            what, found = str(error), error.found
        message = f"{what} and resume, or have it skipped by --data.on_damage skip"
        return DamagedShard(message, Damage(str(self.folder), number, found))


def found_of(store: Store, entry: FileEntry) -> str:
    """What a local file is in place of what was expected: its sha256 and size, or why it has none."""
    if not isinstance(store, LocalStore):
        return "bytes outside the vocabulary"
    path = store.folder / entry.name
    try:
        return f"{path.stat().st_size} bytes of sha256 {file_sha256(path)}"
    except OSError as error:
        return f"none ({error.strerror})"


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


def _check_shards(
    store: Store, manifest: Manifest, verify: Verify, share: int, shares: int, on_damage: OnDamage
) -> dict[int, str]:
    """Presence and bytes of every shard, of remote ones of the share; hashes of the share if asked. Returns those that
    are damaged by number, with what was found, where they are to be skipped.
    """

    def check(number: int) -> str | None:
        try:
            store.check(manifest.shards[number], hashes=verify == "hashes" and number % shares == share)
        except DamagedError as error:
            if on_damage == "stop":
                raise
            return found_of(store, manifest.shards[number]) if isinstance(store, LocalStore) else error.found
        return None

    numbers = range(len(manifest.shards))
    if isinstance(store, LocalStore):
        found = dict(zip(numbers, map(check, numbers), strict=True))
    else:
        own = numbers[share::shares]
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            found = dict(zip(own, pool.map(check, own), strict=True))
    return {number: what for number, what in found.items() if what is not None}


def _check_index(store: Store, manifest: Manifest, index: np.ndarray) -> None:
    path = store.locate(manifest.index.name)
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.documents,):
        raise UserError(f"{path}: {index.dtype} {index.shape}, expected {manifest.documents} records of {INDEX_DTYPE}")
    total = text_bytes = first = 0
    # Shard by shard, as a whole column may not fit into memory.
    for number, shard in enumerate(manifest.shards):
        records = index[first : first + shard.documents].view(np.ndarray)
        first += shard.documents
        documents, tokens = int((records["shard"] == number).sum()), int(records["tokens"].sum())
        total, text_bytes = total + tokens, text_bytes + int(records["text_bytes"].sum())
        if (documents, tokens) != (shard.documents, shard.tokens):
            raise UserError(
                f"{path}: shard {shard.name} has {documents} documents and {tokens} tokens in the index, "
                f"{shard.documents} and {shard.tokens} in the manifest; build the shards again"
            )
    if total != manifest.tokens or text_bytes != manifest.text_bytes:
        raise UserError(f"{path}: totals differ from those of the manifest; build the shards again")
