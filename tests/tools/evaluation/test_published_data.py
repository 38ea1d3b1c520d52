"""Published stories and benchmark records themselves, where they are: all of them are read, and some asked.

They are too large for the repository. MNEMOSYNE_DATA names a folder with any of evals/ (llm-foundry's `local_data`),
babi/ (the archive), wikitext2/test.txt and books/; without it `shared/data` beside the repository is looked for.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.distributed_helper import ROOT
from tests.model_cases import CASES
from tests.tools.huggingface.exported_cases import write_exported
from tools import evaluate
from tools.encoding import Tokenizer
from tools.evaluation import babi
from tools.evaluation.answers import names_answer
from tools.evaluation.babi import BabiTask, Story, babi_prompt, read_babi
from tools.evaluation.benchmark_files import LETTERS, LIKE_LM_EVAL, TASKS, UNKNOWN_WORDS, read_task
from tools.evaluation.haystack import encode_sentences, split_sentences

DATA = Path(os.environ.get("MNEMOSYNE_DATA") or ROOT.parent / "shared" / "data")
DOCUMENTS = {
    "lambada": 5153, "piqa": 1838, "hellaswag": 10_042, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172,
    "siqa": 1954, "boolq": 3270, "commonsense_qa": 1221, "wikitext": 62,
}  # fmt: skip
"""Of the published parts."""
PROMPTS = {"siqa": LETTERS, "commonsense_qa": LETTERS, "wikitext": UNKNOWN_WORDS}


def there(path: str) -> Path:
    """A file or folder of the data; skips the test where it is missing."""
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not there; MNEMOSYNE_DATA names the folder of {path}")
    return DATA / path


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' files in one folder, wikitext among them."""
    folder = tmp_path_factory.mktemp("records")
    for path in there("evals").glob("*.jsonl"):
        (folder / path.name).symlink_to(path)
    if (DATA / "wikitext2/test.txt").exists():
        (folder / "wikitext.txt").symlink_to(DATA / "wikitext2/test.txt")
    return folder


def present(records: Path) -> list[str]:
    """The tasks that have a file."""
    files = {path.stem.removesuffix("_openai") for path in records.iterdir()}
    return [name for name in TASKS if name in files]


def test_every_published_record_is_read(records: Path) -> None:
    for name in present(records):
        read = read_task(name, records, with_examples=False)
        assert (len(read.documents), read.prompt) == (DOCUMENTS[name], PROMPTS.get(name, LIKE_LM_EVAL)), name
        if "choices" in read.documents[0]:
            assert {len(document["choices"]) for document in read.documents} <= {2, 3, 4, 5}
            assert all(document["query"].strip() and all(document["choices"]) for document in read.documents)
            assert {document["gold"] for document in read.documents} >= {0, 1}


def test_published_records_have_the_same_numbers_both_ways(
    records: Path, modules: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer chunks than the other tests' models have: real articles take a tenth of the time.
    memory = {"depth": 2, "expansion": 2, "chunk": 64}
    monkeypatch.setitem(CASES, "mac-long", {"variant": "mac", "segment": 256, "num_persistent": 3, "memory": memory})
    write_exported(tmp_path / "model", "mac-long", tokenizer=tokenizer_path)
    found = {}
    for way in ("native", "huggingface"):
        output = tmp_path / f"{way}.json"
        command = [
            str(tmp_path / "model"),
            "--tasks",
            ",".join(present(records)),
            "--data",
            str(records),
            "--limit",
            "2",
        ]
        assert evaluate.main([*command, "--through", way, "--json", str(output)]) == 0
        found[way] = json.loads(output.read_text())["tasks"]
    assert list(found["native"]) == present(records)
    for name, task in found["native"].items():
        assert task["documents"] == 2 and task["prompt"] == PROMPTS.get(name, LIKE_LM_EVAL)
        for metric, value in task["metrics"].items():
            assert value == pytest.approx(found["huggingface"][name]["metrics"][metric], rel=1e-5), (name, metric)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bAbI's archive, unpacked."""
    folder = tmp_path_factory.mktemp("babi")
    (archive,) = there("babi").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def judged(task: BabiTask, story: Story, answer: str) -> float:
    return names_answer(f" {answer}.\n", story.answer, story.question, task.labels)


@pytest.mark.parametrize("name", babi.TASKS)
def test_every_published_story_knows_its_answer_from_others(name: str, published: Path) -> None:
    task = read_babi(name, published, with_examples=False)
    assert len(task.stories) == 1000 and all(story.facts and story.question.endswith("?") for story in task.stories)
    assert all(judged(task, story, story.answer) == 1 for story in task.stories)
    for label in task.labels:  # a constant is right where it is the answer, and there alone
        right = sum(judged(task, story, label) for story in task.stories)
        assert right == sum(story.answer == label for story in task.stories) < 700
    assert not any(judged(task, story, "the moon") for story in task.stories)


def test_the_archive_is_read_as_it_lies(published: Path) -> None:
    task = read_babi("qa19", there("babi"), with_examples=True)
    assert task == read_babi("qa19", published, with_examples=True)
    assert len(task.examples) == 10_000


def test_published_stories_in_a_book_hold_their_answers(published: Path, tokenizer: Tokenizer) -> None:
    book = there("books/small/Alice_s_Adventures_in_Wonderland.txt")
    haystack = encode_sentences(tokenizer, split_sentences([book.read_text()]), joint=" ", most=20_000)
    for name in babi.TASKS:
        task = read_babi(name, published, with_examples=False)
        prompt = babi_prompt(task, tokenizer, haystack, length=16_384, depth=None, sample=0, seed=0)
        assert len(prompt.tokens) + babi.ANSWER_TOKENS == 16_384
        text = tokenizer.decode(prompt.tokens)
        places = [text.index(fact.text) for fact in prompt.facts]
        assert places and text.endswith(f"\nQuestion: {prompt.question}\nAnswer:")
        for fact in prompt.facts:
            assert tokenizer.decode(prompt.tokens[fact.start : fact.stop], begins=False) == f" {fact.text}"
        assert [fact.start for fact in prompt.facts] == sorted(fact.start for fact in prompt.facts)
    task = read_babi("qa1", published, with_examples=False)
    for sample in range(20):  # an oracle: where the text last says that the person went
        prompt = babi_prompt(task, tokenizer, haystack, length=4096, depth=None, sample=sample, seed=0)
        who = re.fullmatch(r"Where is (\w+)\?", prompt.question)[1]
        text = tokenizer.decode(prompt.tokens)
        went = re.findall(rf"{who} (?:went|moved|journeyed|travelled|went back) (?:back )?to the (\w+)\.", text)
        assert names_answer(f" {went[-1]}", prompt.answers[0], prompt.question, task.labels) == 1
        assert not np.isin(tokenizer.eos_id, prompt.tokens[1:])
