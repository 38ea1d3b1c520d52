"""`tools.evaluate --ruler | --babi`: what a model finds again in long texts, by length and depth.

Prompts are drawn from the seed, each by itself: any rank makes any of them alike. Those of a task and length have one
length exactly, so they are read together without padding, in pieces with the state handed on. Ranks meet behind each
length, and what is answered is written then: the same command goes on from there (`unfinished.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parallel.process import World
from pretrain.errors import UserError
from tools.command import Progress
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.evaluation import babi, needles
from tools.evaluation.answers import any_found, names_answer, share_found
from tools.evaluation.completion import complete
from tools.evaluation.haystack import NOISE, Haystack, encode_sentences, split_sentences
from tools.evaluation.long_report import Answered, report, write
from tools.evaluation.names import listed
from tools.evaluation.prompts import Prompt
from tools.evaluation.ranks import Ranks
from tools.evaluation.unfinished import answered_before, model_digest
from tools.model_directory import LoadedModel, load_model_directory
from tools.result_files import is_special

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
    texts_sha256: str = ""
    """Digest of the texts that prompts are made of."""

    def settings(self) -> dict[str, Any]:
        """What its answers depend on, JSON-ready."""
        return {
            "name": self.name, "depths": list(self.depths), "answer_tokens": self.answer_tokens,
            "texts_sha256": self.texts_sha256,
        }  # fmt: skip


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluates, writes, draws and prints; with several ranks each does a share, and the first one reports."""
    world, lengths = ranks.world, sorted(set(arguments.lengths))
    with ranks.agreed():
        loaded = load_model_directory(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        limit = loaded.config.context_limit
        if limit is not None and lengths[-1] > limit:
            raise UserError(
                f"--lengths {lengths[-1]}: is longer than the transformer's context of {limit} tokens, the rows of its "
                "training; give shorter ones, or a model with a memory"
            )
        tasks = read_tasks(arguments, loaded.tokenizer, lengths[-1])
    settings, answered = {}, []
    with ranks.agreed():
        if world.is_main and _is_kept(arguments):
            settings = _settings(arguments, tasks, lengths)
            answered = _answered_before(arguments, settings)
    done = ranks.from_main({one.prompt["length"] for one in answered})
    missing = [length for length in lengths if length not in done]
    names, size = [task.name for task in tasks], arguments.batch_size or 8
    for share in ask(loaded, tasks, missing, arguments.samples, batch_size=size, world=world):
        parts = ranks.gather(share)
        missing = missing[1:]
        if world.is_main:
            answered += [one for part in parts for one in part]
            if missing and _is_kept(arguments):
                try:
                    write(arguments, names, answered, settings=settings, missing=missing, ranks=world.size)
                except UserError as error:  # hours may have gone into the answers, and more of them may find room
                    print(f"warning: unfinished results: {error}", file=sys.stderr)
    if world.is_main:
        report(arguments, names, answered, settings=settings, ranks=world.size)


def _is_kept(arguments: argparse.Namespace) -> bool:
    """Whether results are written to a file, and not handed to another program, which is told once."""
    return arguments.json is not None and not is_special(arguments.json)


def _settings(arguments: argparse.Namespace, tasks: Sequence[Task], lengths: Sequence[int]) -> dict[str, Any]:
    """What the answers depend on, JSON-ready."""
    return {
        "model_sha256": model_digest(arguments.model), "dtype": arguments.dtype, "seed": arguments.seed,
        "lengths": list(lengths), "samples": arguments.samples, "num_fewshot": arguments.num_fewshot,
        "fine_tuned": arguments.fine_tuned, "tasks": [task.settings() for task in tasks],
    }  # fmt: skip


def _answered_before(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> list[Answered]:
    """What an earlier call of the same command has left, which is said."""
    lengths = answered_before(arguments.json, settings)
    if lengths:
        print(
            f"going on from {arguments.json}, which has lengths {', '.join(f'{length:,}' for length in lengths)}",
            file=sys.stderr,
        )
    return [Answered.read(prompt) for prompts in lengths.values() for prompt in prompts]


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

    return Task(name, arguments.depths or NEEDLE_DEPTHS, answer_tokens, make, judge, texts_sha256=_digest(haystack))


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

    digest = _digest(haystack, repr((task.stories, task.examples)))
    return Task(name, arguments.depths or (None,), answer_tokens, make, judge, until=("\n",), texts_sha256=digest)


def _digest(haystack: Haystack | None, stories: str = "") -> str:
    digest = hashlib.sha256(stories.encode())
    if haystack is not None:
        for numbers in (haystack.tokens, haystack.starts):
            digest.update(numbers.tobytes())
    return digest.hexdigest()


def ask(
    loaded: LoadedModel, tasks: Sequence[Task], lengths: Sequence[int], samples: int, *, batch_size: int, world: World
) -> Iterator[list[Answered]]:
    """This rank's share of the prompts of each length in turn, answered."""
    shares = [
        list(_batches(tasks, [each], samples, batch_size, world.size))[world.rank :: world.size] for each in lengths
    ]
    total = sum(length * len(cells) for batches in shares for _, length, cells in batches)
    progress = Progress(total) if world.is_main else None
    done = 0
    for batches in shares:
        answered: list[Answered] = []
        for task, length, cells in batches:
            prompts = [task.make(length, depth, sample) for depth, sample in cells]
            tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts])).long()
            outputs = complete(loaded, tokens, max_new_tokens=task.answer_tokens, until=task.until)
            answered += [_answered(task, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
            done += length * len(cells)
            if progress is not None:
                progress.update(done, f"{task.name} at {length:,} tokens")
        yield answered
    if progress is not None:
        progress.close()


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
