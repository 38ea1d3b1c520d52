"""Long contexts: an oracle finds everything, a constant nothing; ranks agree; memory does not grow with length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed_helper import ROOT, run_ranks
from tests.model_cases import CASES
from tests.tools.evaluation.evaluation_cases import answer_by_reading
from tests.tools.huggingface.exported_cases import write_exported
from tools import evaluate
from tools.evaluation import long_context
from tools.evaluation.babi import ANSWER_TOKENS
from tools.evaluation.completion import complete
from tools.model_directory import LoadedModel, load_model_directory

TASKS = ["--ruler", "niah_single_1,niah_multikey_3,niah_multivalue", "--babi", "qa1,qa7"]


def command(model: Path, book: Path, stories: Path, *options: str) -> list[str]:
    return [str(model), *TASKS, "--haystack", str(book), "--data", str(stories), *options]


def looked_up(loaded: LoadedModel, prompts: torch.Tensor, **_: Any) -> list[str]:
    """Answers by reading the prompts' text."""
    return [answer_by_reading(loaded.tokenizer.decode(prompt.tolist())) for prompt in prompts]


def run(arguments: list[str], output: Path) -> dict[str, Any]:
    assert evaluate.main([*arguments, "--json", str(output)]) == 0
    return json.loads(output.read_text())


def test_an_oracle_finds_everything_and_a_constant_nothing(
    mac: Path, book: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    picture, board = tmp_path / "map.svg", tmp_path / "board"
    options = ("--lengths", "3000,1500", "--samples", "2", "--plot", str(picture), "--tensorboard", str(board))
    arguments = command(mac, book, stories, *options)
    monkeypatch.setattr(long_context, "complete", looked_up)
    report = run(arguments, tmp_path / "out.json")
    cells = report["cells"]
    assert {cell["score"] for cell in cells} == {1.0}
    assert len(cells) == 2 * (3 * 5 + 2)
    assert {cell["setting"] for cell in cells} == {"zero-shot"}
    assert {cell["depth"] for cell in cells if cell["task"] == "niah_single_1"} == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert {cell["depth"] for cell in cells if cell["task"] == "qa1"} == {None}
    spare = {True: 128, False: 20}
    assert all(
        prompt["prompt_tokens"] + spare[prompt["task"].startswith("niah")] == prompt["length"]
        for prompt in report["prompts"]
    )
    assert "niah_multivalue" in capsys.readouterr().out
    drawing = picture.read_text()
    assert drawing.startswith("<?xml") and "niah_single_1 (zero-shot)" in drawing and "all over" in drawing
    assert list(board.iterdir())
    monkeypatch.setattr(long_context, "complete", lambda loaded, prompts, **_: [" 0000000 sky."] * len(prompts))
    png = tmp_path / "map.png"
    report = run([*arguments, "--plot", str(png), "--fine-tuned", "--num-fewshot", "1"], tmp_path / "out.json")
    assert {cell["score"] for cell in report["cells"]} == {0.0}
    assert png.read_bytes().startswith(b"\x89PNG")
    settings = {cell["task"]: cell["setting"] for cell in report["cells"]}
    assert settings["qa1"] == "fine-tuned, few-shot (1)" and settings["niah_single_1"] == "fine-tuned, zero-shot"


def test_what_is_no_number_is_no_score(
    mac: Path, book: Path, stories: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Neither 0 nor 100: null, and told, while what was answered keeps its score."""
    folder, picture = tmp_path / "model", tmp_path / "map.svg"
    write_exported(folder, "mac", tokenizer=tokenizer_path, diverged=True)
    tasks = ["--ruler", "niah_single_1", "--babi", "qa1", "--haystack", str(book), "--data", str(stories)]
    arguments = [*tasks, "--lengths", "700", "--samples", "1", "--depths", "20,60"]
    drawn = ["--plot", str(picture), "--tensorboard", str(tmp_path / "board")]
    report = run([str(folder), *arguments, *drawn], tmp_path / "out.json")
    assert len(report["prompts"]) == 4 and {prompt["output"] for prompt in report["prompts"]} == {None}
    assert {cell["score"] for cell in report["cells"]} == {None} == {prompt["score"] for prompt in report["prompts"]}
    said = capsys.readouterr()
    assert said.out.count("not finite") == 2 and "warning: 4 of 4 prompts: logits are not finite" in said.err
    assert picture.read_text().count("not finite") == 4
    board = EventAccumulator(str(tmp_path / "board"))
    assert board.Reload().Tags()["scalars"] == []

    def half(loaded: LoadedModel, prompts: torch.Tensor, **_: Any) -> list[str | None]:
        return [looked_up(loaded, prompts)[0], *[None] * (len(prompts) - 1)]

    monkeypatch.setattr(long_context, "complete", half)
    cells = run([str(mac), *arguments], tmp_path / "out.json")["cells"]
    assert {cell["depth"]: cell["score"] for cell in cells if cell["task"] == "qa1"} == {0.2: 1.0, 0.6: None}
    said = capsys.readouterr()
    assert said.out.count("not finite") == 2 and "warning: 2 of 4 prompts" in said.err


def test_stories_that_are_left_out_are_counted_and_told(
    mac: Path, book: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Of three stories with 2, 4 and 1 facts the last alone fits: it is what is asked, whatever was drawn before it."""
    monkeypatch.setattr(long_context, "complete", looked_up)
    encode = load_model_directory(mac).tokenizer.encode
    texts = " John went to the hall.", "\nQuestion: Where is John?\nAnswer:"
    fits = 1 + sum(len(encode(text, begins=False)) for text in texts) + ANSWER_TOKENS
    told = {}
    for length in (fits, 900):
        tasks = ["--babi", "qa1", "--haystack", str(book), "--data", str(stories), "--samples", "12"]
        report = run([str(mac), *tasks, "--lengths", str(length)], tmp_path / "out.json")
        told[length] = report["left_out"]
        assert sum(prompt["left_out"] for prompt in report["prompts"]) == report["left_out"]
        assert {len(prompt["facts"]) for prompt in report["prompts"]} == ({1} if length == fits else {1, 2, 4})
        warning = f"warning: {report['left_out']} drawn stories do not fit their length and were left out"
        assert (warning in capsys.readouterr().err) == (length == fits)
    assert told[fits] >= 8 and told[900] == 0  # 24 are expected: two of three


def test_a_model_is_asked_by_one_rank_or_two_alike(mac: Path, book: Path, stories: Path, tmp_path: Path) -> None:
    options = [
        "--lengths",
        "700",
        "--samples",
        "1",
        "--depths",
        "10,50,90",
        "--answer-tokens",
        "12",
        "--batch-size",
        "2",
    ]
    tasks = ["--ruler", "niah_single_1", "--babi", "qa1", "--haystack", str(book), "--data", str(stories)]
    arguments = [str(mac), *tasks, *options]
    alone = run(arguments, tmp_path / "alone.json")
    run_ranks(["-m", "tools.evaluate", *arguments, "--json", str(tmp_path / "two.json")], ranks=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.pop("ranks") == 2 and alone.pop("ranks") == 1
    assert two == alone
    assert len(alone["prompts"]) == 2 * 3 and len({prompt["output"] for prompt in alone["prompts"]}) > 1
    assert all(prompt["output"].count("\n") == 0 for prompt in alone["prompts"] if prompt["task"] == "qa1")


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_up_to_their_end(mac: Path) -> None:
    loaded = load_model_directory(mac)
    prompts = torch.randint(4, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    made = complete(loaded, prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, made, strict=True):
        tokens = prompt.tolist()
        for _ in range(12):
            tokens.append(int(loaded.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == loaded.tokenizer.eos_id:
                break
        assert loaded.tokenizer.decode(tokens[40:], begins=False) == text
    end = made[0][3]
    assert complete(loaded, prompts, max_new_tokens=12, until=(end,))[0] == made[0].split(end)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ruler", "niah_singel_1"], "there is no task 'niah_singel_1', did you mean niah_single_1?"),
        (["--babi", "qa21"], "--babi: there is no task 'qa21'"),
        (["--ruler", "niah_single_2"], "--haystack is missing"),
        (["--ruler", "niah_single_2", "--haystack", "absent.txt"], "absent.txt: no such file or folder"),
        (["--ruler", "niah_single_1", "--haystack", "absent.txt"], "--haystack: no task that was asked for reads it"),
        (["--ruler", "niah_single_1", "--data", "x"], "--data with --ruler or --babi: has no effect"),
        (["--ruler", "niah_single_1", "--lengths", "100"], "tokens are too few"),
        (["--ruler", "niah_single_1", "--answer-tokens", "2"], "tokens, more than --answer-tokens 2"),
    ],
)
def test_what_cannot_be_done_is_refused(options: list[str], message: str, mac: Path, capsys) -> None:
    assert evaluate.main([str(mac), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--depths", "101"), ("--lengths", "0"), ("--lengths", "4K"), ("--plot", "a.gif")])
def test_options_out_of_range_are_named(option: tuple[str, str], mac: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(mac), "--ruler", "all", *option])
    assert option[0] in capsys.readouterr().err


def test_a_haystack_that_is_no_text_is_refused(mac: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "book.txt").write_bytes(b"ok \xff")
    assert evaluate.main([str(mac), "--ruler", "niah_single_2", "--haystack", str(tmp_path / "book.txt")]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_a_prompt_beyond_a_transformers_context_is_refused(transformer: Path, capsys) -> None:
    assert evaluate.main([str(transformer), "--ruler", "niah_single_1", "--lengths", "65"]) == 2
    assert "--lengths 65: is longer than the transformer's context of 64 tokens" in capsys.readouterr().err


PEAK = """
import resource, sys
from tools import evaluate
assert evaluate.main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_of(model: Path, book: Path, stories: Path, length: int, output: Path) -> int:
    """Bytes at most that a process held which asked two questions of `length` tokens: for a needle and of a story."""
    tasks = ["--ruler", "niah_single_1", "--babi", "qa1", "--haystack", str(book), "--data", str(stories)]
    options = ["--lengths", str(length), "--samples", "1", "--depths", "50", "--json", str(output)]
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, str(model), *tasks, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(finished.stdout.rsplit("peak ", 1)[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kilobytes are Linux's unit of the peak")
def test_two_million_tokens_take_the_memory_of_a_short_text(
    tmp_path: Path, tokenizer_path: Path, book: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One layer, and longer chunks than the other tests' models have: they take a tenth of the time.
    memory = {"depth": 2, "expansion": 2, "chunk": 128}
    case = {"variant": "mac", "num_layers": 1, "segment": 256, "num_persistent": 3, "memory": memory}
    monkeypatch.setitem(CASES, "mac-long", case)
    write_exported(tmp_path / "model", "mac-long", tokenizer=tokenizer_path)
    output = tmp_path / "out.json"
    short, long = (peak_of(tmp_path / "model", book, stories, length, output) for length in (1 << 15, 1 << 21))
    print(f"peak of 32K tokens {short / 2**20:.0f} MiB, of 2M {long / 2**20:.0f} MiB")
    # A prompt's own tokens, as int32, as int64, and in the making.
    assert long - short < 100 * 2**20
    needle, story = json.loads(output.read_text())["prompts"]
    for prompt, spare in ((needle, 128), (story, 20)):
        assert prompt["prompt_tokens"] + spare == prompt["length"] == 1 << 21
        assert all(abs(fact["token"] - (1 << 20)) < 2000 for fact in prompt["facts"])


def test_every_rank_has_prompts_of_a_length() -> None:
    task = long_context.Task("x", (0.0, 0.5, 1.0), 8, make=None, judge=None)
    for ranks, sizes in ((1, [8, 4]), (2, [6, 6]), (8, [2] * 6), (99, [1] * 12)):
        batches = list(long_context._batches([task], [64], 4, 8, ranks))
        assert [len(cells) for _, _, cells in batches] == sizes
        assert [cell for _, _, cells in batches for cell in cells] == [(d, s) for d in task.depths for s in range(4)]
