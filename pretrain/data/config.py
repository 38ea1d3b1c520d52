"""The data section of a recipe, of whichever kind, and opening the shards that it names."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from model import ModelConfig
from pretrain.data.damage import Damage
from pretrain.data.packing import LongDocuments, Order, PackingName, Part, Selection, as_written, parts_of
from pretrain.data.shard_source import ALONE, HeldOutShards, ShardSource
from pretrain.data.shards import OnDamage, ShardSet, Verify
from pretrain.data.source import Data, Share, SourceConfig
from pretrain.data.stores import Location, StoreConfig
from pretrain.data.synthetic.config import SyntheticConfig
from pretrain.errors import UserError
from pretrain.quantities import Tokens


class MixedSource(BaseModel):
    """One of the sources of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    train: Location
    """Folder or URL of its training shards, as data.train; two sources may read the same shards, of documents of
    different lengths, say."""

    weight: NonNegativeFloat
    """Its share of the tokens that are read, beside the weights of the others, which need not add up to 1; 0: it is not
    read."""

    min_document_tokens: Tokens | None = None
    """Documents of fewer tokens, EOS included, are left out; none: as data.min_document_tokens says."""

    max_epochs: PositiveFloat | None = None
    """Passes over it, padding included, after which it is read no more: what it would have had goes to the others by
    their weights; none: any number. Each phase counts its own passes. Not with order streams."""


class ShardsConfig(SourceConfig, StoreConfig):
    """Tokenised text: which shards are read, how they are checked, and in what order."""

    kind: Literal["shards"] = "shards"
    """Tokenised text made by tools.shards; the kind where none is given."""

    train: Location | None = None
    """Folder of the training shards (the one that holds manifest.json; `tools.shards build` writes OUTPUT/train), or
    its URL: http(s)://, s3:// or gs://, with credentials from the environment (AWS_*, GOOGLE_*). This or sources has to
    be given."""

    sources: dict[str, MixedSource] = {}
    """Training shards of several kinds in one mixture, instead of train: each by a name of its own, with its weight.
    Which source a row is of depends on its number alone, and the shares are exact to a row; with order streams, each
    row of a step is of one source for good, and shares are exact to a row of a step. Their realised shares are curves
    (data/share/NAME, data/epochs/NAME). A phase may change any of them, `data: {sources: {code: {weight: 0.5}}}`."""

    validation: Location | None = None
    """Folder or URL of the validation shards, made with the same tokenizer; none: no held-out evaluation."""

    verify: Verify = "hashes"
    """What is checked at the start, of all phases that are left: `hashes` (sha256 of every shard, so that no altered
    token is trained on) or `sizes` (only that every shard is there with its bytes). Hashing reads all shards once on
    every node, whose ranks share the work: about a second for a gigabyte, or what the disk takes; a start says how many
    bytes that is. Where it is too long, `tools.shards verify` can check a set once, and `sizes` skips it at every
    start. Shards at URLs are hashed when they come into the cache, whatever is given here; with `hashes` also what the
    cache holds already, and what is read past it, by byte ranges, is read through once more for it."""

    on_damage: OnDamage = "stop"
    """What happens when a shard is missing or damaged, at the start or on the way: stop, the run ends with its name and
    the hash that was expected and found; skip, its documents are left out by all ranks from the same step on (EOS
    stands in their place, without a target), counted, logged, and noted in checkpoints, so that a resumed run leaves
    out the same. Other rows stay as they are. After the start only what is missing, cut or outside the vocabulary is
    seen. With either, the run ends where a source has no shard left, where a shard of the validation set is missing or
    damaged, and where a shard is there but may not be read."""

    allow_changed: bool = False
    """Whether a run goes on from a checkpoint of other data, or of other sources, weights or filters. It then reads
    them from the row on that it had come to in each; what changed is written to run.jsonl (data_changed). A source that
    was left out at one resume and is back at a later one begins with its first row again, since a checkpoint holds the
    sources of its own run alone."""

    order: Order = "rows"
    """`rows`: documents are permuted and packed, and the packed rows permuted too, so that a batch does not come from
    one long document. `documents`: rows follow each other as packed, so that row n+1 continues row n. `streams`: each
    row of a step goes on where the same row of the step before ended, and the model's state is carried from step to
    step, for documents longer than a row: their gradient stops at the row's start. With `streams` the order of all
    documents is held in memory, which grows with their number; with the others, of 10 M documents and more, that of a
    few million at a time."""

    packing: PackingName = "stream"
    """How documents lie in rows. `stream`: end to end, cut where a row ends. `best_fit`: into rows of whole documents,
    each where it leaves the least room (best-fit decreasing), so that only those longer than a row are cut; what is
    left of a row is padding. For documents that are short beside a row; with order rows alone. All documents are placed
    at once, about 60 bytes of memory a document in every rank."""

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
    def _there_is_one_kind_of_source(self) -> "ShardsConfig":
        if (self.train is None) == (not self.sources):
            raise ValueError(
                "train is missing: give --data.train FOLDER, or sources"
                if self.train is None
                else "train and sources are both set: remove one (in a phase by train: null)"
            )
        if taken := self.sources.keys() & {"", ALONE}:
            name = min(taken)
            raise ValueError(
                f"sources has one called {name!r}, as checkpoints call the data of a run without sources: give it "
                "another name"
            )
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("every weight of sources is 0: give one of them a weight")
        if self.sources and self.long_documents is not None:
            raise ValueError(
                "long_documents is set beside sources: name a source of the same shards with min_document_tokens and "
                "the weight that long documents should have"
            )
        return self

    @model_validator(mode="after")
    def _packing_fits_the_order(self) -> "ShardsConfig":
        if self.packing == "best_fit" and self.order != "rows":
            raise ValueError(
                f"packing is best_fit, whose rows hold whole documents, but order is {self.order}, in which rows go on "
                "in others: set order to rows, or packing to stream"
            )
        return self

    @model_validator(mode="after")
    def _no_stream_ends(self) -> "ShardsConfig":
        capped = [name for name, source in self.sources.items() if source.max_epochs is not None]
        if capped and self.order == "streams":
            raise ValueError(
                f"sources.{capped[0]}.max_epochs is set, but order is streams, in which each row of a step is of one "
                "source for good: no other could take the rows of one that has ended; remove max_epochs (in a phase by "
                "null), or set another order"
            )
        return self

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
        return self.reset_memory or self.packing == "best_fit"

    @property
    def resets_at_documents(self) -> bool:
        """Whether documents reset the memory."""
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
        """The first folder of training shards that is not there."""
        local = [place for place in self.locations if isinstance(place, Path)]
        return next((folder for folder in local if not folder.exists()), None)

    @property
    def locations(self) -> list[Location]:
        """Of the training shards that are read."""
        if self.train is not None:
            return [self.train]
        return list(dict.fromkeys(source.train for source in self.sources.values() if source.weight))

    def to_verify(self) -> dict[str, int]:
        """The sets, unless sizes are enough; of those at URLs what the cache holds."""
        sets, validation = open_shards(self) if self.verify == "hashes" else ({}, None)
        here = {}
        for shards in [*sets.values(), *([] if validation is None else [validation])]:
            here[str(shards.folder)] = shards.store.bytes_here(shards.manifest.shards)
            shards.close()
        return {place: size for place, size in here.items() if size}

    def refuse_damage(self, known: Sequence[Damage]) -> None:
        """Raises UserError for shards of the validation set, and of training sets where damage stops the run."""
        train = {} if self.on_damage == "skip" else dict.fromkeys(map(str, self.locations), "data.on_damage is stop")
        stops = train | ({} if self.validation is None else {str(self.validation): "of validation none is left out"})
        for damage in known:
            if damage.place in stops:
                raise UserError(
                    f"{damage.place}: shard {damage.number} (from 0) is missing or damaged, found {damage.found}, as "
                    f"was seen where it may be left out, but here {stops[damage.place]}; restore the shard and resume"
                )

    def open(self, seed: int, share: Share | None = None, *, grid: int, places: Collection[str] | None = None) -> Data:
        """See `open_shards`."""
        sets, validation = open_shards(self, share, places)
        selection = Selection(
            order=self.order,
            packing=self.packing,
            grid=grid if self.reset_memory else None,
            min_document_tokens=self.min_document_tokens,
            long_documents=self.long_documents,
        )
        source = ShardSource(
            tuple(self._parts(sets, selection)), seed, selection, self.num_workers, self.on_damage, self.allow_changed
        )
        return Data(source, None if validation is None else HeldOutShards(validation))

    def _parts(self, sets: dict[Location, ShardSet], selection: Selection) -> list[Part]:
        if self.train is not None:
            return parts_of(sets[self.train], selection)
        return [
            Part(
                name,
                sets[source.train],
                as_written(source.weight),
                source.min_document_tokens or self.min_document_tokens,
                f"data.sources.{name}.min_document_tokens"
                if source.min_document_tokens
                else "data.min_document_tokens",
                None if source.max_epochs is None else as_written(source.max_epochs),
            )
            for name, source in sorted(self.sources.items())  # the order that they are listed in means nothing
            if source.weight
        ]


def _shards_by_default(section: Any) -> Any:
    return {"kind": "shards", **section} if isinstance(section, dict) else section


DataConfig = Annotated[ShardsConfig | SyntheticConfig, Field(discriminator="kind"), BeforeValidator(_shards_by_default)]
"""The data section: `kind` says which of them."""


def open_shards(
    config: ShardsConfig, share: Share | None = None, places: Collection[str] | None = None
) -> tuple[dict[Location, ShardSet], ShardSet | None]:
    """Opens the training sets, by their places, and the validation set of `config`; `share` is the part of the hashes
    to check, in `places` (see SourceConfig.open). Together they keep about as many files open as one set alone would.

    Raises UserError for a missing or damaged set, and when they were not made with the same tokenizer.
    """
    hashes = config.verify == "hashes"

    def opened_set(place: Location, *, again: bool, on_damage: OnDamage) -> ShardSet:
        read = hashes and share is not None and not again and (places is None or str(place) in places)
        verify = "hashes" if read else "sizes"
        return ShardSet.open(place, verify, *(share or Share(0, 1)), config, hashes, on_damage)

    sets: dict[Location, ShardSet] = {}
    validation = None
    with ExitStack() as opened:
        for place in config.locations:
            sets[place] = opened_set(place, again=False, on_damage=config.on_damage)
            opened.callback(sets[place].close)
        if config.validation is not None:
            validation = opened_set(config.validation, again=config.validation in sets, on_damage="stop")
            opened.callback(validation.close)
            config.refuse_damage([damage for shards in sets.values() for damage in shards.damage])
        _require_one_tokenizer(config, sets, validation)
        opened.pop_all()
    together = [*sets.values(), *([] if validation is None else [validation])]
    for shards in together:
        shards.limit_open_files(of=len(together))
    return sets, validation


def _require_one_tokenizer(config: ShardsConfig, sets: dict[Location, ShardSet], validation: ShardSet | None) -> None:
    first = next(iter(sets.values()))
    field = "data.train" if config.train is not None else "data.sources"
    others = [(f"{field} {place}", shards) for place, shards in sets.items()]
    if validation is not None:
        others.append((f"data.validation {config.validation}", validation))
    for place, shards in others:
        if shards.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError(
                f"{place}: made with another tokenizer than {field} {first.folder}: sha256 {shards.tokenizer.sha256} "
                f"and {first.tokenizer.sha256}; build both with one tokenizer"
            )
