"""What a run of a suite found: result.json in its folder.

A suite's folder holds `<study>/<trial>/seed-<n>/result.json`, and `suite.json`: what was to be run, a record (see
tools.trials.record) without results, with the seconds that the suite has taken so far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.durable import sync
from pretrain.errors import UserError
from tools.command import writing

FORMAT = "mnemosyne-trial"
VERSION = 1
RESULT_FILE = "result.json"
SUITE_FILE = "suite.json"

# In JSON as NaN and Infinity: what a diverging run scored is to be read again as it was.
_CONFIG = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class Bucket(BaseModel):
    """Loss of the targets at some positions of their rows."""

    model_config = _CONFIG

    first: int
    """First position, counted from 0."""

    last: int
    """Last position, included."""

    tokens: int
    """Targets scored."""

    loss: float
    """Mean over them, in nats."""


class ProbeResult(BaseModel):
    """What a trained model scored on held-out rows."""

    model_config = _CONFIG

    loss: float
    """Mean over the scored tokens, in nats."""

    accuracy: float | None = None
    """Share of right answers; None for text."""

    bits_per_byte: float | None = None
    """Of text; None for drawn rows."""

    tokens: int
    """Tokens scored."""

    row_tokens: int
    """Tokens of a row, the longest one for drawn rows."""

    by_position: tuple[Bucket, ...] | None = None
    """Loss by position in the row, in order; None for drawn rows."""


class Result(BaseModel):
    """A run that was trained and probed, or whose loss was no number any more."""

    model_config = _CONFIG

    format: Literal["mnemosyne-trial"] = FORMAT
    """Tells the file from others."""

    version: Literal[1] = VERSION
    """Of the format."""

    study: str
    """The study's name."""

    trial: str
    """The trial's name."""

    seed: int
    """The run's seed."""

    recipe_sha256: str
    """What the result is of: the recipe's fields without `folder`, the text, the metric and the probes."""

    parameters: int
    """Of the model."""

    tokens: int
    """Trained on."""

    steps: int
    """Optimizer steps taken."""

    seconds: float
    """Seconds that the steps' forward, backward and optimizer took, over all attempts, a part that was repeated after
    an interruption included: batch_tokens over tokens_per_second of each recorded interval of run.jsonl. Start-up,
    evaluations, checkpoints, and what an interrupted attempt did after its last record are left out."""

    tokens_per_second: float
    """Tokens of all recorded intervals over their seconds."""

    threads: int
    """CPU threads of the training process."""

    chance: float | None
    """Share of right answers that guessing gets; None for text."""

    curve: tuple[tuple[int, float], ...]
    """(step, the study's metric) at each evaluation on held-out data during the run."""

    memory: dict[str, dict[str, float]]
    """By layer ("layer 0"), the last statistics of its memory; empty where the model has none."""

    probes: dict[str, ProbeResult]
    """By name, in the order of the suite; empty where the run failed."""

    environment: dict[str, Any]
    """When the training began: commit, hardware and versions, as tools.bench.record tells them."""

    failed: str | None = Field(default=None, min_length=1)
    """The error of a run that diverged: its loss or gradient was not finite. None for one that finished."""


def run_folder(output: Path, study: str, trial: str, seed: int) -> Path:
    """Where a run of the suite whose results are in `output` lies."""
    return output / study / trial / f"seed-{seed}"


def read_result(path: Path) -> Result:
    """A result file. Raises UserError naming one that cannot be read or is none."""
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: is no result of a trial{f': {place}' if place else ''}: {first['msg']}; remove it, and "
            "`python -m tools.trials run` makes it anew from the run's checkpoint"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and run the suite again") from error


def read_results(output: Path) -> list[Result]:
    """All results below a suite's folder, by path. Raises UserError for one that cannot be read, or lies elsewhere than
    it says.
    """
    results = []
    for path in sorted(output.glob(f"*/*/seed-*/{RESULT_FILE}")):
        result = read_result(path)
        place = run_folder(output, result.study, result.trial, result.seed)
        if path.parent != place:
            raise UserError(f"{path}: says that it is {place.relative_to(output)}'s; move it there, or remove it")
        results.append(result)
    return results


def write_result(folder: Path, result: Result) -> None:
    """Writes a run's result file, whole or not at all. Raises UserError where it cannot be written."""
    replace_text(folder / RESULT_FILE, result.model_dump_json(indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: after a crash it holds what it held before, or all of `text`. Raises UserError."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
