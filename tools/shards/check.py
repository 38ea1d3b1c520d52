"""Checks and describes finished shard sets."""

import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.format import MANIFEST_NAME, TOKENS_SUFFIX, Manifest
from pretrain.data.shards import ShardSet, read_manifest
from pretrain.data.stores import LocalStore
from pretrain.errors import UserError


def verify_set(folder: Path) -> list[str]:
    """Everything that is wrong with a set, a line each; empty when it is whole.

    Reads all of it: sizes and sha256 of each file, each tar's members against the index, token ids against the
    vocabulary, EOS at each document's end.
    """
    store = LocalStore(folder)
    try:
        manifest = read_manifest(store)
    except UserError as error:
        return [str(error)]
    problems = []
    for entry in (manifest.index, manifest.token_bytes, manifest.tokenizer, *manifest.shards):
        try:
            store.check(entry, hashes=True)
        except UserError as error:
            problems.append(str(error))
    if problems:
        return problems
    try:
        shards = ShardSet.open(folder)
        _check_documents(shards)
    except UserError as error:
        problems.append(str(error))
    else:
        problems += [f"{path}: does not belong to the set" for path in _foreign_files(folder, manifest)]
        shards.close()
    return problems


def _check_documents(shards: ShardSet) -> None:
    """Raises UserError for the first document whose tar member, tokens and index entry do not fit each other."""
    document = 0
    for shard in shards.manifest.shards:
        with open(shards.folder / shard.name, "rb") as file:
            for _ in range(shard.documents):
                _check_document(shards, document, file)
                document += 1


def _check_document(shards: ShardSet, document: int, file: BinaryIO) -> None:
    tokens = shards.read(document)
    if tokens[-1] != shards.tokenizer.eos_id:
        raise UserError(f"{file.name}: document {document} does not end with EOS")
    file.seek(shards.record(document).offset - tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise UserError(f"{file.name}: no tar header before document {document}: {error}") from None
    if header.size != tokens.nbytes or not header.name.endswith(TOKENS_SUFFIX):
        raise UserError(
            f"{file.name}: document {document}: the tar's member {header.name!r} has {header.size} bytes, "
            f"the index {tokens.nbytes}"
        )


def _foreign_files(folder: Path, manifest: Manifest) -> list[Path]:
    entries = (manifest.index, manifest.token_bytes, manifest.tokenizer, *manifest.shards)
    known = {MANIFEST_NAME, *(entry.name for entry in entries)}
    return sorted(path for path in folder.iterdir() if path.name not in known)


def describe_set(folder: Path) -> dict[str, object]:
    """The numbers of a set by name, for people and as JSON."""
    shards = ShardSet.open(folder)
    manifest = shards.manifest
    lengths = shards.document_tokens
    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100], method="lower")
    return {
        "folder": str(folder),
        "part": manifest.split.part,
        "documents": shards.documents,
        "tokens": shards.tokens,
        "text_bytes": shards.text_bytes,
        "bytes_per_token": shards.text_bytes / shards.tokens,
        "shards": len(manifest.shards),
        "shard_bytes": sum(shard.bytes for shard in manifest.shards),
        "dtype": manifest.dtype,
        "mean_document_tokens": float(lengths.mean()),
        "document_tokens_quantiles": dict(zip(("min", "50%", "90%", "99%", "max"), map(int, quantiles), strict=True)),
        "vocab_size": shards.tokenizer.vocab_size,
        "tokenizer_sha256": shards.tokenizer.sha256,
        "fingerprint": shards.fingerprint,
    }
