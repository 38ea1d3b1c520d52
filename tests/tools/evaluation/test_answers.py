"""Answers are judged by the rules of RULER and of BABILong."""

from __future__ import annotations

import pytest

from tools.evaluation.answers import any_found, labels_of, names_answer, share_found

ROOMS = ("hall", "office", "garden")


@pytest.mark.parametrize(
    ("output", "all_of_them", "one"),
    [
        ("They are 12, 34 and 56.", 1.0, 1.0),
        ("12 and\x0056\x07", 2 / 3, 1.0),
        ("none", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_needles_are_sought_in_the_output(output: str, all_of_them: float, one: float) -> None:
    assert share_found(output, ("12", "34", "56")) == pytest.approx(all_of_them)
    assert any_found(output, ("12", "34", "56")) == one
    assert share_found("It is AB-c", ("ab-C",)) == 1


@pytest.mark.parametrize(
    ("output", "answer", "question", "labels", "right"),
    [
        (" Hall", "hall", "Where is Mary?", ROOMS, True),
        ("She is in the hall. Before it the office.", "hall", "Where is Mary?", ROOMS, True),
        ("hall or office", "hall", "Where is Mary?", ROOMS, False),
        ("office", "hall", "Where is Mary?", ROOMS, False),
        ("", "hall", "Where is Mary?", ROOMS, False),
        ("the hall, behind the garden", "hall", "Where was Mary before the garden?", ROOMS, True),
        ("hall Question: in the office?", "hall", "Where is Mary?", ROOMS, True),
        ("milk and apple", "apple,milk", "What has she?", ("apple", "milk", "nothing"), True),
        ("apple", "apple,milk", "What has she?", ("apple", "milk", "nothing"), False),
        ("none", "none", "How many?", ("none", "one", "two"), True),
        ("one", "none", "How many?", ("none", "one", "two"), False),
        ("n,w", "n,w", "How do you go from a to b?", ("n,w", "w,n", "s,s"), True),
    ],
)
def test_stories_answers_name_the_label_alone(output: str, answer: str, question: str, labels, right: bool) -> None:
    assert names_answer(output, answer, question, labels) == right


def test_labels_are_what_answers_are_made_of() -> None:
    assert labels_of(["apple,milk", "milk", "n,w", "nothing"]) == {"apple", "milk", "n,w", "nothing"}
