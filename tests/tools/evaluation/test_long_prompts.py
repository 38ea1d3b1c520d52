"""Prompts have exactly the asked length, facts stand where they were asked for, and the text holds the answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from tests.tools.evaluation.evaluation_cases import STORIES, answer_by_reading
from tools.encoding import Tokenizer
from tools.evaluation.answers import names_answer, share_found
from tools.evaluation.babi import babi_prompt, read_babi
from tools.evaluation.haystack import NOISE, Haystack, encode_sentences, split_sentences
from tools.evaluation.needles import TASKS, needle_prompt
from tools.evaluation.prompts import Prompt

LENGTHS = (4096, 65_536, 1 << 20, 1 << 21)
DEPTHS = (0.0, 0.3, 1.0)


@pytest.fixture(scope="module")
def essays(book: Path, tokenizer: Tokenizer) -> Haystack:
    return encode_sentences(tokenizer, split_sentences([book.read_text()]), joint=" ", most=None)


@pytest.fixture(scope="module")
def noise(tokenizer: Tokenizer) -> Haystack:
    return encode_sentences(tokenizer, [NOISE], joint="\n", most=None)


def assert_right(prompt: Prompt, tokenizer: Tokenizer, haystack: Haystack, answer_tokens: int) -> None:
    """Exact length; each fact whole, at its depth within a sentence and the other facts; the question behind."""
    assert len(prompt.tokens) + answer_tokens == prompt.length
    assert prompt.tokens[0] == tokenizer.eos_id and tokenizer.eos_id not in prompt.tokens[1:]
    size = prompt.context.stop - prompt.context.start
    facts = sum(fact.stop - fact.start for fact in prompt.facts)
    sentence = int(np.diff([*haystack.starts, len(haystack.tokens)]).max())
    for fact in prompt.facts:
        assert tokenizer.decode(prompt.tokens[fact.start : fact.stop], begins=False).strip() == fact.text
        assert abs(fact.start - prompt.context.start - fact.depth * size) <= sentence + facts
    assert [fact.start for fact in prompt.facts] == sorted(fact.start for fact in prompt.facts)
    assert (
        tokenizer.decode(prompt.tokens[prompt.context.stop :], begins=False)
        .strip()
        .startswith(
            prompt.question.splitlines()[0] if prompt.task.startswith("niah") else f"Question: {prompt.question}"
        )
    )


@pytest.mark.parametrize("name", sorted(TASKS))
def test_needle_prompts_of_every_kind(name: str, tokenizer: Tokenizer, essays: Haystack, noise: Haystack) -> None:
    task = TASKS[name]
    haystack = {"noise": noise, "essays": essays, "needles": None}[task.haystack]
    options = {"length": 4096, "seed": 1, "answer_tokens": 100}
    for depth in DEPTHS:
        prompt = needle_prompt(name, tokenizer, haystack, depth=depth, sample=0, **options)
        text = tokenizer.decode(prompt.tokens)
        if haystack is not None:
            assert_right(prompt, tokenizer, haystack, 100)
        else:  # a distractor is as long as a needle
            longest = max(fact.stop - fact.start for fact in prompt.facts) + 60
            size = prompt.context.stop - prompt.context.start
            assert len(prompt.tokens) == 3996
            assert abs(prompt.facts[0].start - prompt.context.start - depth * size) <= 2 * longest
        first = next(fact for fact in prompt.facts if prompt.answers[0] in fact.text)
        assert first.depth == depth
        assert len(prompt.answers) == task.num_values * task.num_queries
        assert len(prompt.facts) == task.num_keys * task.num_values
        assert share_found(answer_by_reading(text), prompt.answers) == 1
        assert share_found("The special magic number is 0000000.", prompt.answers) == 0
        again = needle_prompt(name, tokenizer, haystack, depth=depth, sample=0, **options)
        assert np.array_equal(again.tokens, prompt.tokens)
        other = needle_prompt(name, tokenizer, haystack, depth=depth, sample=1, **options)
        assert other.answers != prompt.answers


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multiquery"])
def test_needle_prompts_of_every_length(
    name: str, length: int, tokenizer: Tokenizer, essays: Haystack, noise: Haystack
) -> None:
    haystack = noise if TASKS[name].haystack == "noise" else essays
    for depth in DEPTHS:
        prompt = needle_prompt(name, tokenizer, haystack, length=length, depth=depth, sample=2, seed=0)
        assert_right(prompt, tokenizer, haystack, 128)
        assert share_found(answer_by_reading(tokenizer.decode(prompt.tokens)), prompt.answers) == 1
        assert share_found("The special magic number is 0000000.", prompt.answers) == 0


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", [None, 0.4])
@pytest.mark.parametrize("name", sorted(STORIES))
def test_story_prompts_of_every_length(
    name: str, length: int, depth: float | None, stories: Path, tokenizer: Tokenizer, essays: Haystack
) -> None:
    task = read_babi(name, stories, with_examples=True)
    options = {"length": length, "depth": depth, "seed": 0, "num_fewshot": 1}
    prompt = babi_prompt(task, tokenizer, essays, sample=0, **options)
    assert_right(prompt, tokenizer, essays, 20)
    assert depth is None or {fact.depth for fact in prompt.facts} == {depth}
    story = next(story for story in task.stories if story.facts == tuple(fact.text for fact in prompt.facts))
    assert story.question == prompt.question
    read = answer_by_reading(tokenizer.decode(prompt.tokens))
    assert names_answer(read, prompt.answers[0], prompt.question, task.labels) == 1
    assert names_answer(" moon", prompt.answers[0], prompt.question, task.labels) == 0
    judged = [names_answer(f" {text}\n", prompt.answers[0], prompt.question, task.labels) for text in task.labels]
    assert sum(judged) == 1
    shown = tokenizer.decode(prompt.tokens[: prompt.context.start])
    assert shown.count("Question:") == 1 and shown.endswith("\n\n")
    assert np.array_equal(babi_prompt(task, tokenizer, essays, sample=0, **options).tokens, prompt.tokens)


def test_stories_are_read_as_published(stories: Path) -> None:
    task = read_babi("qa1", stories, with_examples=False)
    assert [len(story.facts) for story in task.stories] == [2, 4, 1]
    assert task.stories[1].facts == (
        "Mary went to the hall.", "John went to the office.", "Mary got the milk.", "Mary went to the office.",
    )  # fmt: skip
    assert [story.answer for story in task.stories] == ["hall", "office", "hall"]
    assert task.examples == () and task.labels == {"hall", "office"}


def test_what_does_not_fit_or_is_missing_is_refused(
    stories: Path, tmp_path: Path, tokenizer: Tokenizer, essays: Haystack
) -> None:
    with pytest.raises(UserError, match="niah_single_2 .*: 72 tokens are too few: the question and its facts"):
        needle_prompt("niah_single_2", tokenizer, essays, length=200, depth=0.5, sample=0, seed=0)
    task = read_babi("qa1", stories, with_examples=False)
    with pytest.raises(UserError, match="qa1 .* are too few: the question"):
        babi_prompt(task, tokenizer, essays, length=30, depth=None, sample=0, seed=0)
    with pytest.raises(UserError, match="has 0 stories, too few for --num-fewshot 1"):
        babi_prompt(task, tokenizer, essays, length=900, depth=None, sample=0, seed=0, num_fewshot=1)
    with pytest.raises(UserError, match=r"holds no qa2_\*_test.txt"):
        read_babi("qa2", stories, with_examples=False)
    with pytest.raises(UserError, match="holds no sentence"):
        encode_sentences(tokenizer, split_sentences(["  \n"]), joint=" ", most=10)
    for content, message in ((b"no number\n", "line 1: is 'no number'"), (b"1 \xff\n", "is not UTF-8 at byte 2")):
        (tmp_path / "qa1_x_test.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_babi("qa1", tmp_path, with_examples=False)
    (tmp_path / "babi.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"babi\.tar\.gz: cannot be read"):
        read_babi("qa1", tmp_path, with_examples=False)


def test_sentences_are_split_and_loop() -> None:
    sentences = list(split_sentences(['He  said:\n"No!" Then he went. Why?', "Next"]))
    assert sentences == ['He said: "No!"', "Then he went.", "Why?", "Next"]
    haystack = Haystack(np.arange(10, dtype=np.int32), np.array([0, 4, 7]))
    tokens, places = haystack.take(12, first=4)
    assert tokens.tolist() == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert places.tolist() == [0, 3, 6, 10, 12]
    tokens, places = haystack.take(0)
    assert tokens.tolist() == [] and places.tolist() == [0]
