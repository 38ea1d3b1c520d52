"""What is told of long contexts: scores by task, length and depth, as a file, a picture, scalars and a table."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.errors import UserError
from tools.evaluation import babi
from tools.evaluation.heat_map import draw_heat_map
from tools.evaluation.results import setting_name, tensorboard_scalars, write_results
from tools.model_directory import NOT_FINITE

_METRICS = "score", "any"


@dataclass(frozen=True)
class Answered:
    """A prompt that was answered."""

    prompt: dict[str, Any]
    """`Prompt.fields`."""
    output: str | None
    """None where the model's logits were no finite numbers; scores are nan then: no answer is not a wrong one."""
    scores: dict[str, float]

    def fields(self) -> dict[str, Any]:
        """JSON-ready, but for nan."""
        return {**self.prompt, "output": self.output, **self.scores}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Answered:
        """From what `fields` became in a file, null for nan."""
        scores = {name: math.nan if fields[name] is None else fields[name] for name in _METRICS if name in fields}
        prompt = {name: value for name, value in fields.items() if name not in (*_METRICS, "output")}
        return cls(prompt, fields["output"], scores)


def cells_of(answered: Sequence[Answered], setting: Callable[[str], str]) -> list[dict[str, Any]]:
    """Means over the samples of each task, length and depth, with their standard errors; nan where one has no answer.

    Args:
        setting: from a task's name to the name of how it was asked.
    """
    grouped: dict[tuple[str, int, float | None], list[dict[str, float]]] = {}
    for one in answered:
        place = one.prompt["task"], one.prompt["length"], one.prompt["depth"]
        grouped.setdefault(place, []).append(one.scores)
    cells = []
    for (task, length, depth), scores in grouped.items():
        cell = {"task": task, "setting": setting(task), "length": length, "depth": depth, "samples": len(scores)}
        for metric in scores[0]:
            values = [score[metric] for score in scores]
            cell[metric] = math.fsum(values) / len(values)
        values = [score["score"] for score in scores]
        spread = math.fsum((value - cell["score"]) ** 2 for value in values)
        cell["stderr"] = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else None
        cells.append(cell)
    return sorted(cells, key=lambda cell: (cell["task"], cell["length"], cell["depth"] or 0.0))


def _setting(arguments: argparse.Namespace, name: str) -> str:
    """How a task was asked."""
    return setting_name(arguments.num_fewshot if name in babi.TASKS else 0, arguments.fine_tuned)


def write(
    arguments: argparse.Namespace,
    names: Sequence[str],
    answered: Sequence[Answered],
    *,
    settings: Mapping[str, Any],
    missing: Sequence[int],
    ranks: int,
) -> None:
    """Writes --json, if that was asked for; `missing`: the lengths that are yet to be asked."""
    places = ("task", "length", "depth", "sample")
    prompts = sorted(answered, key=lambda one: [one.prompt[name] or 0 for name in places])
    write_results(
        arguments,
        {
            "finished": not missing, "missing_lengths": list(missing), "settings": settings,
            "seed": arguments.seed, "dtype": arguments.dtype, "ranks": ranks,
            "haystack": None if arguments.haystack is None else [str(path) for path in arguments.haystack],
            "left_out": sum(one.prompt["left_out"] for one in answered),
            "cells": _cells(arguments, names, answered), "prompts": [one.fields() for one in prompts],
        },
    )  # fmt: skip


def _cells(arguments: argparse.Namespace, names: Sequence[str], answered: Sequence[Answered]) -> list[dict[str, Any]]:
    cells = cells_of(answered, partial(_setting, arguments))
    return sorted(cells, key=lambda cell: names.index(cell["task"]))


def report(
    arguments: argparse.Namespace,
    names: Sequence[str],
    answered: Sequence[Answered],
    *,
    settings: Mapping[str, Any],
    ranks: int,
) -> None:
    """Writes, draws and prints what all lengths came to. What cannot be written or drawn is printed all the same, as
    hours may have gone into it, and then a UserError raised.
    """
    setting = partial(_setting, arguments)
    cells = _cells(arguments, names, answered)
    by_length: dict[str, dict[int, float]] = {}
    for name in names:
        for length in sorted({cell["length"] for cell in cells}):
            found = [cell for cell in cells if (cell["task"], cell["length"]) == (name, length)]
            total = sum(cell["samples"] for cell in found)
            by_length.setdefault(name, {})[length] = sum(cell["score"] * cell["samples"] for cell in found) / total
    scalars = {
        f"{name}/{length} ({setting(name)})": score
        for name, scores in by_length.items()
        for length, score in scores.items()
        if math.isfinite(score)
    }
    failure: UserError | None = None
    try:
        write(arguments, names, answered, settings=settings, missing=(), ranks=ranks)
        if arguments.plot is not None:
            draw_heat_map(arguments.plot, cells, title=str(arguments.model))
        tensorboard_scalars(arguments, "long_context", scalars)
    except UserError as error:
        failure = error
    try:
        _tell(answered, by_length, setting)
    finally:  # also where nobody reads the table any more
        if failure is not None:
            raise failure


def _tell(answered: Sequence[Answered], by_length: dict[str, dict[int, float]], setting: Callable[[str], str]) -> None:
    if lost := sum(one.output is None for one in answered):
        print(f"warning: {lost:,} of {len(answered):,} prompts: logits are not finite: {NOT_FINITE}", file=sys.stderr)
    if left_out := sum(one.prompt["left_out"] for one in answered):
        print(
            f"warning: {left_out:,} drawn stories do not fit their length and were left out: the scores are of shorter "
            "ones; give greater --lengths",
            file=sys.stderr,
        )
    _print(by_length, setting)  # last: whoever reads it may have gone


def _print(by_length: dict[str, dict[int, float]], setting: Callable[[str], str]) -> None:
    lengths = list(next(iter(by_length.values())))
    table = Table("task", "setting", *(f"{length:,}" for length in lengths), title="score by tokens of the prompt, %")
    for name, scores in by_length.items():
        table.add_row(name, setting(name), *(_percent(scores[length]) for length in lengths))
    Console(width=max(100, Console().width)).print(table)


def _percent(score: float) -> str:
    return f"{100 * score:.1f}" if math.isfinite(score) else "not finite"
