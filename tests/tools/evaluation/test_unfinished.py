"""An evaluation of long contexts that ended early: what it had answered is in its file, and gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import UserError
from tests.data_cases import make_tokenizer
from tests.distributed_helper import run_ranks
from tests.tools.evaluation.evaluation_cases import answer_by_reading
from tests.tools.huggingface.exported_cases import VOCABULARY, write_exported
from tools import evaluate
from tools.evaluation import long_context, long_report
from tools.model_directory import LoadedModel

LENGTHS = "900,1200,1500"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that were given to the model, which answers by reading; none where it answers not."""
    lengths: list[int] = []

    def answer(loaded: LoadedModel, prompts: torch.Tensor, *, max_new_tokens: int, **_: Any) -> list[str | None]:
        lengths.append(prompts.shape[1] + max_new_tokens)
        texts = [answer_by_reading(loaded.tokenizer.decode(prompt.tolist())) for prompt in prompts]
        return [None if "What is the special magic" in text else text for text in texts]

    monkeypatch.setattr(long_context, "complete", answer)
    return lengths


def arguments_for(model: Path, book: Path, stories: Path, output: Path, *options: str) -> list[str]:
    tasks = ["--ruler", "niah_single_1", "--babi", "qa1", "--haystack", str(book), "--data", str(stories)]
    return [str(model), *tasks, "--lengths", LENGTHS, "--samples", "2", "--json", str(output), *options]


def end_at(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation ends when it is to ask prompts of a length."""
    answer = long_context.complete

    def ending(loaded: LoadedModel, prompts: torch.Tensor, *, max_new_tokens: int, **options: Any) -> Any:
        if prompts.shape[1] + max_new_tokens == length:
            raise UserError("ended here")
        return answer(loaded, prompts, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(long_context, "complete", ending)


def test_what_was_answered_is_kept_and_not_asked_again(
    mac: Path, book: Path, stories: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, output = tmp_path / "whole.json", tmp_path / "out.json"
    assert evaluate.main(arguments_for(mac, book, stories, whole)) == 0
    expected = json.loads(whole.read_text())
    assert expected["finished"] is True and expected["missing_lengths"] == []
    with monkeypatch.context() as patch:
        end_at(1200, patch)
        assert evaluate.main(arguments_for(mac, book, stories, output)) == 2
        found = json.loads(output.read_text())
        assert found["finished"] is False and found["missing_lengths"] == [1200, 1500]
        assert found["cells"] == [cell for cell in expected["cells"] if cell["length"] == 900] != []
        assert found["prompts"] == [prompt for prompt in expected["prompts"] if prompt["length"] == 900]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        asked.clear()
        end_at(1500, patch)
        assert evaluate.main(arguments_for(mac, book, stories, output)) == 2
        assert set(asked) == {1200}
        assert json.loads(output.read_text())["missing_lengths"] == [1500]
        assert f"going on from {output}, which has lengths 900" in capsys.readouterr().err
    asked.clear()
    assert evaluate.main(arguments_for(mac, book, stories, output)) == 0
    assert set(asked) == {1500}
    assert output.read_bytes() == whole.read_bytes()
    asked.clear()
    assert evaluate.main(arguments_for(mac, book, stories, output)) == 0
    assert set(asked) == {900, 1200, 1500}  # a finished evaluation is done again


def test_unfinished_answers_to_other_prompts_or_of_another_model_are_not_mixed_in(
    mac: Path, book: Path, stories: Path, tokenizer_path: Path, tmp_path: Path, asked: list[int],
    monkeypatch: pytest.MonkeyPatch, capsys,
) -> None:  # fmt: skip
    output, other = tmp_path / "out.json", tmp_path / "book.txt"
    with monkeypatch.context() as patch:
        end_at(1200, patch)
        assert evaluate.main(arguments_for(mac, book, stories, output)) == 2
    before = output.read_bytes()
    write_exported(tmp_path / "model", "mag", tokenizer=tokenizer_path)
    other.write_text(book.read_text().replace(" ", "  a ", 1))
    (tmp_path / "tokenizer").mkdir()
    other_tokenizer = make_tokenizer(tmp_path / "tokenizer", VOCABULARY - 8)
    write_exported(tmp_path / "other", "mac", tokenizer=other_tokenizer)
    changes = [
        ("model_sha256", arguments_for(tmp_path / "model", book, stories, output)),
        ("model_sha256, tasks", arguments_for(tmp_path / "other", book, stories, output)),
        ("tasks", arguments_for(mac, other, stories, output)),
        ("seed", arguments_for(mac, book, stories, output, "--seed", "1")),
        ("samples", arguments_for(mac, book, stories, output, "--samples", "3")),
        # No more of the haystack is read than the longest prompt takes.
        ("lengths, tasks", arguments_for(mac, book, stories, output, "--lengths", "900,1200")),
        ("dtype", arguments_for(mac, book, stories, output, "--dtype", "bfloat16")),
        ("num_fewshot, tasks", arguments_for(mac, book, stories, output, "--num-fewshot", "1")),  # examples are texts
        ("tasks", arguments_for(mac, book, stories, output, "--answer-tokens", "12")),
        ("tasks", arguments_for(mac, book, stories, output, "--depths", "20,80")),
    ]
    asked.clear()
    capsys.readouterr()
    for name, arguments in changes:
        assert evaluate.main(arguments) == 2
        assert f"an unfinished evaluation with other settings ({name})" in capsys.readouterr().err, name
    assert asked == [] and output.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"loss": 1.0}'])
def test_a_file_of_something_else_is_replaced(
    content: str, mac: Path, book: Path, stories: Path, tmp_path: Path, asked: list[int]
) -> None:
    output = tmp_path / "out.json"
    output.write_text(content)
    assert evaluate.main(arguments_for(mac, book, stories, output)) == 0
    assert json.loads(output.read_text())["finished"] is True and set(asked) == {900, 1200, 1500}


def test_a_disk_that_is_full_for_a_while_ends_no_evaluation(
    mac: Path, book: Path, stories: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write, failed = long_context.write, []

    def full_at_first(*arguments: Any, missing: Any, **options: Any) -> Any:
        if len(missing) == 2:
            failed.append(missing)
            raise UserError("no space left on its disk")
        return write(*arguments, missing=missing, **options)

    monkeypatch.setattr(long_context, "write", full_at_first)
    assert evaluate.main(arguments_for(mac, book, stories, tmp_path / "out.json")) == 0
    assert "warning: unfinished results: no space left on its disk" in capsys.readouterr().err
    assert len(failed) == 1 and json.loads((tmp_path / "out.json").read_text())["finished"] is True


def test_what_cannot_be_written_at_the_end_is_printed(
    mac: Path, book: Path, stories: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The last length's answers are nowhere else; the same command asks for that one alone again."""
    write = long_report.write_results

    def full_at_last(arguments: Any, results: Any) -> None:
        if results["finished"]:
            raise UserError("no space left on its disk")
        write(arguments, results)

    output = tmp_path / "out.json"
    assert evaluate.main(arguments_for(mac, book, stories, tmp_path / "whole.json")) == 0
    table = capsys.readouterr().out
    monkeypatch.setattr(long_report, "write_results", full_at_last)
    assert evaluate.main(arguments_for(mac, book, stories, output)) == 2
    shown = capsys.readouterr()
    assert shown.out == table and "1,500" in table and "error: no space left on its disk" in shown.err
    assert json.loads(output.read_text())["missing_lengths"] == [1500]


ENDS_ONE = """
import os, sys
from pretrain.errors import UserError
from tools import evaluate
from tools.evaluation import long_context
answer = long_context.complete
def complete(loaded, prompts, **options):
    if prompts.shape[1] + options["max_new_tokens"] == 1200:
        if os.environ["RANK"] == "1":
            raise UserError("ended here")
        return [""] * len(prompts)  # at once: it is killed 10 s behind the other one's end
    return answer(loaded, prompts, **options)
long_context.complete = complete
sys.exit(evaluate.main(sys.argv[1:]))
"""


def test_of_several_ranks_the_first_writes_and_goes_on_when_one_has_ended(
    mac: Path, book: Path, stories: Path, tmp_path: Path
) -> None:
    """The one that is left says so as soon as it would meet the other, and the same command goes on."""
    whole, output = tmp_path / "whole.json", tmp_path / "out.json"
    short = ("--lengths", "900,1200", "--samples", "1", "--answer-tokens", "12", "--depths", "20,80")
    assert evaluate.main(arguments_for(mac, book, stories, whole, *short)) == 0
    arguments = arguments_for(mac, book, stories, output, *short)
    finished = run_ranks(["-c", ENDS_ONE, *arguments], ranks=2, check=False)
    assert finished.codes == [2, 2], finished.report()
    assert "error: ended here" in finished.errors[1]
    assert "waited for the other ranks, of which one has ended" in finished.errors[0]
    assert json.loads(output.read_text())["missing_lengths"] == [1200]
    finished = run_ranks(["-m", "tools.evaluate", *arguments], ranks=2)
    assert "which has lengths 900" in finished.errors[0] and "going on" not in finished.errors[1]
    found, expected = json.loads(output.read_text()), json.loads(whole.read_text())
    assert (found.pop("ranks"), expected.pop("ranks")) == (2, 1)
    assert found == expected
