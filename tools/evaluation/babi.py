"""bAbI facts in book text, after BABILong (arXiv 2406.10149): the 20 tasks of bAbI (arXiv 1502.05698) at any length.

A story's facts stand in their order between the sentences of books; without an asked depth they lie all over the text,
as in BABILong, else together at that depth. The prompts are plain: the text, "Question:", "Answer:"; BABILong's own
have instructions for chat models, so numbers of those do not compare.
"""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from tools.encoding import Tokenizer
from tools.evaluation.answers import labels_of
from tools.evaluation.haystack import Haystack
from tools.evaluation.prompts import Prompt, compose, require_answer_room

TASKS = tuple(f"qa{number}" for number in range(1, 21))
ANSWER_TOKENS = 20
SUBSETS = ("en-10k", "en")
"""Of the published archive, the first that is there counts; their test parts are the same."""


@dataclass(frozen=True)
class Story:
    """Facts and a question about them."""

    facts: tuple[str, ...]
    question: str
    answer: str
    """One or several words, these with commas between."""


@dataclass(frozen=True)
class BabiTask:
    """A task's stories."""

    name: str
    stories: tuple[Story, ...]
    """Of the test part."""
    examples: tuple[Story, ...]
    """Of the training part, for few-shot prompts; none where it is missing."""
    labels: frozenset[str]
    """Every answer that occurs in the test part."""


def read_babi(name: str, place: Path, *, with_examples: bool) -> BabiTask:
    """A task of bAbI.

    Args:
        name: qa1 to qa20.
        place: the published archive (`tasks_1-20_v1-2`) as a folder or a .tar.gz, or a folder that holds one of them.

    Raises:
        UserError: nothing is there, or a line is not as published.
    """
    stories = tuple(_stories(*_text(place, name, "test")))
    examples = tuple(_stories(*_text(place, name, "train"))) if with_examples else ()
    return BabiTask(name, stories, examples, labels_of(story.answer for story in stories))


def babi_prompt(
    task: BabiTask,
    tokenizer: Tokenizer,
    haystack: Haystack,
    *,
    length: int,
    depth: float | None,
    sample: int,
    seed: int,
    num_fewshot: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """A prompt of a drawn story: the same for the same arguments; its `left_out` counts those that did not fit.

    Args:
        length: tokens of the prompt and `answer_tokens`.
        depth: where the facts stand together, 0 to 1; None: all over the text.
        num_fewshot: stories with their answers before the text.

    Raises:
        UserError: no drawn story fits, its answer does not fit, or there are too few examples.
    """
    draw = random.Random(f"{seed}/{task.name}/{length}/{depth}/{sample}")
    if len(task.examples) < num_fewshot:
        raise UserError(
            f"{task.name}: its training part has {len(task.examples)} stories, too few for --num-fewshot {num_fewshot}"
        )
    shown = "".join(
        f"{' '.join(story.facts)}{_question(story)} {story.answer}\n\n"
        for story in draw.sample(task.examples, num_fewshot)
    )
    error = None
    for left_out in range(100):  # stories differ in their length; most fit
        story = draw.choice(task.stories)
        depths = sorted(draw.random() if depth is None else depth for _ in story.facts)
        try:
            tokens, context, placed = compose(
                tokenizer,
                haystack,
                before=shown,
                facts=[(at, f" {fact}") for at, fact in zip(depths, story.facts, strict=True)],
                after=_question(story),
                length=length - answer_tokens,
                first_sentence=draw.randrange(len(haystack.starts)),
                name=f"{task.name} with {answer_tokens} tokens for the answer",
            )
        except UserError as too_long:
            error = too_long
            continue
        require_answer_room(tokenizer, (story.answer,), answer_tokens, task.name)
        answers = (story.answer,)
        return Prompt(task.name, length, depth, sample, tokens, context, placed, story.question, answers, left_out)
    assert error is not None
    raise error


def _question(story: Story) -> str:
    return f"\nQuestion: {story.question}\nAnswer:"


def _text(place: Path, name: str, part: str) -> tuple[str, str]:
    """Where a task's part is, and its text."""
    wanted = [re.compile(rf"(^|/){subset}/{name}_[^/]*_{part}\.txt$") for subset in SUBSETS]
    wanted.append(re.compile(rf"(^|/){name}_[^/]*_{part}\.txt$"))
    for archive in [place] if place.is_file() else sorted(place.glob("*.tar.gz")):
        try:
            with tarfile.open(archive) as tar:
                if (found := _first(tar.getnames(), wanted)) and (file := tar.extractfile(found)) is not None:
                    return f"{archive}: {found}", _decoded(file.read(), f"{archive}: {found}")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{archive}: cannot be read as .tar.gz: {error}; fetch it again") from None
    names = [path.as_posix() for path in sorted(place.rglob(f"{name}_*_{part}.txt"))] if place.is_dir() else []
    if found := _first(names, wanted):
        return found, _decoded(Path(found).read_bytes(), found)
    raise UserError(
        f"{place}: holds no {name}_*_{part}.txt, in a folder or a .tar.gz; --data names the folder with bAbI's archive "
        "tasks_1-20_v1-2 (facebook/babi_qa on the Hugging Face Hub says where it is)"
    )


def _first(names: list[str], wanted: list[re.Pattern[str]]) -> str | None:
    return next((name for pattern in wanted for name in names if pattern.search(name)), None)


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8 at byte {error.start}; fetch it again") from None


def _stories(place: str, text: str) -> Iterator[Story]:
    """A story for each question: the facts of its text before it."""
    facts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        index, _, rest = line.strip().partition(" ")
        if not index.isdigit() or not rest:
            raise UserError(f"{place}, line {number}: is {line[:60]!r}, not a number and a sentence; fetch it again")
        facts = [] if index == "1" else facts
        if "\t" in rest:
            question, answer, *_ = rest.split("\t")
            yield Story(tuple(facts), question.strip(), answer.strip())
        else:
            facts.append(rest.strip())
