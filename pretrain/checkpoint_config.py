"""The recipe's section `checkpoint`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pretrain.quantities import Tokens


class CheckpointConfig(BaseModel):
    """When checkpoints are written, how, and how many are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every_tokens: Tokens | None = None
    """Tokens between checkpoints; none: only at the end."""

    keep: int = Field(default=3, ge=1)
    """How many of the newest stay; older ones are removed once a newer one is whole. The last one of each phase stays
    in any case, so that the phases behind it can be run again."""

    keep_every_tokens: Tokens | None = None
    """Of the checkpoints, the first at or behind each multiple of so many tokens of the run stays for good; none: none
    does for that."""

    asynchronous: bool = True
    """Whether steps go on while a checkpoint is written: they wait only for the copy of weights and optimizer to the
    host's memory, of which a rank then needs as much more as it holds of them (12 bytes for each parameter that it
    steps). false: they wait until it is on the disk."""

    max_failed_saves: int = Field(default=3, ge=1)
    """How many checkpoints in a row may fail to be written (a full disk, say) until the run ends for it; before that it
    goes on, with an alarm, and the next one that is due is tried. The last one of a phase must not fail."""
