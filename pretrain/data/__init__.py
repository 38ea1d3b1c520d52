"""The data that a run trains on, and the loader that deals it out.

A training row is a pure function of (seed, global sample), and for streams of the rows a step: the same for any world
size and any number of workers, so a run resumes exactly from a small cursor. What a run asks of any kind of data is in
`source`, the division over ranks in `loader`. Tokenised shards: the folder's format is described in `format`, folders
and URLs where they lie in `stores`, documents end to end in `stream` and whole in rows in `best_fit`, the order of rows
in `packing`, that of sources in `interleave`, reading them in `pieces`, shards that are left out in `damage`. Rows that
are drawn, with questions that have an answer: `synthetic`.
"""

from pretrain.data.config import DataConfig, ShardsConfig, open_shards
from pretrain.data.cursor import Cursor
from pretrain.data.damage import Damage
from pretrain.data.loader import Batch, Division, Loader
from pretrain.data.packing import LongDocuments, Selection
from pretrain.data.shard_source import ShardSource
from pretrain.data.shards import ShardSet, TokenizerInfo
from pretrain.data.source import Data, HeldOut, Share, Source, SourceConfig
from pretrain.data.synthetic import SyntheticConfig
from pretrain.data.validation import sequential_batches

__all__ = [
    "Batch",
    "Cursor",
    "Damage",
    "Data",
    "DataConfig",
    "Division",
    "HeldOut",
    "Loader",
    "LongDocuments",
    "Selection",
    "ShardSet",
    "ShardSource",
    "ShardsConfig",
    "Share",
    "Source",
    "SourceConfig",
    "SyntheticConfig",
    "TokenizerInfo",
    "open_shards",
    "sequential_batches",
]
