"""How answers to long prompts are judged: by the rules of RULER and of BABILong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
_MANY = 3
"""An answer with commas that is longer names several labels; a shorter one is a way, such as "n,w"."""


def share_found(output: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of answers that occur in the output, whatever their case."""
    text = _CONTROL.sub("\n", output.strip()).strip().lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def any_found(output: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: 1 if one of the answers occurs in the output."""
    text = _CONTROL.sub("\n", output.strip()).strip().lower()
    return float(any(answer.lower() in text for answer in answers))


def names_answer(output: str, answer: str, question: str, labels: Iterable[str]) -> float:
    """BABILong's rule: 1 if of a task's labels the output's first sentence names the answer's, and no others.

    Labels that the question names do not count. Where one label lies in another ("one" in "none") they are sought as
    whole words, without which BABILong's rule calls a right "none" wrong.
    """
    text = re.split(r"\.|<context>|<example>|question", output.lower())[0]
    known = {label.lower() for label in labels}
    whole = any(a != b and a in b for a in known for b in known)
    asked, target = question.lower(), answer.lower()
    found = {label for label in known if _mentions(text, label, whole) and not _mentions(asked, label, whole)}
    return float(found == _parts(target))


def labels_of(answers: Iterable[str]) -> frozenset[str]:
    """The labels that answers are made of."""
    return frozenset(label for answer in answers for label in _parts(answer))


def _parts(answer: str) -> set[str]:
    return set(answer.split(",")) if "," in answer and len(answer) > _MANY else {answer}


def _mentions(text: str, label: str, whole: bool) -> bool:
    return re.search(rf"\b{re.escape(label)}\b", text) is not None if whole else label in text
