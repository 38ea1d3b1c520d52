"""Records become what lm-eval makes of them, and files that are not as described are refused by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pyarrow
import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from pyarrow import parquet

from pretrain.errors import UserError
from tests.tools.evaluation.evaluation_cases import LM_EVAL_NAMES, PREPARED, PUBLISHED, write_records
from tools.evaluation.benchmark_files import LETTERS, LIKE_LM_EVAL, UNKNOWN_WORDS, read_task
from tools.evaluation.tasks import build_task


def lm_eval_task(name: str) -> ConfigurableTask:
    """lm-eval's own task on the published records."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / LM_EVAL_NAMES[name], resolve_func=True)
    config = {key: value for key, value in config.items() if key not in ("tag", "dataset_path", "dataset_name")}
    split = config.get("test_split") or config["validation_split"]
    return ConfigurableTask(
        config={
            **config,
            "custom_dataset": lambda **_: {split: Dataset.from_list(PUBLISHED[name])},
            "training_split": None,
            "fewshot_config": {"split": split},
        }
    )


def requests_of(task: ConfigurableTask, **options: Any) -> list[tuple[int, tuple]]:
    """What a model is asked, by document."""
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=None, rank=0, world_size=1, **options)
    return [(request.doc_id, request.args) for request in task.instances]


@pytest.mark.parametrize("name", sorted(LM_EVAL_NAMES))
def test_requests_and_scores_are_those_of_lm_eval(name: str, sets: Path) -> None:
    ours, theirs = (
        build_task(name, read_task(name, sets, with_examples=False), num_fewshot=0, seed=0),
        lm_eval_task(name),
    )
    theirs.set_config(key="num_fewshot", value=0)
    asked = requests_of(ours)
    assert asked == requests_of(theirs)
    assert len(asked) >= len(PUBLISHED[name])
    for document in range(len(PUBLISHED[name])):
        parts = [(-1.5 - 0.7 * ((3 * place + document) % 4), place == 1) for place in range(5)]
        count = sum(number == document for number, _ in asked)
        answers = [part[0] for part in parts[:1]] if name == "wikitext" else parts[:count]
        of_ours = ours.process_results(ours.eval_docs[document], answers)
        of_theirs = theirs.process_results(theirs.eval_docs[document], answers)
        assert {metric: of_ours[metric] for metric in of_theirs} == of_theirs


@pytest.mark.parametrize("name", sorted(PREPARED))
def test_a_prepared_record_is_the_published_one(name: str, sets: Path, tmp_path: Path) -> None:
    task = name.removesuffix("_openai")
    prepared = read_task(task, write_records(tmp_path, PREPARED), with_examples=False)
    assert prepared.documents == read_task(task, sets, with_examples=False).documents[:1]
    assert prepared.prompt == LIKE_LM_EVAL


def test_prompts_that_ask_for_letters_are_called_so(tmp_path: Path) -> None:
    record = {"query": "Question: x\nChoices:\nA. a\nB. b\nAnswer:", "choices": ["A", "B"], "gold": 1}
    folder = write_records(tmp_path, {"siqa": [record], "commonsense_qa": [record]})
    for name in ("siqa", "commonsense_qa"):
        read = read_task(name, folder, with_examples=False)
        assert (read.prompt, read.documents) == (LETTERS, [record])


def test_parquet_and_text_are_read_too(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(PUBLISHED["arc_easy"]), tmp_path / "arc_easy.parquet")
    folder = write_records(tmp_path / "jsonl", {"arc_easy": PUBLISHED["arc_easy"]})
    both = [read_task("arc_easy", place, with_examples=False).documents for place in (tmp_path, folder)]
    assert both[0] == both[1]
    articles = " \n = One = \n\n ki mo .\n = = Part = = \n la\n", " = Two = \n\n re\n"
    (tmp_path / "wikitext.txt").write_text("".join(articles))
    pages = [page["page"] for page in read_task("wikitext", tmp_path, with_examples=False).documents]
    assert pages == [articles[0].removeprefix(" \n"), articles[1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"piqa\.jsonl: no such file .*\{goal, sol1, sol2, label\}.*ybisk/piqa"),
        (b"", "holds no records"),
        (b'{"goal": 1\n', "line 1: is not JSON"),
        (b"[1]\n", "line 1: is list, not an object"),
        (b'{"goal": "a"}\n', "line 1: has the fields goal; piqa needs goal, sol1, sol2, label or query"),
        (b'{"query": "a", "choices": ["b"], "gold": 1}\n', "line 1: is no record of piqa: .*number 1 of 1 choices"),
        (b'{"query": "a", "choices": ["b"], "gold": "x"}\n', "line 1: is no record of piqa"),
        (b'{"query": "\xff"}\n', "is not UTF-8 at byte 11"),
    ],
)
def test_a_file_that_is_not_as_described_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "piqa.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_task("piqa", tmp_path, with_examples=False)


def test_few_shot_examples_are_a_documents_own_and_never_itself(sets: Path, tmp_path: Path) -> None:
    data = read_task("piqa", sets, with_examples=True)
    assert data.examples is None
    asked = requests_of(build_task("piqa", data, num_fewshot=2, seed=3))
    task = build_task("piqa", data, num_fewshot=2, seed=3)
    task.build_all_requests(limit=None, rank=1, world_size=2)
    alone = {request.doc_id: request.args for request in task.instances}
    for document, arguments in asked:
        prompt = arguments[0]
        assert prompt.count("Question:") == 3
        assert prompt.count(f"Question: {PUBLISHED['piqa'][document]['goal']}\n") == 1
    assert all(arguments == alone[document] for document, arguments in asked[1::2] if document in alone)
    assert asked != requests_of(build_task("piqa", data, num_fewshot=2, seed=4))
    with pytest.raises(UserError, match="5 examples are too few for --num-fewshot 5"):
        build_task("piqa", data, num_fewshot=5, seed=0)
    training = [{"goal": f"t{number}", "sol1": "x", "sol2": "y", "label": 1} for number in range(4)]
    folder = write_records(tmp_path, {"piqa": PUBLISHED["piqa"], "piqa.train": training})
    prompt = requests_of(build_task("piqa", read_task("piqa", folder, with_examples=True), num_fewshot=3, seed=0))[0][
        1
    ][0]
    assert prompt.count("Question: t") == 3 and prompt.count(" y\n\n") == 3


def test_wikitext_that_is_not_raw_is_named(tmp_path: Path) -> None:
    for page, prompt in (("a raw page", LIKE_LM_EVAL), ("a <unk> page", UNKNOWN_WORDS)):
        write_records(tmp_path, {"wikitext": [{"page": "first"}, {"page": page}]})
        assert read_task("wikitext", tmp_path, with_examples=False).prompt == prompt
