"""The learning rate as a pure function of tokens: nothing to save, nothing that a resume could get wrong."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.quantities import Tokens, TokensOrZero


class ScheduleConfig(BaseModel):
    """How the learning rate rises and falls over the run's tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine falls along half a cosine to the end; wsd (warmup-stable-decay) stays and falls
    linearly over the last decay_tokens; constant stays."""

    warmup_tokens: TokensOrZero = 0
    """The rate rises linearly from 0 over this many tokens."""

    decay_tokens: Tokens | None = None
    """wsd only: how many tokens at the end the rate falls over."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the fall ends, as a part of optimizer.lr; unused by constant."""

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.decay_tokens is None:
            raise ValueError("kind wsd needs decay_tokens: how many tokens at the end the rate falls over")
        if self.kind != "wsd" and self.decay_tokens is not None:
            raise ValueError(f"decay_tokens belongs to kind wsd, and kind is {self.kind}; remove it")
        # Its default may come from a recipe that was written out whole.
        if self.kind == "constant" and self.min_lr_ratio != type(self).model_fields["min_lr_ratio"].default:
            raise ValueError("min_lr_ratio is unused with kind constant; remove it")
        return self


def learning_rate(config: ScheduleConfig, peak: float, tokens: int, total: int) -> float:
    """The rate of the step that brings the run to `tokens` of `total`: the first is above 0, the last the lowest."""
    if tokens < config.warmup_tokens:
        return peak * tokens / config.warmup_tokens
    floor = config.min_lr_ratio
    if config.kind == "cosine":
        done = (tokens - config.warmup_tokens) / max(total - config.warmup_tokens, 1)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.kind == "wsd" and config.decay_tokens is not None:
        left = max(total - tokens, 0) / config.decay_tokens
        return peak * (floor + (1 - floor) * min(left, 1.0))
    return peak
