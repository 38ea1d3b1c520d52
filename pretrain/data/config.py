"""The data section of a recipe, of whichever kind, and opening the shards that it names."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from model import ModelConfig
from pretrain.data.packing import LongDocuments, Order, Selection
from pretrain.data.shard_source import HeldOutShards, ShardSource
from pretrain.data.shards import ShardSet, Verify
from pretrain.data.source import Data, Share, SourceConfig
from pretrain.data.stores import Location, StoreConfig
from pretrain.data.synthetic.config import SyntheticConfig
from pretrain.errors import UserError
from pretrain.quantities import Tokens


class ShardsConfig(SourceConfig, StoreConfig):
    """Tokenised text: which shards are read, how they are checked, and in what order."""

    kind: Literal["shards"] = "shards"
    """Tokenised text made by tools.shards; the kind where none is given."""

    train: Location
    """Folder of the training shards (the one that holds manifest.json; `tools.shards build` writes OUTPUT/train), or
    its URL: http(s)://, s3:// or gs://, with credentials from the environment (AWS_*, GOOGLE_*)."""

    validation: Location | None = None
    """Folder or URL of the validation shards, made with the same tokenizer; none: no held-out evaluation."""

    verify: Verify = "hashes"
    """What is checked at the start, of all phases that are left: `hashes` (sha256 of every shard, so that no altered
    token is trained on) or `sizes` (only that every shard is there with its bytes). Hashing reads all shards once on
    every node, whose ranks share the work: about a second for a gigabyte, or what the disk takes; a start says how many
    bytes that is. Where it is too long, `tools.shards verify` can check a set once, and `sizes` skips it at every
    start. Shards at URLs are hashed when they come into the cache, whatever is given here; with `hashes` also what the
    cache holds already, and what is read past it, by byte ranges, is read through once more for it."""

    order: Order = "rows"
    """`rows`: documents are permuted and packed, and the packed rows permuted too, so that a batch does not come from
    one long document. `documents`: rows follow each other as packed, so that row n+1 continues row n. `streams`: each
    row of a step goes on where the same row of the step before ended, and the model's state is carried from step to
    step, for documents longer than a row: their gradient stops at the row's start."""

    reset_memory: bool = False
    """Whether the model's state (memory, convolutions, attention, positions) begins anew at each document's start. The
    documents are then padded to whole chunks of the memory (segments of the mac), which --dry-run counts; padding is
    read and counted as tokens, but is no target. Held-out evaluation reads across documents all the same: there the
    state goes on from each into the next of its row."""

    min_document_tokens: Tokens = 1
    """Documents of fewer tokens, EOS included, are left out."""

    long_documents: LongDocuments | None = None
    """A share of the rows that is made of long documents alone; none: all rows are of all documents."""

    @model_validator(mode="after")
    def _long_is_longer_than_any(self) -> "ShardsConfig":
        long, shortest = self.long_documents, self.min_document_tokens
        if long is not None and long.at_least <= shortest:
            raise ValueError(
                f"long_documents.at_least is {long.at_least}, min_document_tokens {shortest}: every document is long; "
                "raise at_least, or remove long_documents"
            )
        return self

    @property
    def has_held_out(self) -> bool:
        """Whether validation shards are named."""
        return self.validation is not None

    @property
    def carries_state(self) -> bool:
        """Whether rows go on from step to step."""
        return self.order == "streams"

    @property
    def pads_documents(self) -> bool:
        """Whether documents are padded."""
        return self.reset_memory

    def check_fits(self, *, sequence_length: int, vocab_size: int, held_out_tokens: int | None) -> None:
        """Nothing: what shards need is known when they are open."""

    def check_resets(self, model: ModelConfig, *, sequence_length: int, segment_length: int | None) -> None:
        """Raises ValueError for lengths that documents cannot begin at, and a state that would grow from step to
        step.
        """
        if not self.reset_memory and not self.carries_state:
            return
        why = "data.reset_memory is on" if self.reset_memory else "data.order is streams"
        unit = "model.segment" if model.variant == "mac" else "model.memory.chunk"
        lengths = {"training.sequence_length": sequence_length, "training.segment_length": segment_length}
        for name, length in lengths.items():
            if length is not None and length % model.grid:
                near = max(1, round(length / model.grid)) * model.grid
                raise ValueError(
                    f"{name} {length} is not a multiple of {unit} {model.grid}, where documents begin ({why}): make it "
                    f"{near}, or another multiple"
                )
        if self.carries_state and model.variant == "transformer" and model.window is None:
            raise ValueError(
                "data.order is streams, which carries the state from step to step, but full attention's grows with "
                "every token: set model.window, or another data.order"
            )

    def missing(self) -> Path | None:
        """The folder of the training shards, if it is not there."""
        return None if isinstance(self.train, str) or self.train.exists() else self.train

    def to_verify(self) -> dict[str, int]:
        """The sets, unless sizes are enough; of those at URLs what the cache holds."""
        sets = open_shards(self) if self.verify == "hashes" else ()
        here = {str(shards.folder): shards.store.bytes_here(shards.manifest.shards) for shards in sets if shards}
        return {place: size for place, size in here.items() if size}

    def open(self, seed: int, share: Share | None = None, *, grid: int) -> Data:
        """See `open_shards`."""
        train, validation = open_shards(self, share)
        selection = Selection(
            order=self.order,
            grid=grid if self.reset_memory else None,
            min_document_tokens=self.min_document_tokens,
            long_documents=self.long_documents,
        )
        source = ShardSource(train, seed, selection, self.num_workers)
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
    hashes = config.verify == "hashes"
    verify, share = ("sizes", Share(0, 1)) if share is None else (config.verify, share)
    train = ShardSet.open(config.train, verify, *share, config, hashes)
    if config.validation is None:
        return train, None
    validation = ShardSet.open(config.validation, verify, *share, config, hashes)
    if train.tokenizer.sha256 != validation.tokenizer.sha256:
        raise UserError(
            f"data.validation {config.validation}: made with another tokenizer than data.train {config.train}: sha256 "
            f"{validation.tokenizer.sha256} and {train.tokenizer.sha256}; build both with one tokenizer"
        )
    return train, validation
