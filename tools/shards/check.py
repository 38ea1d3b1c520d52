"""Checks and describes finished shard sets."""

from pathlib import Path

import numpy as np

from pretrain.data.format import EOS_SEPARATOR, MANIFEST_NAME, PARTS, Manifest, find_sets
from pretrain.data.shards import ShardSet, read_manifest
from pretrain.data.stores import LocalStore, open_store
from pretrain.errors import UserError
from tools.shards.tars import Member, list_members


def sets_at(location: Path | str) -> list[Path | str]:
    """The shard sets at a folder or URL: itself, or its train and validation. Raises UserError where there is none."""
    if isinstance(location, Path):
        return list(find_sets(location))
    urls = [location, *(f"{location}/{part}" for part in PARTS)]
    found = [url for url in urls if open_store(url).read(MANIFEST_NAME) is not None]
    if not found:
        raise UserError(f"{location}: holds no {MANIFEST_NAME}, nor do {' and '.join(PARTS)} in it")
    return found[:1] if found[0] == location else found


def verify_set(location: Path | str) -> list[str]:
    """Everything that is wrong with a set, a line each; empty when it is whole.

    Reads all of it, past any cache: sizes and sha256 of each file, token ids against the vocabulary; of a set in a
    folder also each tar's members against the index, and EOS at each document's end. At a URL there are no members to
    look at, but with their hashes the tars are what they were when that was checked.
    """
    store = open_store(location)
    try:
        manifest = read_manifest(store)
    except UserError as error:
        return [str(error)]
    problems = []
    for entry in _entries(manifest):
        try:
            if isinstance(store, LocalStore):
                store.check(entry, hashes=True)
            else:
                store.check_through(entry)
        except UserError as error:
            problems.append(str(error))
    if problems:
        return problems
    try:
        shards = ShardSet.open(location)
        if isinstance(store, LocalStore):
            _check_documents(shards, store)
    except UserError as error:
        problems.append(str(error))
    else:
        if isinstance(store, LocalStore):
            problems += [f"{path}: does not belong to the set" for path in _foreign_files(store.folder, manifest)]
        shards.close()
    return problems


def _entries(manifest: Manifest) -> tuple:
    return (manifest.index, manifest.token_bytes, manifest.tokenizer, *manifest.shards)


def _check_documents(shards: ShardSet, store: LocalStore) -> None:
    """Raises UserError for the first document whose tar member, tokens and index entry do not fit each other."""
    document = 0
    for shard in shards.manifest.shards:
        path = store.folder / shard.name
        members = {member.offset + member.bytes: member for member in list_members(path)}
        suffixes = set()
        for _ in range(shard.documents):
            suffixes.add(_check_document(shards, document, members, path))
            document += 1
        left = [member.name for member in members.values() if member.suffix in suffixes]
        if left:
            raise UserError(f"{path}: member {left[0]!r} is in the tar and not in the index; build the shards again")


def _check_document(shards: ShardSet, document: int, members: dict[int, Member], path: Path) -> str:
    """Checks one document, takes its member out of `members` (by their ends), and returns the member's suffix."""
    tokens = shards.read(document)
    if shards.manifest.separator == EOS_SEPARATOR and tokens[-1] != shards.tokenizer.eos_id:
        raise UserError(f"{path}: document {document} does not end with EOS")
    start = shards.record(document).offset
    member = members.pop(start + tokens.nbytes, None)
    # An array's own header may stand before its numbers, in the tars of others.
    if member is None or not member.offset <= start or (member.offset < start and not member.name.endswith(".npy")):
        raise UserError(
            f"{path}: document {document}: the index has {tokens.nbytes} bytes at offset {start}, which is no member "
            "of the tar; build the shards again"
        )
    return member.suffix


def _foreign_files(folder: Path, manifest: Manifest) -> list[Path]:
    known = {MANIFEST_NAME, *(entry.name for entry in _entries(manifest))}
    return sorted(path for path in folder.iterdir() if path.name not in known)


def describe_set(location: Path | str) -> dict[str, object]:
    """The numbers of a set by name, for people and as JSON."""
    shards = ShardSet.open(location)
    manifest = shards.manifest
    lengths = shards.document_tokens
    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100], method="lower")
    return {
        "folder": str(location),
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
        "document_tokens_histogram": _histogram(lengths),
        "separator": manifest.separator,
        "vocab_size": shards.tokenizer.vocab_size,
        "tokenizer_sha256": shards.tokenizer.sha256,
        "fingerprint": shards.fingerprint,
    }


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many documents have at most so many tokens, and more than the entry before says: powers of two."""
    powers = np.ceil(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    return {str(1 << power): int(counts[power]) for power in range(int(powers.min()), len(counts))}
