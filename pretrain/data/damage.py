"""Shards that are missing or not what they were: the error that names one, and the record of those that are skipped."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from pretrain.data.stores.errors import DamagedError


class SkippedShard(BaseModel):
    """A shard whose documents are left out, as a run's cursor holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str
    """Name of the data's source; "" where there is one alone."""
    shard: str
    """Its file."""
    expected: str
    """sha256 in the manifest."""
    found: str
    """What was found instead."""
    documents: NonNegativeInt
    tokens: NonNegativeInt

    def __str__(self) -> str:
        """The shard as messages say it."""
        place = f"{self.shard} of data.sources.{self.source}" if self.source else self.shard
        return (
            f"{place}: {self.documents:,} documents, {self.tokens:,} tokens; expected sha256 {self.expected}, found "
            f"{self.found}"
        )


class Damage(NamedTuple):
    """What a rank found of a shard."""

    place: str
    """The folder of its set."""
    number: int
    """Of the shard in the set."""
    found: str
    """What is there instead of it, in words."""


class DamagedShard(DamagedError):
    """A shard is missing, or is not what its manifest says."""

    def __init__(self, message: str, damage: Damage) -> None:
        super().__init__(message, damage.found)
        self.damage = damage
