"""Where a run stands in its data: a few numbers that are enough to go on exactly."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from pretrain.data.packing import LongDocuments, Order
from pretrain.errors import UserError


class Cursor(BaseModel):
    """The position in the order of rows, and what that order depends on.

    World size, micro-batch size and number of workers are no part of it, nor is the batch size, but for order streams:
    any of them may change at a resume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    position: NonNegativeInt
    """Global samples (rows) consumed by all ranks together."""
    sequence_length: PositiveInt
    """Tokens a row."""
    seed: int
    """Seed of the order."""
    order: Order | Literal["drawn"]
    """Kind of order (see ShardsConfig.order); drawn: each row is drawn by its number."""
    fingerprint: str
    """Identity of the training data: ShardSet.fingerprint, or the synthetic task's."""
    rows_per_step: PositiveInt | None = None
    """Order streams: rows of a step, each of which goes on where one of the step before ended."""
    grid: PositiveInt | None = None
    """Tokens that documents are padded to a multiple of; None: documents are packed."""
    min_document_tokens: PositiveInt = 1
    """Shorter documents are left out."""
    long_documents: LongDocuments | None = None
    """The share of long documents."""

    @model_validator(mode="after")
    def _streams_stand_between_steps(self) -> "Cursor":
        if self.rows_per_step is not None and self.position % self.rows_per_step:
            raise ValueError(f"position {self.position} is inside a step of {self.rows_per_step} rows")
        return self

    def to_json(self) -> str:
        """The cursor as JSON text."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "Cursor":
        """Reads what `to_json` wrote; raises UserError naming a field that is missing, unknown or wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "JSON"
            raise UserError(f"data cursor: {field}: {first['msg']}; the checkpoint that holds it is damaged") from None

    def moved_to(self, cursor: "Cursor | None", changed: str) -> "Cursor":
        """`cursor`, which must belong to the order of this one, or this one where there is none to move to.

        Raises UserError for one of another order, seed, length or data; `changed`: what to say of other data.
        """
        if cursor is None:
            return self
        advice = {
            "fingerprint": changed,
            "sequence_length": (
                "its position counts rows of that length: set training.sequence_length back, or start a new run"
            ),
            "seed": "set data.seed (or the run's seed) back, or start a new run",
            "order": "set data.order back, or start a new run",
            "rows_per_step": (
                "with data.order streams each row goes on from one of the step before: set training.batch_tokens back, "
                "or start a new run"
            ),
            "grid": "documents are padded to it: set data.reset_memory back, or start a new run",
            "min_document_tokens": "set data.min_document_tokens back, or start a new run",
            "long_documents": "set data.long_documents back, or start a new run",
        }
        problems = [
            f"{name} {getattr(cursor, name)} in the checkpoint, {getattr(self, name)} now ({fix})"
            for name, fix in advice.items()
            if getattr(cursor, name) != getattr(self, name)
        ]
        if problems:
            raise UserError("the checkpoint's data cursor does not fit this run: " + "; ".join(problems))
        return cursor
