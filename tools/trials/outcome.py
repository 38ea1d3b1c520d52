"""A run's folder after the training: what run.jsonl says, put into a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.agreement import DivergedError
from pretrain.metrics import read_events
from tools.trials.results import ProbeResult, Result
from tools.trials.runs import TrialFile

THREADS = 1
"""CPU threads of a run."""


@dataclass
class Training:
    """What the events of a training say: see `Result` for what is counted."""

    steps: int = 0
    tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    curve: dict[int, float] = field(default_factory=dict)
    memory: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Over all recorded intervals; 0 where there is none."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0


def training_of(events: list[dict[str, Any]], metric: Literal["accuracy", "loss"]) -> Training:
    """Reads the events of all attempts of a run, in the order in which they were written."""
    training = Training()
    before = 0
    for event in events:
        kind = event["event"]
        if kind in ("start", "resume"):
            before = event["tokens"]
        elif kind == "step":
            tokens = event["tokens"] - before
            before = event["tokens"]
            training.timed_tokens += tokens
            training.seconds += tokens / event["tokens_per_second"]
            training.steps, training.tokens = event["step"], event["tokens"]
        elif kind == "eval":
            training.curve[event["step"]] = event[metric]
        elif kind == "memory":
            training.memory = {f"layer {number}": layer for number, layer in enumerate(event["layers"]) if layer}
    return training


def divergence(events: list[dict[str, Any]]) -> str | None:
    """The error of an attempt that ended for steps that were not finite; None for any other end."""
    last = events[-1] if events else {}
    if last.get("event") != "error" or last.get("type") != DivergedError.__name__:
        return None
    return f"{last['type']}: {last['message']}"


def make_result(
    folder: Path, trial: TrialFile, probes: Mapping[str, ProbeResult], *, failed: str | None = None
) -> Result:
    """The result of the training in a folder and of its probes. Raises UserError for events that cannot be read."""
    training = training_of(read_events(folder), trial.metric)
    return Result(
        study=trial.study,
        trial=trial.trial,
        seed=trial.seed,
        recipe_sha256=trial.recipe_sha256,
        parameters=trial.parameters,
        tokens=training.tokens,
        steps=training.steps,
        seconds=training.seconds,
        tokens_per_second=training.tokens_per_second,
        threads=THREADS,
        chance=trial.chance,
        curve=tuple(sorted(training.curve.items())),
        memory=training.memory,
        probes=dict(probes),
        environment=trial.environment,
        failed=failed,
    )
