"""How fast a device computes: from a measured record, or an assumption that is named as one."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from model import ModelConfig
from model.flops import flops_per_token
from pretrain.devices import listed_device
from pretrain.errors import UserError
from tools.bench.long import model_config

ASSUMED_MODEL = 0.4
ASSUMED_MEMORY = 0.1
"""Shares of the peak where nothing was measured: of the model's products, and of the memory's, which are many small
ones."""
_ALIKE = 0.02
"""Steps differ less than this, relatively, in what they spend on model and memory."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one device."""

    model: float
    memory: float
    source: str
    """Where they are from, for people."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """By variant, measured time over what the two rates say."""

    def seconds(self, variant: str, model: float, memory: float) -> tuple[float, float]:
        """For so many operations of a variant's model and memory: of each."""
        scale = self.scales.get(variant, 1.0)
        return scale * model / self.model, scale * memory / self.memory


def assumed(peak: float) -> Rates:
    """Shares of a device's peak."""
    source = (
        f"assumed, not measured: {ASSUMED_MODEL:.0%} of the peak for the model, {ASSUMED_MEMORY:.0%} for its memory"
    )
    return Rates(ASSUMED_MODEL * peak, ASSUMED_MEMORY * peak, source)


class Measured(NamedTuple):
    """A training step of a record."""

    variant: str
    length: int
    model: float
    memory: float
    """Operations of the step, recomputed ones included."""
    seconds: float


def calibrated(record: Mapping[str, Any], gpu: str, precision: str) -> Rates:
    """The rates that explain the steps of a record of `tools.bench train` or `tools.bench long`.

    The two rates fit the steps of all models, in relative error; what a variant took beside that is its scale.

    Args:
        gpu: the device that is planned for, as `pretrain.devices.PEAKS` has it.
        precision: what the recipe computes in.

    Raises UserError for a record without training steps, of another device, or of another precision.
    """
    measured_on = record["hardware"].get("gpu", "no GPU") if record["settings"].get("device") == "cuda" else "a CPU"
    if listed_device(measured_on) != gpu:
        raise UserError(
            f"the record was measured on {measured_on}, and the plan is for {gpu}: give one of the same GPU"
        )
    measured_in = record["settings"].get("dtype", "fp32")  # tools.bench long knows no other
    if measured_in != precision:
        raise UserError(
            f"the record was measured in {measured_in}, and parallel.precision is {precision}: give a record of "
            f"`tools.bench train --dtype {precision}`"
        )
    return fitted(list(measured_steps(record)), f"{record['command']} of {record['date']}")


def fitted(steps: list[Measured], source: str) -> Rates:
    """See `calibrated`. Raises UserError for no steps."""
    if not steps:
        raise UserError("the record holds no training steps: give one of `tools.bench train` or `tools.bench long`")
    rows = torch.tensor([[s.model / s.seconds, s.memory / s.seconds] for s in steps], dtype=torch.float64)
    inverse = torch.linalg.lstsq(rows, torch.ones(len(steps), 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
    # Models whose two parts are alike do not tell them apart: one rate then.
    if torch.linalg.matrix_rank(rows, rtol=_ALIKE) < 2 or not (inverse > 0).all():
        total = rows.sum(1)
        inverse = (total.sum() / total.square().sum()).repeat(2)
    model, memory = (1 / inverse).tolist()
    by_variant: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        by_variant[step.variant].append(step.seconds / (step.model / model + step.memory / memory))
    scales = {variant: statistics.median(ratios) for variant, ratios in by_variant.items()}
    return Rates(model, memory, f"measured: {source}", scales)


def measured_steps(record: Mapping[str, Any]) -> Iterator[Measured]:
    """The training steps of a record."""
    settings = record["settings"]
    for row in record["results"]:
        if record["name"] == "train" and "seconds_per_step" in row:
            config = ModelConfig.preset(row["preset"])
            again, seconds = float(row["activations"] == "recomputed"), row["seconds_per_step"]
            tokens = row["batch"] * row["length"]
        elif record["name"] == "long" and "seconds" in row:
            names = ("dim", "heads", "layers", "chunk_size", "window")
            config = model_config(row["variant"], **{name: settings[name] for name in names})
            # Of segments that the gradient flows through, all but the last.
            again = max(0.0, 1 - settings["segment_length"] / row["length"]) if row["gradient"] == "exact" else 0.0
            tokens, seconds = row["length"], row["seconds"]
        else:
            continue
        flops = flops_per_token(config, row["length"])
        factor = tokens * (3 + again) / 3  # a backward costs two forwards
        yield Measured(config.variant, row["length"], factor * flops.model, factor * flops.memory, seconds)
