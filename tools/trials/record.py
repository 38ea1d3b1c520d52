"""The results of a suite in one file: read, written, and asked for what tables and plots show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.errors import UserError
from tools.trials.results import SUITE_FILE, Result, read_results, replace_text, run_folder

FORMAT = "mnemosyne-trials"
Metric = Literal["accuracy", "loss"]


class StudyRecord(BaseModel):
    """What a report says of a study beside its results."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    """What the study asks."""

    metric: Metric
    """What its table and its plots show."""

    sequence_length: int = Field(ge=1)
    """Tokens in a row of training."""

    trials: tuple[str, ...]
    """Names, in the order of the suite."""

    seeds: tuple[int, ...]
    """Seeds of every trial."""

    probes: tuple[str, ...]
    """Names, in the order of the suite."""

    beside: tuple[str, ...] = ()
    """Trials of other studies, `study/trial`, that its table and plots begin with."""


class Record(BaseModel):
    """All results of a suite, and what was to be run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["mnemosyne-trials"] = FORMAT
    """Tells the file from others."""

    version: Literal[1] = 1
    """Of the format."""

    command: str
    """The last call that ran some of it."""

    seconds: float | None = Field(default=None, ge=0)
    """Wall seconds of all calls, what was run again or replaced included; None where unknown."""

    expected: dict[str, str] = {}
    """`recipe_sha256` of a run's result, by `study/trial/seed-n`; a result with another is of an older suite."""

    studies: dict[str, StudyRecord]
    """By name, in the order of the suite."""

    results: tuple[Result, ...] = ()
    """One per run that finished or diverged."""

    @model_validator(mode="after")
    def _every_result_is_one_of_a_study(self) -> Record:
        """Refuses results that no table would show, and two of one run."""
        seen = set()
        for result in self.results:
            run = _path(result.study, result.trial, result.seed)
            if not self.has(result):
                raise ValueError(f"the result {run} is not one of the studies' runs")
            if run in seen:
                raise ValueError(f"{run} has two results")
            seen.add(run)
        return self

    def has(self, result: Result) -> bool:
        """Whether a result is of one of the studies' runs, as the suite has them now."""
        study = self.studies.get(result.study)
        if study is None or result.trial not in study.trials or result.seed not in study.seeds:
            return False
        run = _path(result.study, result.trial, result.seed)
        return self.expected.get(run, result.recipe_sha256) == result.recipe_sha256

    def of_study(self, name: str) -> StudyResults:
        """The results of one study, those of the trials beside it first, which are called `study/trial` there."""
        study = self.studies[name]
        shown = study.model_copy(update={"trials": (*study.beside, *study.trials)})
        lent = [
            result.model_copy(update={"study": name, "trial": path})
            for result in self.results
            if (path := f"{result.study}/{result.trial}") in study.beside and result.seed in study.seeds
        ]
        return StudyResults(shown, (*lent, *(result for result in self.results if result.study == name)))

    def missing(self) -> list[str]:
        """`study/trial/seed-n` of every run without a result."""
        return [
            _path(name, trial, seed)
            for name, study in self.studies.items()
            for trial in study.trials
            for seed in self.of_study(name).missing(trial)
        ]


@dataclass(frozen=True)
class Spread:
    """Values of several seeds: their mean, the smallest, the largest, and how many there are."""

    mean: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of one or more values."""
    return Spread(sum(values) / len(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class StudyResults:
    """A study and the results that there are; each run finished, diverged, or is missing."""

    study: StudyRecord
    results: tuple[Result, ...]

    def finished(self, trial: str) -> list[Result]:
        """Results of a trial's seeds that were trained to the end, by seed."""
        return self._of(trial, failed=False)

    def diverged(self, trial: str) -> list[Result]:
        """Results of a trial's seeds whose loss was no number any more, by seed."""
        return self._of(trial, failed=True)

    def missing(self, trial: str) -> list[int]:
        """Seeds of a trial without a result."""
        known = {result.seed for result in self.results if result.trial == trial}
        return [seed for seed in self.study.seeds if seed not in known]

    def lacking(self, trial: str) -> str:
        """How many of a trial's runs diverged and are missing, in words; empty where none."""
        counts = {"diverged": len(self.diverged(trial)), "missing": len(self.missing(trial))}
        return ", ".join(f"{number} {what}" for what, number in counts.items() if number)

    def probe_values(self, trial: str, probe: str, measure: str | None = None) -> dict[int, float]:
        """A field of a probe's result, the study's metric if none is named, by seed, of the seeds that have it; values
        that are no number are left out.
        """
        found = {}
        for result in self.finished(trial):
            if probe in result.probes:
                value = getattr(result.probes[probe], measure or self.study.metric)
                if value is not None and math.isfinite(value):
                    found[result.seed] = value
        return found

    @property
    def chance(self) -> float | None:
        """The share of right answers that guessing gets; None for text, and without results."""
        return next((result.chance for result in self.results if result.chance is not None), None)

    def _of(self, trial: str, *, failed: bool) -> list[Result]:
        """Results of a trial, those that failed or those that did not, by seed."""
        found = (result for result in self.results if result.trial == trial and (result.failed is not None) == failed)
        return sorted(found, key=lambda result: result.seed)


def finite_curve(result: Result) -> list[tuple[int, float]]:
    """(step, metric) up to the first value that is no number."""
    points = []
    for step, value in result.curve:
        if not math.isfinite(value):
            break
        points.append((step, value))
    return points


def common_curve(results: Sequence[Result]) -> list[tuple[int, Spread]]:
    """(step, spread over the seeds) at the steps that every one of `results` has."""
    curves = [dict(finite_curve(result)) for result in results]
    if not curves:
        return []
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, spread([curve[step] for curve in curves])) for step in shared]


def by_position(results: Iterable[Result], probe: str) -> list[tuple[float, Spread]]:
    """(middle of the positions, counted from 1; spread of the loss over the seeds) of each bucket that a probe has."""
    losses: dict[float, list[float]] = {}
    for result in results:
        buckets = result.probes[probe].by_position if probe in result.probes else None
        for bucket in buckets or ():
            if math.isfinite(bucket.loss):
                losses.setdefault((bucket.first + bucket.last) / 2 + 1, []).append(bucket.loss)
    return [(middle, spread(values)) for middle, values in sorted(losses.items())]


def read_record(path: Path) -> Record:
    """A file that `write_record` wrote. Raises UserError for one that cannot be read or is no such record."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); make it anew") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f"{path}: is no record of trials; make one with `python -m tools.trials report --record FILE`")
    environment, results = fields.pop("environment", None), fields.get("results")
    for result in results if isinstance(results, list) else ():
        if isinstance(result, dict):
            result.setdefault("environment", environment)
    try:
        return Record.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise UserError(f"{path}: is damaged or of another version: {message}; make it anew") from error


def gather(output: Path) -> tuple[Record, list[str]]:
    """The record of a suite's folder, and `study/trial/seed-n` of results there that are not of the suite, or of an
    older one, which the record leaves out. Raises UserError where no suite was run, and for a file that cannot be read.
    """
    suite = output / SUITE_FILE
    if not suite.is_file():
        raise UserError(f"{output}: holds no trials ({SUITE_FILE} is missing); run `python -m tools.trials run` first")
    planned = read_record(suite)
    found = read_results(output)
    results = tuple(result for result in found if planned.has(result))
    others = [_path(result.study, result.trial, result.seed) for result in found if not planned.has(result)]
    return planned.model_copy(update={"results": results}), others


def write_record(record: Record, path: Path) -> None:
    """Writes the record as JSON with a line per result, so that two records can be compared line by line.

    The environment stands once, and beside the results that have another. Raises UserError where it cannot be written.
    """
    fields: dict[str, Any] = record.model_dump(mode="json", exclude={"results"})
    results = [result.model_dump(mode="json") for result in record.results]
    shared = results[0]["environment"] if results else None
    for result in results:
        if result["environment"] == shared:
            del result["environment"]
    head = json.dumps({**fields, "environment": shared}, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(result, separators=(",", ":")) for result in results)
    replace_text(path, f'{head},\n "results": [\n{lines}\n ]\n}}\n')


def _path(study: str, trial: str, seed: int) -> str:
    """A run as its folder is called."""
    return run_folder(Path(), study, trial, seed).as_posix()
