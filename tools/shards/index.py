"""Makes index and manifest for tars of tokens that others wrote, such as webdataset's TarWriter; the tars stay as they
are.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.format import (
    DTYPES,
    EOS_SEPARATOR,
    INDEX_DTYPE,
    MANIFEST_NAME,
    NO_SEPARATOR,
    TOKENS_SUFFIX,
    Manifest,
    ShardEntry,
    SplitEntry,
    token_dtype,
)
from pretrain.durable import file_sha256
from pretrain.errors import UserError
from tools.command import Progress, count, writing
from tools.encoding import Tokenizer
from tools.shards.build import open_with_eos
from tools.shards.tars import Member, list_members
from tools.shards.writer import write_beside

NPY_SUFFIX = ".npy"
RAW_SUFFIXES = {".u16": "uint16", ".u32": "uint32"}
KNOWN_SUFFIXES = (TOKENS_SUFFIX, NPY_SUFFIX, *RAW_SUFFIXES)
# More than numpy's header of a one-dimensional array ever takes.
NPY_HEADER_BYTES = 4096


@dataclass(frozen=True)
class _Documents:
    """Which members are documents, and how their tokens are stored."""

    suffix: str
    dtype: str | None
    """One of DTYPES for raw numbers, None for .npy, whose header says it."""


def index_tars(
    folder: Path,
    tokenizer_path: Path,
    *,
    suffix: str | None = None,
    dtype: str | None = None,
    part: str = "train",
    overwrite: bool = False,
) -> Manifest:
    """Makes a shard set of all *.tar in `folder`, in the order of their names, each member of `suffix` a document.

    Args:
        suffix: of the members that hold tokens; None: the one of KNOWN_SUFFIXES that is there.
        dtype: of raw numbers, where the suffix does not say it.
        part: which part of some text the tars hold, for the manifest.

    Raises UserError for tars that are cut or damaged, hold no documents, tokens outside the vocabulary, or arrays that
    are not one-dimensional little-endian integers of one size.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: holds no *.tar; give the folder of the tars")
    if (folder / MANIFEST_NAME).exists() and not overwrite:
        raise UserError(f"{folder}: has a {MANIFEST_NAME}: replace its index with --overwrite")
    tokenizer = open_with_eos(tokenizer_path)
    members = {path: list_members(path) for path in paths}
    documents = _chosen(members, suffix, dtype, tokenizer)
    reader = _Reader(tokenizer, documents)
    progress = Progress(sum(path.stat().st_size for path in paths))
    rows, shards, done = [], [], 0
    try:
        for number, path in enumerate(paths):
            found = reader.read(path, members[path], number)
            rows.append(found)
            size = path.stat().st_size
            shards.append(
                ShardEntry(
                    name=path.name,
                    sha256=file_sha256(path),
                    bytes=size,
                    documents=len(found),
                    tokens=int(found["tokens"].sum()),
                )
            )
            done += size
            progress.update(done, f"{count(sum(shard.tokens for shard in shards))} tokens")
    finally:
        progress.close()
    with writing(folder):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        return write_beside(
            folder,
            tokenizer,
            np.concatenate(rows),
            tuple(shards),
            dtype=reader.dtype,
            split=SplitEntry(part=part, validation_fraction=0.0),
            separator=EOS_SEPARATOR if reader.all_end_with_eos else NO_SEPARATOR,
        )


def _chosen(
    members: dict[Path, list[Member]], suffix: str | None, dtype: str | None, tokenizer: Tokenizer
) -> _Documents:
    present = sorted({member.suffix for found in members.values() for member in found})
    if suffix is None:
        known = [name for name in present if name in KNOWN_SUFFIXES]
        if len(known) != 1:
            raise UserError(
                f"{next(iter(members)).parent}: members end in {', '.join(present) or 'nothing'}: say with --suffix "
                "which hold the tokens"
            )
        suffix = known[0]
    elif suffix not in present:
        raise UserError(f"--suffix {suffix}: no member ends in it; there are {', '.join(present) or 'none'}")
    if suffix.endswith(NPY_SUFFIX):
        if dtype is not None:
            raise UserError(f"--dtype {dtype}: {NPY_SUFFIX} says its own; leave it out")
        return _Documents(suffix, None)
    own = {TOKENS_SUFFIX: token_dtype(tokenizer.vocab_size), **RAW_SUFFIXES}.get(suffix)
    if dtype is None and own is None:
        raise UserError(f"--suffix {suffix}: say with --dtype what its numbers are: {', '.join(DTYPES)}")
    return _Documents(suffix, dtype or own)


class _Reader:
    """Reads the documents of one tar after the other, and checks them."""

    def __init__(self, tokenizer: Tokenizer, documents: _Documents) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = tokenizer.token_bytes().astype(np.int64)
        self._documents = documents
        self._dtype = documents.dtype
        self.all_end_with_eos = True

    @property
    def dtype(self) -> str:
        """One of DTYPES: how the tokens of all documents are stored."""
        assert self._dtype is not None, "a tar without documents is refused"
        return self._dtype

    def read(self, path: Path, members: Sequence[Member], shard: int) -> np.ndarray:
        """The index of a tar's documents, INDEX_DTYPE [documents]."""
        rows = []
        with open(path, "rb") as file:
            for member in members:
                if member.suffix == self._documents.suffix:
                    offset, tokens = self._tokens(file, member, f"{path}: member {member.name}")
                    rows.append((shard, offset, len(tokens), int(self._token_bytes[tokens].sum())))
                    self.all_end_with_eos &= int(tokens[-1]) == self._tokenizer.eos_id
        if not rows:
            raise UserError(f"{path}: holds no member that ends in {self._documents.suffix}; take it out of the folder")
        return np.array(rows, INDEX_DTYPE)

    def _tokens(self, file: BinaryIO, member: Member, where: str) -> tuple[int, np.ndarray]:
        """Where the tokens of a member begin in the tar, and the tokens."""
        header = 0
        if self._documents.dtype is None:
            file.seek(member.offset)
            dtype, length, header = _npy_header(file.read(min(member.bytes, NPY_HEADER_BYTES)), where)
            self._require_dtype(dtype, where)
            if member.bytes != header + length * dtype.itemsize:
                raise UserError(f"{where}: expected {length} numbers of {dtype}, found {member.bytes - header} bytes")
        stored = DTYPES[self.dtype]
        size = member.bytes - header
        if not size or size % stored.itemsize:
            raise UserError(f"{where}: {size} bytes are no whole number of tokens, or none, in {self.dtype}")
        file.seek(member.offset + header)
        tokens = np.frombuffer(file.read(size), stored)
        if int(tokens.max()) >= self._tokenizer.vocab_size:
            raise UserError(
                f"{where}: holds token {int(tokens.max())}, the vocabulary of {self._tokenizer.path} has "
                f"{self._tokenizer.vocab_size}; give the tokenizer that made the tokens, or another --dtype"
            )
        return member.offset + header, tokens

    def _require_dtype(self, dtype: np.dtype, where: str) -> None:
        """All documents are stored alike; signed numbers are read as unsigned ones."""
        name = f"uint{8 * dtype.itemsize}"
        bits = 8 * dtype.itemsize - (dtype.kind == "i")
        if dtype.kind not in "iu" or dtype.byteorder == ">" or name not in DTYPES:
            raise UserError(f"{where}: is of {dtype}; tokens must be little-endian integers of 2, 4 or 8 bytes")
        if self._tokenizer.vocab_size > 1 << bits:
            raise UserError(f"{where}: {dtype} does not hold a vocabulary of {self._tokenizer.vocab_size}")
        if self._dtype is None:
            self._dtype = name
        if name != self._dtype:
            raise UserError(f"{where}: is of {dtype}, others before of {self._dtype}; all must be of one size")


def _npy_header(data: bytes, where: str) -> tuple[np.dtype, int, int]:
    """dtype, length, and bytes of the header of a one-dimensional array; its content is not looked at."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise UserError(f"{where}: is no .npy array: {error}") from None
    if len(shape) != 1:
        raise UserError(f"{where}: has shape {shape}; a document is a one-dimensional array of tokens")
    return dtype, shape[0], file.tell()
