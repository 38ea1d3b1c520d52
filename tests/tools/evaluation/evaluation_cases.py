"""Miniature benchmarks: records as their authors publish them, as llm-foundry prepares them, and stories of bAbI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "lambada": [{"text": f"the ki mo ta {word} re me so {word}"} for word in ("loka", "mino", "teri", "kasu", "rami")],
    "piqa": [
        {"goal": f"open {thing}", "sol1": f"turn the {thing}", "sol2": f"eat {thing} 4", "label": number % 2}
        for number, thing in enumerate(("door", "jar", "tin", "box", "book"))
    ],
    "hellaswag": [
        {
            "activity_label": "Making tea",
            "ctx_a": "A man [header] stands  there.",
            "ctx_b": "he pours",
            "endings": ["water [title] and drinks", "sand", "a cat [x] in", "nothing."],
            "label": str(number),
        }
        for number in range(4)
    ],
    "winogrande": [
        {
            "sentence": "Ann met Eve because _ was late.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": str(1 + number % 2),
        }
        for number in range(3)
    ],
    "arc_easy": [
        {
            "question": f"What is {number}?",
            "choices": {"text": ["a stone", "a tree", "rain"], "label": ["1", "2", "3"]},
            "answerKey": str(number),
        }
        for number in (1, 2, 3)
    ],
    "siqa": [
        {
            "context": "Kim ran.",
            "question": "Why?",
            "answerA": "for fun",
            "answerB": "to win",
            "answerC": "no reason",
            "label": str(number),
        }
        for number in (1, 2, 3)
    ],
    "boolq": [{"passage": "Tea is hot.", "question": "is tea hot", "label": number % 2} for number in range(3)],
    "commonsense_qa": [
        {
            "question": " Where is tea? ",
            "choices": {"label": list("ABCDE"), "text": ["cup", "sky", "sea", "hat", "log"]},
            "answerKey": key,
        }
        for key in "ADE"
    ],
    "wikitext": [
        {"page": f" = Tea = \n Tea is ki mo ta , a mo @-@ re . {'la ki ' * number}\n"} for number in (3, 5, 9)
    ],
}
PUBLISHED["arc_challenge"] = PUBLISHED["arc_easy"][:2]
LM_EVAL_NAMES = {
    "lambada": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "siqa": "siqa/siqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
"""Where lm-eval has its own form of each task."""

PREPARED: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [{"context": "the ki mo ta loka re me so", "continuation": "loka"}],
    "piqa": [{"query": "Question: open door\n", "choices": ["turn the door", "eat door 4"], "gold": 0}],
    "winogrande": [
        {
            "context_options": ["Ann met Eve because Ann", "Ann met Eve because Eve"],
            "continuation": "was late.",
            "gold": 0,
        }
    ],
    "arc_easy": [{"query": "Question: What is 1?", "choices": ["a stone", "a tree", "rain"], "gold": 0}],
    "boolq": [{"query": "Passage: Tea is hot.\nQuestion: is tea hot?", "choices": ["no", "yes"], "gold": 0}],
}
"""The first of the published records, as llm-foundry writes it."""

STORIES = {
    "qa1": "1 Mary went to the hall.\n2 John went to the office.\n3 Where is Mary? \thall\t1\n4 Mary got the milk.\n"
    "5 Mary went to the office.\n6 Where is Mary? \toffice\t5\n1 John went to the hall.\n2 Where is John? \thall\t1\n",
    "qa7": "1 Mary got the milk.\n2 How many objects is Mary carrying? \tone\t1\n3 Mary dropped the milk.\n"
    "4 How many objects is Mary carrying? \tnone\t1 3\n",
}


def answer_by_reading(text: str) -> str:
    """An oracle: the answer to the question that a prompt's text ends with, by what stands in the text."""
    if "\nQuestion: " not in text:
        asked = text.rsplit("?", 1)[0].rsplit("\n", 1)[1]
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        return " ".join(value for key, value in found if re.search(rf"\b{re.escape(key)}\b", asked))
    text = text.rsplit("\n\n", 1)[-1]  # examples before it have their own answers
    if "How many" in text:
        return " none." if "Mary dropped" in text else " one."
    name = text.rsplit("Where is ", 1)[1].split("?")[0]
    return " " + re.findall(rf"{name} went to the (\w+)\.", text)[-1]


def write_published(folder: Path) -> Path:
    """A file for each task of `PUBLISHED`."""
    return write_records(folder, PUBLISHED)


def write_records(folder: Path, records: dict[str, list[dict[str, Any]]]) -> Path:
    """A jsonl file for each list of records."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_babi(folder: Path) -> Path:
    """bAbI's folders with `STORIES`, as test and as training parts."""
    inner = folder / "tasks_1-20_v1-2" / "en"
    inner.mkdir(parents=True)
    for name, text in STORIES.items():
        for part in ("test", "train"):
            (inner / f"{name}_some-kind_{part}.txt").write_text(text)
    return folder
