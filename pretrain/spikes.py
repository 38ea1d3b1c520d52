"""Spikes of the loss and the gradient norm: steps far above those before them, by a robust z-score.

`z = (x - median) / (1.4826 MAD)` over the steps that were taken last, one-sided: 1.4826 times the median absolute
deviation is the standard deviation of a normal distribution, and up to half of the window may be outliers without
moving either far. A trend does not pass for a spike: where values rise evenly over the window, the next one has z 1.35.
"""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from parallel.step_gate import Limits
from pretrain.guards_config import GuardsConfig

_NORMAL = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""

_LEAST_SCALE = 1e-3
"""Least standard deviation, in medians: values that (nearly) repeat are no measure of what is far above them."""


class Level(NamedTuple):
    """What values are like."""

    centre: float
    scale: float

    @classmethod
    def of(cls, values: tuple[float, ...]) -> Level:
        """Median, and robust standard deviation."""
        centre = median(values)
        deviation = median([abs(value - centre) for value in values])
        return cls(centre, max(_NORMAL * deviation, _LEAST_SCALE * abs(centre)))

    def z(self, value: float) -> float:
        """How far above the others a value is."""
        if self.scale == 0:
            return 0.0 if value <= self.centre else math.inf
        return (value - self.centre) / self.scale

    def limit(self, z: float | None) -> float:
        """The value that is so far above the others; inf without z."""
        return math.inf if z is None else self.centre + z * self.scale


class Verdict(NamedTuple):
    """What is said of a step."""

    loss_z: float
    gradient_norm_z: float
    is_spike: bool


class SpikeState(BaseModel):
    """What the next step is compared with, and the spikes so far: part of what a checkpoint holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    losses: tuple[float, ...] = ()
    """Of the steps that were taken last, oldest first."""

    gradient_norms: tuple[float, ...] = ()
    """Theirs."""

    taken: int = 0
    """Steps taken in this phase, as far as weights remember them."""

    total: int = 0
    """Spikes since the run's beginning."""

    in_a_row: int = 0
    """Spikes behind the last step that was none."""

    first_step: int | None = None
    """Where these began; None where there are none."""

    first_row: int | None = None
    """The position in the data there."""

    rollbacks: int = 0
    """How often the phase went back for them."""

    def limits(self, guards: GuardsConfig) -> Limits | None:
        """Above which a step is a spike; None while steps are not judged."""
        if self.taken < guards.warmup_steps:
            return None
        loss, norm = self._levels()
        return Limits(loss=loss.limit(guards.loss_z), gradient_norm=norm.limit(guards.gradient_norm_z))

    def verdict(self, guards: GuardsConfig, loss: float, gradient_norm: float) -> Verdict | None:
        """What is said of a finite step; None while steps are not judged."""
        if self.taken < guards.warmup_steps:
            return None
        of_loss, of_norm = self._levels()
        is_spike = loss > of_loss.limit(guards.loss_z) or gradient_norm > of_norm.limit(guards.gradient_norm_z)
        return Verdict(of_loss.z(loss), of_norm.z(gradient_norm), is_spike)

    def _levels(self) -> tuple[Level, Level]:
        return Level.of(self.losses), Level.of(self.gradient_norms)

    def with_spike(self, step: int, row: int) -> SpikeState:
        """With one more spike: the step's number, and the position in the data that it began at."""
        counts = {"total": self.total + 1, "in_a_row": self.in_a_row + 1}
        begins = {} if self.in_a_row else {"first_step": step, "first_row": row}
        return self.model_copy(update=counts | begins)

    def without_row(self) -> SpikeState:
        """With a step that is none: the row of spikes is over."""
        return self.model_copy(update={"in_a_row": 0, "first_step": None, "first_row": None})

    def with_taken(self, loss: float, gradient_norm: float, window: int) -> SpikeState:
        """With a step that was taken among those that the next ones are compared with."""
        values = {
            "losses": (*self.losses, loss)[-window:],
            "gradient_norms": (*self.gradient_norms, gradient_norm)[-window:],
        }
        return self.model_copy(update={**values, "taken": self.taken + 1})

    def gone_back(self, earlier: SpikeState) -> SpikeState:
        """What the run goes on with from an earlier checkpoint: that one's steps, and the counts of now."""
        return earlier.without_row().model_copy(update={"total": self.total, "rollbacks": self.rollbacks + 1})

    def in_next_phase(self) -> SpikeState:
        """At the beginning of a phase, whose steps are like no other's."""
        return SpikeState(total=self.total)
