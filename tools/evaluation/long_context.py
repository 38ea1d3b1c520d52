"""`tools.evaluate --ruler | --babi`: what a model finds again in long texts, by length and depth.

Prompts are drawn from the seed, each by itself: any rank makes any of them alike. Those of a task and length have one
length exactly, so they are read together without padding, in pieces with the state handed on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from parallel.process import World, gather_objects
from pretrain.errors import UserError
from tools.command import Progress
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.evaluation import babi, needles
from tools.evaluation.answers import any_found, names_answer, share_found
from tools.evaluation.completion import complete
from tools.evaluation.haystack import NOISE, Haystack, encode_sentences, split_sentences
from tools.evaluation.heat_map import draw_heat_map
from tools.evaluation.names import listed
from tools.evaluation.prompts import Prompt
from tools.evaluation.ranks import join
from tools.evaluation.results import setting_name, tensorboard_scalars, write_results
from tools.model_directory import NOT_FINITE, LoadedModel, load_model_directory

NEEDLE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of needles where none are asked for."""


@dataclass(frozen=True)
class Task:
    """How prompts of a task are made, and answers to them judged."""

    name: str
    depths: tuple[float | None, ...]
    answer_tokens: int
    make: Callable[[int, float | None, int], Prompt]
    """From a length, a depth and a sample's number."""
    judge: Callable[[Prompt, str], dict[str, float]]
    """From a prompt and the output: `score`, and `any` where several answers are asked for."""
    until: tuple[str, ...] = ()
    """Texts that end an answer."""


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


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, writes, draws and prints; with several ranks each does a share, and the first one reports."""
    world = join(arguments.device)
    loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    lengths = sorted(set(arguments.lengths))
    limit = loaded.config.context_limit
    if limit is not None and lengths[-1] > limit:
        raise UserError(
            f"--lengths {lengths[-1]}: is longer than the transformer's context of {limit} tokens, the rows of its "
            "training; give shorter ones, or a model with a memory"
        )
    tasks = read_tasks(arguments, loaded.tokenizer, lengths[-1])
    answered = ask(loaded, tasks, lengths, arguments.samples, batch_size=arguments.batch_size or 8, world=world)
    if world.size > 1:
        answered = [one for part in gather_objects(answered) for one in part]
    if world.is_main:
        _report(arguments, tasks, answered, world)


def read_tasks(arguments: argparse.Namespace, tokenizer: Tokenizer, longest: int) -> list[Task]:
    """The tasks that the options ask for; raises UserError for an unknown one, and for files that are missing."""
    ruler = listed(arguments.ruler, tuple(needles.TASKS), "--ruler") if arguments.ruler else []
    stories = listed(arguments.babi, babi.TASKS, "--babi") if arguments.babi else []
    essays = None
    if stories or any(needles.TASKS[name].haystack == "essays" for name in ruler):
        essays = _essays(arguments, tokenizer, longest)
    elif arguments.haystack is not None:
        raise UserError("--haystack: no task that was asked for reads it; drop it")
    noise = encode_sentences(tokenizer, [NOISE], joint="\n", most=None)
    kinds = {"noise": noise, "essays": essays, "needles": None}
    tasks = [_needle_task(name, tokenizer, kinds[needles.TASKS[name].haystack], arguments) for name in ruler]
    return tasks + [_babi_task(name, tokenizer, essays, arguments) for name in stories]


def _essays(arguments: argparse.Namespace, tokenizer: Tokenizer, longest: int) -> Haystack:
    if arguments.haystack is None:
        raise UserError(
            "--haystack is missing: the facts of --babi and of needle tasks other than niah_single_1, niah_multikey_2 "
            "and niah_multikey_3 lie in essays or books; give files of text (.txt, .md, .jsonl, .jsonl.gz, .parquet)"
        )
    reader = DocumentReader(arguments.haystack)
    texts = (document.text for document in reader)
    return encode_sentences(tokenizer, split_sentences(texts), joint=" ", most=longest)


def _needle_task(name: str, tokenizer: Tokenizer, haystack: Haystack | None, arguments: argparse.Namespace) -> Task:
    answer_tokens = arguments.answer_tokens or needles.ANSWER_TOKENS

    def make(length: int, depth: float | None, sample: int) -> Prompt:
        return needles.needle_prompt(
            name, tokenizer, haystack,
            length=length, depth=depth, sample=sample, seed=arguments.seed, answer_tokens=answer_tokens,
        )  # fmt: skip

    def judge(prompt: Prompt, output: str) -> dict[str, float]:
        return {"score": share_found(output, prompt.answers), "any": any_found(output, prompt.answers)}

    return Task(name, arguments.depths or NEEDLE_DEPTHS, answer_tokens, make, judge)


def _babi_task(name: str, tokenizer: Tokenizer, haystack: Haystack, arguments: argparse.Namespace) -> Task:
    shots, answer_tokens = arguments.num_fewshot, arguments.answer_tokens or babi.ANSWER_TOKENS
    task = babi.read_babi(name, arguments.data, with_examples=shots > 0)

    def make(length: int, depth: float | None, sample: int) -> Prompt:
        return babi.babi_prompt(
            task, tokenizer, haystack,
            length=length, depth=depth, sample=sample, seed=arguments.seed, num_fewshot=shots,
            answer_tokens=answer_tokens,
        )  # fmt: skip

    def judge(prompt: Prompt, output: str) -> dict[str, float]:
        return {"score": names_answer(output, prompt.answers[0], prompt.question, task.labels)}

    return Task(name, arguments.depths or (None,), answer_tokens, make, judge, until=("\n",))


def ask(
    loaded: LoadedModel, tasks: Sequence[Task], lengths: Sequence[int], samples: int, *, batch_size: int, world: World
) -> list[Answered]:
    """This rank's share of all prompts, answered."""
    batches = list(_batches(tasks, lengths, samples, batch_size, world.size))[world.rank :: world.size]
    progress = Progress(sum(length * len(cells) for _, length, cells in batches)) if world.is_main else None
    answered: list[Answered] = []
    done = 0
    for task, length, cells in batches:
        prompts = [task.make(length, depth, sample) for depth, sample in cells]
        tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).long()
        outputs = complete(loaded, tokens, max_new_tokens=task.answer_tokens, until=task.until)
        answered += [_answered(task, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        done += length * len(cells)
        if progress is not None:
            progress.update(done, f"{task.name} at {length:,} tokens")
    if progress is not None:
        progress.close()
    return answered


def _answered(task: Task, prompt: Prompt, output: str | None) -> Answered:
    if output is not None:
        return Answered(prompt.fields(), output, task.judge(prompt, output))
    return Answered(prompt.fields(), None, dict.fromkeys(task.judge(prompt, ""), math.nan))


def _batches(
    tasks: Sequence[Task], lengths: Sequence[int], samples: int, batch_size: int, ranks: int
) -> Iterator[tuple[Task, int, list[tuple[float | None, int]]]]:
    """(task, length, [(depth, sample)]), the short ones first: an error of a long one costs least then.

    Batches are smaller than `batch_size` where some ranks would have none of a task and length.
    """
    for length in lengths:
        for task in tasks:
            cells = [(depth, sample) for depth in task.depths for sample in range(samples)]
            size = min(batch_size, -(-len(cells) // ranks))
            for start in range(0, len(cells), size):
                yield task, length, cells[start : start + size]


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


def _report(arguments: argparse.Namespace, tasks: Sequence[Task], answered: list[Answered], world: World) -> None:
    def setting(name: str) -> str:
        return setting_name(arguments.num_fewshot if name in babi.TASKS else 0, arguments.fine_tuned)

    cells = cells_of(answered, setting)
    order = [task.name for task in tasks]
    cells.sort(key=lambda cell: order.index(cell["task"]))
    by_length: dict[str, dict[int, float]] = {}
    for name in order:
        for length in sorted({cell["length"] for cell in cells}):
            found = [cell for cell in cells if (cell["task"], cell["length"]) == (name, length)]
            total = sum(cell["samples"] for cell in found)
            by_length.setdefault(name, {})[length] = sum(cell["score"] * cell["samples"] for cell in found) / total
    left_out = sum(one.prompt["left_out"] for one in answered)
    prompts = sorted(answered, key=lambda one: (one.prompt["task"], one.prompt["length"], one.prompt["depth"] or 0.0))
    write_results(
        arguments,
        {
            "seed": arguments.seed, "dtype": arguments.dtype, "ranks": world.size,
            "haystack": None if arguments.haystack is None else [str(path) for path in arguments.haystack],
            "left_out": left_out, "cells": cells, "prompts": [one.fields() for one in prompts],
        },
    )  # fmt: skip
    scalars = {
        f"{name}/{length} ({setting(name)})": score
        for name, scores in by_length.items()
        for length, score in scores.items()
        if math.isfinite(score)
    }
    if arguments.plot is not None:
        draw_heat_map(arguments.plot, cells, title=str(arguments.model))
    tensorboard_scalars(arguments, "long_context", scalars)
    if lost := sum(one.output is None for one in answered):
        print(f"warning: {lost:,} of {len(answered):,} prompts: logits are not finite: {NOT_FINITE}", file=sys.stderr)
    if left_out:
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
