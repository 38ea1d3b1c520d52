"""The downstream tasks' data: local files, either as their authors publish them or with prompts made before.

Every record becomes what lm-eval would make of the published one: the same prompt, choices and answer. Files with
prompts made before (those of llm-foundry) give the same too, but for siqa and commonsense_qa, whose files ask for a
letter: `TaskData.prompt` says which it was, and results carry it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from tools.command import read_text

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")
LIKE_LM_EVAL, LETTERS, UNKNOWN_WORDS = "as in lm-eval", "letters", "with <unk>"
_HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """One way in which a task's records are written."""

    fields: tuple[str, ...]
    """What a record must have, by which the form is known."""
    read: Callable[[Record], Record]
    """From a record to a document of the task's kind; raises KeyError, ValueError, TypeError or IndexError."""
    prompt: str = LIKE_LM_EVAL
    """What the prompts are."""


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's records come from."""

    names: tuple[str, ...]
    """File names without suffix, the first that exists counts."""
    forms: tuple[Form, ...]
    source: str
    """Where the records are published."""


@dataclass(frozen=True)
class TaskData:
    """A task's documents, in the fields of its kind (`tools.evaluation.tasks`)."""

    path: Path
    documents: list[Record]
    prompt: str
    """`LIKE_LM_EVAL`, `LETTERS`, or `UNKNOWN_WORDS`: of these published numbers are of the first alone."""
    examples: list[Record] | None = None
    """Those of the training part, for few-shot prompts; None where it has no file."""


def _choices(query: str, choices: list[str], gold: int) -> Record:
    if not 0 <= gold < len(choices):
        raise ValueError(f"the answer is number {gold} of {len(choices)} choices")
    return {"query": query, "choices": [str(choice) for choice in choices], "gold": gold}


def _prepared(change: Callable[[str], str]) -> Callable[[Record], Record]:
    return lambda record: _choices(change(record["query"]), record["choices"], int(record["gold"]))


def _with_answer(query: str) -> str:
    return query.rstrip("\n") + "\nAnswer:"


def _piqa(record: Record) -> Record:
    return _choices(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"]))


def _hellaswag(record: Record) -> Record:
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _choices(preprocess(context), [preprocess(ending) for ending in record["endings"]], int(record["label"]))


def _winogrande(record: Record) -> Record:
    before, _, after = record["sentence"].partition("_")
    contexts = [before + record["option1"], before + record["option2"]]
    return _contexts(contexts, after.strip(), int(record["answer"]) - 1)


def _contexts(contexts: list[str], continuation: str, gold: int) -> Record:
    if not 0 <= gold < len(contexts):
        raise ValueError(f"the answer is number {gold} of {len(contexts)} contexts")
    return {"contexts": contexts, "continuation": continuation, "gold": gold}


def _arc(record: Record) -> Record:
    choices = record["choices"]
    query = f"Question: {record['question']}\nAnswer:"
    return _choices(query, choices["text"], choices["label"].index(record["answerKey"]))


def _siqa(record: Record) -> Record:
    answers = [record[f"answer{letter}"] for letter in "ABC"]
    return _choices(f"Q: {record['context']} {record['question']}\nA:", answers, int(record["label"]) - 1)


def _boolq(record: Record) -> Record:
    query = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _choices(query, ["no", "yes"], int(record["label"] if "label" in record else record["answer"]))


def _commonsense_qa(record: Record) -> Record:
    choices = record["choices"]
    lines = [f"Question: {record['question'].strip()}"]
    lines += [f"{letter}. {text}" for letter, text in zip("ABCDE", choices["text"], strict=True)]
    return _choices("\n".join([*lines, "Answer:"]), list("ABCDE"), "ABCDE".index(record["answerKey"]))


def _lambada(record: Record) -> Record:
    before, _, last = record["text"].rpartition(" ")
    return {"context": before, "continuation": f" {last}"}


def _continued(record: Record) -> Record:
    return {"context": record["context"], "continuation": f" {record['continuation'].lstrip(' ')}"}


_PREPARED = ("query", "choices", "gold")
_ARC = (Form(("question", "choices", "answerKey"), _arc), Form(_PREPARED, _prepared(_with_answer)))
FILES: dict[str, TaskFiles] = {
    "lambada": TaskFiles(
        ("lambada", "lambada_openai"),
        (Form(("text",), _lambada), Form(("context", "continuation"), _continued)),
        "EleutherAI/lambada_openai, test",
    ),
    "piqa": TaskFiles(
        ("piqa",),
        (Form(("goal", "sol1", "sol2", "label"), _piqa), Form(_PREPARED, _prepared(_with_answer))),
        "ybisk/piqa, validation",
    ),
    "hellaswag": TaskFiles(
        ("hellaswag",),
        (
            Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
            Form(_PREPARED, _prepared(lambda query: query)),
        ),
        "Rowan/hellaswag, validation",
    ),
    "winogrande": TaskFiles(
        ("winogrande",),
        (
            Form(("sentence", "option1", "option2", "answer"), _winogrande),
            Form(
                ("context_options", "continuation", "gold"),
                lambda record: _contexts(record["context_options"], record["continuation"], int(record["gold"])),
            ),
        ),
        "allenai/winogrande (winogrande_xl), validation",
    ),
    "arc_easy": TaskFiles(("arc_easy",), _ARC, "allenai/ai2_arc (ARC-Easy), test"),
    "arc_challenge": TaskFiles(("arc_challenge",), _ARC, "allenai/ai2_arc (ARC-Challenge), test"),
    "siqa": TaskFiles(
        ("siqa", "social_iqa"),
        (
            Form(("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
            Form(_PREPARED, _prepared(lambda query: query), LETTERS),
        ),
        "allenai/social_i_qa, validation",
    ),
    "boolq": TaskFiles(
        ("boolq",),
        (
            Form(("passage", "question", "label"), _boolq),
            Form(("passage", "question", "answer"), _boolq),
            Form(_PREPARED, _prepared(lambda query: _with_answer(query.removeprefix("Passage: ")))),
        ),
        "google/boolq, validation",
    ),
    "commonsense_qa": TaskFiles(
        ("commonsense_qa",),
        (
            Form(("question", "choices", "answerKey"), _commonsense_qa),
            Form(_PREPARED, _prepared(lambda query: query), LETTERS),
        ),
        "tau/commonsense_qa, validation",
    ),
    "wikitext": TaskFiles(
        ("wikitext",),
        (Form(("page",), lambda record: {"page": str(record["page"])}),),
        "EleutherAI/wikitext_document_level (wikitext-2-raw-v1), test",
    ),
}
TASKS = tuple(FILES)


def read_task(name: str, folder: Path, *, with_examples: bool) -> TaskData:
    """The documents of a task of `FILES`.

    Args:
        with_examples: also read the training part, `NAME.train.jsonl` or `.parquet`, where it is there.

    Raises:
        UserError: the file is missing, empty or not as described; the message names it, the line and the format.
    """
    path = _find(folder, name, "")
    if path is None:
        raise UserError(_missing(name, folder))
    documents, prompt = _read(path, name)
    train = _find(folder, name, ".train") if with_examples else None
    examples = None
    if train is not None:
        examples, other = _read(train, name)
        if other != prompt:
            raise UserError(f"{train}: its prompts are {other}, those of {path} {prompt}; give both in one format")
    if name == "wikitext" and any("<unk>" in document["page"] for document in documents):
        prompt = UNKNOWN_WORDS  # the files without "raw" in their name, whose rare words are left out
    return TaskData(path, documents, prompt, examples)


def _find(folder: Path, task: str, part: str) -> Path | None:
    suffixes = (*SUFFIXES, ".txt") if task == "wikitext" else SUFFIXES
    paths = (folder / f"{name}{part}{suffix}" for name in FILES[task].names for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


def _missing(name: str, folder: Path) -> str:
    known = FILES[name]
    forms = " or ".join("{" + ", ".join(form.fields) + "}" for form in known.forms)
    return (
        f"{folder / known.names[0]}.jsonl: no such file (nor .parquet); the task {name} reads records of {forms}, as "
        f"{known.source} on the Hugging Face Hub has them; put the file there, or give its folder as --data"
    )


def _read(path: Path, task: str) -> tuple[list[Record], str]:
    """Documents, and what their prompts are."""
    forms, form, documents = FILES[task].forms, None, []
    for place, record in _records(path):
        form = form or next((known for known in forms if record.keys() >= set(known.fields)), None)
        if form is None or not record.keys() >= set(form.fields):
            wanted = " or ".join(", ".join(known.fields) for known in ((form,) if form else forms))
            raise UserError(f"{place}: has the fields {', '.join(record) or 'none'}; {task} needs {wanted}")
        try:
            documents.append(form.read(record))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{place}: is no record of {task}: {error!r}; see tools/evaluation/README.md") from None
    if form is None:
        raise UserError(f"{path}: holds no records; fetch it again")
    return documents, form.prompt


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """Records, each with its place for errors."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as parquet: {error}; fetch it again") from None
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    text = read_text(path, str(path))
    if path.suffix == ".txt":
        starts = [match.start() for match in _HEADING.finditer(text)] or [0]
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
            yield f"{path}, character {start}", {"page": text[start:stop]}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: is {type(record).__name__}, not an object with fields")
    return record
