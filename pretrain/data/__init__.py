"""Tokenised shards and the loader that reads them.

A training row is a pure function of (seed, epoch, global sample): the same for any world size, any number of workers
and any batch size, so a run resumes exactly from a small cursor. The folder's format is described in `format`, the
order in `packing`, the division over ranks in `loader`.
"""

from pretrain.data.config import DataConfig, open_data
from pretrain.data.cursor import Cursor
from pretrain.data.loader import Batch, Loader, open_loader
from pretrain.data.shards import ShardSet, TokenizerInfo
from pretrain.data.validation import sequential_batches

__all__ = [
    "Batch",
    "Cursor",
    "DataConfig",
    "Loader",
    "ShardSet",
    "TokenizerInfo",
    "open_data",
    "open_loader",
    "sequential_batches",
]
