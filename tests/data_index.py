"""Shard sets that are an index alone, of any number of documents, for tests and timings of what reads no token."""

from pathlib import Path

import numpy as np

from pretrain.data import ShardSet
from pretrain.data.format import INDEX_DTYPE, Manifest, ShardEntry
from pretrain.data.stores import LocalStore


def index_only(documents: int, shards: int, *, mean_tokens: int = 500) -> ShardSet:
    """A set whose documents have 1 to 2 * mean_tokens - 1 tokens, in `shards` shards of about as many documents."""
    index = np.zeros(documents, INDEX_DTYPE)
    index["tokens"] = np.random.default_rng(0).integers(1, 2 * mean_tokens, documents)
    edges = np.linspace(0, documents, shards + 1).astype(int)
    index["shard"] = np.repeat(np.arange(shards), np.diff(edges))
    tokens = np.add.reduceat(index["tokens"], edges[:-1])
    entries = [
        ShardEntry(name=f"{n}.tar", sha256="0" * 64, bytes=0, documents=int(count), tokens=int(total))
        for n, (count, total) in enumerate(zip(np.diff(edges), tokens, strict=True))
    ]
    tokenizer = {"name": "t", "sha256": "0" * 64, "bytes": 0, "vocab_size": 10, "eos_id": 0}
    file = {"name": "i", "sha256": "0" * 64, "bytes": 0}
    manifest = Manifest(
        dtype="uint16",
        tokenizer={**tokenizer, "unk_id": None, "bos_id": None, "pad_id": None},
        split={"part": "train", "validation_fraction": 0},
        documents=documents,
        tokens=int(tokens.sum()),
        text_bytes=0,
        index=file,
        token_bytes=file,
        shards=tuple(entries),
    )
    return ShardSet(LocalStore(Path("index")), manifest, index, np.zeros(10, np.int64), Path("index/t"))
