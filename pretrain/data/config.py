"""The data section of a recipe, of whichever kind, and opening the shards that it names."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pretrain.data.packing import Order
from pretrain.data.shard_source import HeldOutShards, ShardSource
from pretrain.data.shards import ShardSet, Verify
from pretrain.data.source import Data, Share, SourceConfig
from pretrain.data.synthetic.config import SyntheticConfig
from pretrain.errors import UserError


class ShardsConfig(SourceConfig):
    """Tokenised text: which shards are read, how they are checked, and in what order."""

    kind: Literal["shards"] = "shards"
    """Tokenised text made by tools.shards; the kind where none is given."""

    train: Path
    """Folder of the training shards (the one that holds manifest.json; `tools.shards build` writes OUTPUT/train)."""

    validation: Path | None = None
    """Folder of the validation shards, made with the same tokenizer; none: no held-out evaluation."""

    verify: Verify = "hashes"
    """What is checked at the start: `hashes` (sha256 of every shard, so that no altered token is trained on) or `sizes`
    (only that every shard is there with its bytes). Hashing reads all shards once on every node, whose ranks share the
    work: about a second for a gigabyte, or what the disk takes. Where that is too long, `tools.shards verify` can check
    a set once, and `sizes` skips it at every start."""

    order: Order = "rows"
    """`rows`: documents are permuted and packed, and the packed rows permuted too, so that a batch does not come from
    one long document. `documents`: rows follow each other as packed, so that row n+1 continues row n."""

    @property
    def has_held_out(self) -> bool:
        """Whether validation shards are named."""
        return self.validation is not None

    def check_fits(self, *, sequence_length: int, vocab_size: int, held_out_tokens: int | None) -> None:
        """Nothing: what shards need is known when they are open."""

    def missing(self) -> Path | None:
        """The folder of the training shards, if it is not there."""
        return None if self.train.exists() else self.train

    def open(self, seed: int, share: Share | None = None) -> Data:
        """See `open_shards`."""
        train, validation = open_shards(self, share)
        source = ShardSource(train, seed, self.order, self.num_workers)
        return Data(source, None if validation is None else HeldOutShards(validation))


def _shards_by_default(section: Any) -> Any:
    return {"kind": "shards", **section} if isinstance(section, dict) else section


DataConfig = Annotated[ShardsConfig | SyntheticConfig, Field(discriminator="kind"), BeforeValidator(_shards_by_default)]
"""The data section: `kind` says which of them."""


def open_shards(config: ShardsConfig, share: Share | None = None) -> tuple[ShardSet, ShardSet | None]:
    """Opens the training and the validation set of `config`; `share` is the part of the hashes to check (see
    SourceConfig.open).

    Raises UserError for a missing or damaged set, and when the two were not made with the same tokenizer.
    """
    verify, share = ("sizes", Share(0, 1)) if share is None else (config.verify, share)
    train = ShardSet.open(config.train, verify, *share)
    if config.validation is None:
        return train, None
    validation = ShardSet.open(config.validation, verify, *share)
    if train.tokenizer.sha256 != validation.tokenizer.sha256:
        raise UserError(
            f"data.validation {config.validation}: made with another tokenizer than data.train {config.train}: sha256 "
            f"{validation.tokenizer.sha256} and {train.tokenizer.sha256}; build both with one tokenizer"
        )
    return train, validation
