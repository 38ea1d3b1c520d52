"""The format of a shard folder.

    manifest.json          what is here: see `Manifest`; written last, so a folder without it was never finished
    shards-000000.tar ...  WebDataset tars (ustar, mtime 0), a member `KEY.tokens` for each document: its token
                           ids as raw little-endian uint16 (a vocabulary of at most 65,536) or uint32, EOS the last
    index.npy              a record for each document, in stored order: see `INDEX_DTYPE`
    token_bytes.npy        uint16 [vocab_size]: the UTF-8 bytes that each token stands for (0 for EOS and its like),
                           so that bits per byte can be computed over any set of tokens
    tokenizer.model        the SentencePiece model that made the tokens

Everything is a function of the documents, the tokenizer and the options: a second build gives the same bytes. No file
is ever unpickled.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from pretrain.errors import UserError

FORMAT = "mnemosyne-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
TOKEN_BYTES_NAME = "token_bytes.npy"
TOKENIZER_NAME = "tokenizer.model"
TOKENS_SUFFIX = ".tokens"
PARTS = ("train", "validation")
EOS_SEPARATOR = "eos-after-document"
NO_SEPARATOR = "none"

# shard: position in Manifest.shards; offset: of the first token, in bytes from the tar's start; text_bytes: UTF-8.
INDEX_DTYPE = np.dtype([("shard", "<i8"), ("offset", "<i8"), ("tokens", "<i8"), ("text_bytes", "<i8")])

# Signed numbers in the tars of others are read as unsigned ones: a negative one is then outside every vocabulary.
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8")}


def _in_its_folder(name: str) -> str:
    # What is read is also written into caches and removed from them: no name may lead out of the folder.
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the manifest's folder")
    return name


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileEntry(_Entry):
    """A file beside the shards."""

    name: Annotated[str, AfterValidator(_in_its_folder)]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: NonNegativeInt


class ShardEntry(FileEntry):
    """One tar."""

    documents: PositiveInt
    tokens: PositiveInt


class TokenizerEntry(FileEntry):
    """The tokenizer's file and its numbers; an id that the tokenizer lacks is null."""

    vocab_size: PositiveInt
    unk_id: NonNegativeInt | None
    bos_id: NonNegativeInt | None
    eos_id: NonNegativeInt
    pad_id: NonNegativeInt | None


class SplitEntry(_Entry):
    """Which part of the input this set holds: a document belongs to validation when the first 8 bytes of the sha256 of
    its text, as a fraction of 2^64, are below `validation_fraction`."""

    part: Literal["train", "validation"]
    validation_fraction: float


class Manifest(_Entry):
    """The contents of manifest.json."""

    format: Literal["mnemosyne-shards"] = FORMAT
    version: Literal[1] = VERSION
    dtype: Literal["uint16", "uint32", "uint64"]
    tokenizer: TokenizerEntry
    encoding: Literal["whole-document"] = "whole-document"
    """How text became tokens. `whole-document`: the tokens are those of the document encoded in one call."""
    separator: Literal["eos-after-document", "none"] = EOS_SEPARATOR
    """What stands between documents: every document ends with EOS, and nothing stands before it; `none`: nothing, in
    tars of others."""
    split: SplitEntry
    documents: PositiveInt
    tokens: PositiveInt
    """All tokens, EOS included."""
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the documents' text."""
    index: FileEntry
    token_bytes: FileEntry
    shards: tuple[ShardEntry, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest's content, which holds the sha256 of every file: the identity of the data."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json: the content and its fingerprint."""
        return json.dumps({**self.model_dump(), "fingerprint": self.fingerprint}, indent=1) + "\n"

    @classmethod
    def parse(cls, data: bytes, path: str) -> "Manifest":
        """The manifest in the bytes of a manifest.json, which messages call `path`. Raises UserError for one that is
        damaged or was changed.
        """
        try:
            content = json.loads(data)
        except ValueError as error:
            page = ", it is an HTML page" if data.lstrip()[:1] == b"<" else ""
            raise UserError(
                f"{path}: cannot be read as JSON ({error}){page}; restore it, or build the shards again"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(
                f"{path}: is not a manifest of tokenised shards; give a folder made by `tools.shards build`"
            )
        if content.get("version") != VERSION:
            raise UserError(
                f"{path}: format version {content.get('version')}, this program reads {VERSION}; build again"
            )
        recorded = content.pop("fingerprint", None)
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: field {field}: {first['msg']}; build the shards again") from None
        if recorded != manifest.fingerprint:
            raise UserError(
                f"{path}: was changed after it was written: fingerprint {recorded}, its content has "
                f"{manifest.fingerprint}; restore the file or build the shards again"
            )
        return manifest


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest of the two dtypes that holds every id of a vocabulary of `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def find_sets(folder: Path) -> list[Path]:
    """The shard sets at `folder`: itself, or its folders train and validation; raises UserError when there is none.

    A part that has lost its manifest is among them, so that opening it tells.
    """
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    parts = [folder / part for part in PARTS if (folder / part).is_dir()]
    if not any((part / MANIFEST_NAME).is_file() for part in parts):
        raise UserError(no_manifest(folder))
    return parts


def no_manifest(folder: Path) -> str:
    """Why a folder is no shard set, and what to give instead."""
    if not folder.is_dir():
        return f"{folder}: no such folder; build it with `python -m tools.shards build --output ...`"
    parts = [part for part in PARTS if (folder / part / MANIFEST_NAME).is_file()]
    if parts:
        return f"{folder}: holds no {MANIFEST_NAME} itself; give one of its shard sets: " + ", ".join(
            str(folder / part) for part in parts
        )
    return f"{folder}: holds no {MANIFEST_NAME}: not a shard set, or a build that was never finished"
