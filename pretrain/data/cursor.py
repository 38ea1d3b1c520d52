"""Where a run stands in its data: a few numbers that are enough to go on exactly."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from pretrain.data.damage import SkippedShard
from pretrain.data.packing import LongDocuments, Order, PackingName
from pretrain.errors import UserError

_CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourceCursor(BaseModel):
    """Where a run stands in one of its sources, and what that holds."""

    model_config = _CONFIG

    position: NonNegativeInt
    """Rows read of it."""
    epoch: NonNegativeInt
    """Passes that are behind it."""
    before: NonNegativeInt = 0
    """Rows that had been read of it at `Cursor.origin`."""
    weight: str
    """Beside the other sources, as a fraction."""
    min_document_tokens: PositiveInt
    """Shorter documents are left out."""
    max_epochs: str | None = None
    """Passes after which it is read no more, as a fraction."""
    fingerprint: str
    """ShardSet.fingerprint."""
    documents: PositiveInt
    tokens: PositiveInt
    """Of the whole set, so that a message can say what changed."""

    def differences(self, now: "SourceCursor", name: str) -> list[str]:
        """What is not as it was, in words; `name`: the source's."""
        pairs = []
        if self.fingerprint != now.fingerprint:
            sizes = [f"{x.fingerprint[:12]} ({x.documents:,} documents, {x.tokens:,} tokens)" for x in (self, now)]
            pairs.append(("fingerprint", *sizes))
        names = ("weight", "min_document_tokens", "max_epochs")
        pairs += [(x, getattr(self, x), getattr(now, x)) for x in names if getattr(self, x) != getattr(now, x)]
        return [f"source {name}: {field} {then} in the checkpoint, {today} now" for field, then, today in pairs]


class Cursor(BaseModel):
    """The position in the order of rows, and what that order depends on.

    World size, micro-batch size and number of workers are no part of it, nor is the batch size, but for order streams:
    any of them may change at a resume.
    """

    model_config = _CONFIG

    position: NonNegativeInt
    """Global samples (rows) consumed by all ranks together."""
    sequence_length: PositiveInt
    """Tokens a row."""
    seed: int
    """Seed of the order."""
    order: Order | Literal["drawn"]
    """Kind of order (see ShardsConfig.order); drawn: each row is drawn by its number."""
    packing: PackingName = "stream"
    """How documents lie in rows."""
    fingerprint: str
    """Identity of the training data: ShardSet.fingerprint, that of all sources together, or the synthetic task's."""
    tokenizer: str | None = None
    """sha256 of the tokenizer that made the data; None where there is none, or it was not noted."""
    rows_per_step: PositiveInt | None = None
    """Order streams: rows of a step, each of which goes on where one of the step before ended."""
    grid: PositiveInt | None = None
    """Tokens that documents are padded to a multiple of; None: documents are packed."""
    min_document_tokens: PositiveInt = 1
    """Shorter documents are left out."""
    long_documents: LongDocuments | None = None
    """The share of long documents."""
    origin: NonNegativeInt = 0
    """The position from which on the sources are what they are: that of the last resume with changed data."""
    sources: dict[str, SourceCursor] = {}
    """Each source by its name; `train` where there is one alone."""
    skipped: tuple[SkippedShard, ...] = ()
    """Shards whose documents are left out."""

    @model_validator(mode="after")
    def _streams_stand_between_steps(self) -> "Cursor":
        if self.rows_per_step is not None and self.position % self.rows_per_step:
            raise ValueError(f"position {self.position} is inside a step of {self.rows_per_step} rows")
        return self

    def require_order_of(self, now: "Cursor") -> None:
        """Raises UserError where `now`, the beginning of this run's data, has another order, seed or length: with
        these the position means something else, whatever the data.
        """
        advice = {
            "sequence_length": (
                "its position counts rows of that length: set training.sequence_length back, or start a new run"
            ),
            "seed": "set data.seed (or the run's seed) back, or start a new run",
            "order": "set data.order back, or start a new run",
            "packing": "set data.packing back, or start a new run",
            "rows_per_step": (
                "with data.order streams each row goes on from one of the step before: set training.batch_tokens back, "
                "or start a new run"
            ),
            "grid": "documents are padded to it: set data.reset_memory back, or start a new run",
        }
        if self.tokenizer is not None:
            advice["tokenizer"] = "its tokens mean something else: give shards made with the run's tokenizer"
        problems = [
            f"{name} {getattr(self, name)} in the checkpoint, {getattr(now, name)} now ({fix})"
            for name, fix in advice.items()
            if getattr(self, name) != getattr(now, name)
        ]
        if problems:
            raise UserError("the checkpoint's data cursor does not fit this run: " + "; ".join(problems))

    def data_differences(self, now: "Cursor") -> list[str]:
        """What of the data, and of the choice of documents, is not as it was, in words."""
        if not self.sources:  # from before they were noted
            names = ("fingerprint", "min_document_tokens", "long_documents")
            pairs = [(name, getattr(self, name), getattr(now, name)) for name in names]
            return [f"{name} {then} in the checkpoint, {today} now" for name, then, today in pairs if then != today]
        found = []
        for name in dict.fromkeys([*self.sources, *now.sources]):
            then, today = self.sources.get(name), now.sources.get(name)
            if then is None or today is None:
                places = ("is new", "none in the checkpoint") if then is None else ("is gone", "none now")
                found.append(f"source {name}: {places[0]}, {places[1]}")
            else:
                found += then.differences(today, name)
        return found
