"""Needle tasks after RULER's definition (arXiv 2404.06654, appendix B): values of keys, hidden in a long text.

The templates, the kinds of keys and values and their numbers are RULER's. What is our own: lengths are exact; the asked
depth is that of the (first) needle that the question asks for, all others lie at drawn depths; keys differ from each
other; words are joined of a smaller list; essays are the files that are given.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tools.encoding import Tokenizer
from tools.evaluation.haystack import Haystack, encode_sentences
from tools.evaluation.prompts import Prompt, compose, require_answer_room

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ANSWER_TOKENS = 128
"""RULER's bound on an answer."""

_ADJECTIVES = (
    "able amber ancient angry blue bold brave brief bright broad calm careful cheap clean clear clever cold "
    "common cool crisp curious damp dark deep dry eager early easy empty faint fair famous fancy fast fierce "
    "fine firm flat fresh gentle glad golden good grand gray great green happy heavy hollow honest humble icy "
    "jolly keen kind large late lazy light lively long loud loyal lucky mellow mild modest narrow neat noble "
    "odd old pale plain polite proud quick quiet rapid rare red rich ripe rough round royal rusty sharp shy "
    "silent silver simple sleepy slow small smart smooth soft solid sour steady still stout strange strong "
    "sturdy sunny sweet swift tall tame tender thick thin tidy tiny tough true vast warm weary white wide wild "
    "wise witty wooden young"
).split()
_NOUNS = (
    "acorn anchor apple arrow badger bakery barn basket beacon beetle bell bench bottle bridge broom bucket "
    "button cabin camel candle canoe canyon carpet castle cellar chapel cherry chimney cloud coast comet "
    "copper corner cottage cradle crane curtain dagger desert donkey drum eagle engine falcon feather fence "
    "ferry fiddle forest fountain fox garden garlic gate glacier glove goose hammer harbor hawk hedge helmet "
    "heron hill honey island ivory jacket kettle ladder lagoon lantern lemon lizard lobster locket magnet "
    "maple marble market meadow melon mirror monkey mountain needle notebook oak ocean olive onion orchard "
    "otter oven owl paddle palace parrot pebble pepper pencil piano pigeon pillow planet pocket pond prairie "
    "puzzle quilt rabbit raven ribbon river robin rocket saddle salmon shadow shovel spider station stone swan "
    "table temple thunder tiger tower tractor tunnel turtle valley velvet village violin walnut wheel whistle "
    "willow window wizard"
).split()


@dataclass(frozen=True)
class NeedleTask:
    """What is hidden, in what, and what is asked for."""

    haystack: Literal["noise", "essays", "needles"]
    """`NOISE`, given texts, or needles of other keys."""
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    """Of each key."""
    num_queries: int = 1
    """Keys that the question asks for."""


TASKS = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essays"),
    "niah_single_3": NeedleTask("essays", value="uuids"),
    "niah_multikey_1": NeedleTask("essays", num_keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key="uuids", value="uuids"),
    "niah_multivalue": NeedleTask("essays", num_values=4),
    "niah_multiquery": NeedleTask("essays", num_keys=4, num_queries=4),
}


def needle_prompt(
    name: str,
    tokenizer: Tokenizer,
    haystack: Haystack | None,
    *,
    length: int,
    depth: float,
    sample: int,
    seed: int,
    answer_tokens: int = ANSWER_TOKENS,
) -> Prompt:
    """The prompt of a task of `TASKS`: the same for the same arguments.

    Args:
        haystack: noise or essays; None for tasks whose haystack is of needles.
        length: tokens of the prompt and `answer_tokens`.
        depth: of the first needle that is asked for, 0 to 1.

    Raises:
        UserError: `length` or `answer_tokens` is too short.
    """
    task, draw = TASKS[name], random.Random(f"{seed}/{name}/{length}/{depth}/{sample}")
    keys: list[str] = []
    while len(keys) < task.num_keys:
        if (key := _drawn(task.key, draw)) not in keys:
            keys.append(key)
    values = {key: [_drawn(task.value, draw) for _ in range(task.num_values)] for key in keys}
    asked = keys[: task.num_queries]
    needles = [NEEDLE.format(kind=task.value, key=key, value=value) for key in keys for value in values[key]]
    joint = " " if task.haystack == "essays" else "\n"
    # The first needle is the first value of the first key that is asked for.
    facts = [(depth if number == 0 else draw.random(), joint + needle) for number, needle in enumerate(needles)]
    if haystack is None:
        haystack = encode_sentences(tokenizer, _other_needles(task, keys, draw), joint=joint, most=length)
    before, after = _frame(task, asked)
    tokens, context, placed = compose(
        tokenizer,
        haystack,
        before=before,
        facts=facts,
        after=after,
        length=length - answer_tokens,
        first_sentence=draw.randrange(len(haystack.starts)),
        name=f"{name} with {answer_tokens} tokens for the answer",
    )
    answers = tuple(value for key in asked for value in values[key])
    require_answer_room(tokenizer, answers, answer_tokens, name)
    return Prompt(name, length, depth, sample, tokens, context, placed, after.strip(), answers)


def _frame(task: NeedleTask, asked: list[str]) -> tuple[str, str]:
    """What stands before and behind the text."""
    one = task.num_queries * task.num_values == 1
    kind = task.value.removesuffix("s") if one else task.value
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    some, is_are, what = ("A", "is", "What is the") if one else ("Some", "are", "What are all the")
    before = (
        f"{some} special magic {kind} {is_are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    subject = f"special magic {kind} for {query} mentioned in the provided text"
    return before, f"\n{what} {subject}? The {subject} {is_are}"


def _other_needles(task: NeedleTask, keys: list[str], draw: random.Random) -> Iterator[str]:
    while True:
        if (key := _drawn(task.key, draw)) not in keys:
            yield NEEDLE.format(kind=task.value, key=key, value=_drawn(task.value, draw))


def _drawn(kind: str, draw: random.Random) -> str:
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(_ADJECTIVES)}-{draw.choice(_NOUNS)}"
