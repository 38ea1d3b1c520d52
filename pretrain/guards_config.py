"""What a run looks out for beside its training: spikes, stragglers, and machines that are not fit for it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GuardsConfig(BaseModel):
    """What is looked out for, and what is done about it. See pretrain/GUARDS.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    on_spike: Literal["log", "skip"] = "log"
    """What is done about a step whose loss or gradient norm is far above those before it: log, write it down; skip, do
    not take the step either, and go back to an earlier checkpoint after max_spikes in a row. log changes nothing that
    is learned."""

    loss_z: float | None = Field(default=6.0, gt=0)
    """A loss is a spike that is so many robust standard deviations (1.4826 times the median absolute deviation) above
    the median of the window. none: losses are not judged."""

    gradient_norm_z: float | None = Field(default=10.0, gt=0)
    """The same for the global gradient norm before clipping, whose deviations upwards are larger."""

    window: int = Field(default=128, ge=10)
    """Steps, of those that were taken last, that a step is compared with."""

    warmup_steps: int = Field(default=100, ge=10)
    """Steps taken at the beginning of each phase that are not judged."""

    max_spikes: int = Field(default=5, ge=1)
    """With on_spike skip: spikes in a row that make the run go back to the newest checkpoint of before the first of
    them, and on with the data behind the last. The tokens since that checkpoint do not count then: as many others are
    trained on."""

    max_rollbacks: int = Field(default=3, ge=0)
    """How often a phase may go back so; one more ends the run, with a checkpoint."""

    straggler_ratio: float | None = Field(default=1.5, gt=1)
    """A rank is a straggler that takes so many times as long for its own work, waiting for others apart, as the median
    of the ranks that have the same work. none: ranks are not compared."""

    straggler_records: int = Field(default=3, ge=1)
    """Records (logging.every_steps) in a row in which it does, before it is told."""

    preflight: bool = True
    """Check before the first step, on every rank, that versions are the same, the GPU computes right, the disk has
    space, clocks agree, and how fast ranks talk to each other."""

    preflight_megabytes: float | None = Field(default=None, gt=0)
    """Size of the all-reduce that is timed. none: 256 on GPUs, 4 on CPUs."""

    min_bandwidth: float | None = Field(default=None, gt=0)
    """Gigabytes a second; an all-reduce below it is warned of. none: it is measured and written down only."""

    clock_tolerance_seconds: float = Field(default=5.0, gt=0)
    """Clocks of nodes that are further apart are warned of."""

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> GuardsConfig:
        if self.on_spike == "skip" and self.loss_z is None and self.gradient_norm_z is None:
            raise ValueError(
                "on_spike is skip, but loss_z and gradient_norm_z are both none, so that nothing is a spike: set one "
                "of them, or remove on_spike"
            )
        needs = {
            "max_spikes": (self.on_spike == "skip", "on_spike is log, and no step is skipped"),
            "max_rollbacks": (self.on_spike == "skip", "on_spike is log, and no step is skipped"),
            "straggler_records": (self.straggler_ratio is not None, "straggler_ratio is none, and no rank is compared"),
            "preflight_megabytes": (self.preflight, "preflight is false, and nothing is timed"),
            "min_bandwidth": (self.preflight, "preflight is false, and nothing is timed"),
            "clock_tolerance_seconds": (self.preflight, "preflight is false, and no clock is looked at"),
        }
        for name, (is_used, reason) in needs.items():
            value = getattr(self, name)
            if not is_used and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value}, but {reason}: remove it")
        return self
