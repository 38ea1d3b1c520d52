"""The data section of a recipe, and opening what it names."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from pretrain.data.packing import Order
from pretrain.data.shards import ShardSet, Verify
from pretrain.errors import UserError


class DataConfig(BaseModel):
    """Which shards are read, how they are checked, and in what order."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: Path
    """Folder of the training shards (the one that holds manifest.json; `tools.shards build` writes OUTPUT/train)."""

    validation: Path | None = None
    """Folder of the validation shards, made with the same tokenizer; none: no held-out evaluation."""

    num_workers: NonNegativeInt = 2
    """Threads that read ahead; 0 reads in line. Any number gives the same batches."""

    seed: int | None = None
    """Seed of the order of documents and rows; none: the run's seed."""

    verify: Verify = "sizes"
    """What is checked at the start: `sizes` (every shard is there, with its bytes) or `hashes` (sha256 of every shard
    as well, which reads all of them once on every rank)."""

    order: Order = "rows"
    """`rows`: documents are permuted and packed, and the packed rows permuted too, so that a batch does not come from
    one long document. `documents`: rows follow each other as packed, so that row n+1 continues row n."""


def open_data(config: DataConfig) -> tuple[ShardSet, ShardSet | None]:
    """Opens the training and the validation set of `config`.

    Raises UserError for a missing or damaged set, and when the two were not made with the same tokenizer.
    """
    train = ShardSet.open(config.train, verify=config.verify)
    if config.validation is None:
        return train, None
    validation = ShardSet.open(config.validation, verify=config.verify)
    if train.tokenizer.sha256 != validation.tokenizer.sha256:
        raise UserError(
            f"data.validation {config.validation}: made with another tokenizer than data.train {config.train}: sha256 "
            f"{validation.tokenizer.sha256} and {train.tokenizer.sha256}; build both with one tokenizer"
        )
    return train, validation
