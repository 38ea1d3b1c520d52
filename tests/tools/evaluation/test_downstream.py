"""Downstream tasks: both ways to run a model give the same numbers, and so do several ranks; results are true."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.generation import PREFILL_TOKENS
from parallel.process import World
from pretrain.errors import UserError
from pretrain.exported import MANIFEST
from tests.distributed_helper import run_ranks
from tests.tools.evaluation.evaluation_cases import PUBLISHED, write_records
from tests.tools.huggingface.exported_cases import write_exported
from tools import evaluate
from tools.evaluation.benchmark_files import LETTERS
from tools.evaluation.downstream import paper_row, summarise
from tools.evaluation.harness import NativeLM
from tools.evaluation.ranks import Ranks
from tools.model_directory import load_model_directory

ALONE = Ranks(World(0, 1, 0, torch.device("cpu")))


def results(model: Path, sets: Path, output: Path, *options: str, tasks: str = "all") -> dict[str, Any]:
    """What the command writes."""
    command = [str(model), "--tasks", tasks, "--data", str(sets), "--json", str(output), *options]
    assert evaluate.main(command) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def native(mac: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All tasks, by the model here."""
    folder = tmp_path_factory.mktemp("native")
    return results(mac, sets, folder / "out.json", "--tensorboard", str(folder / "board")) | {"folder": str(folder)}


def assert_same_numbers(one: dict[str, Any], other: dict[str, Any], *, relative: float) -> None:
    """All metrics of all tasks."""
    assert one["tasks"].keys() == other["tasks"].keys()
    for name, task in one["tasks"].items():
        for metric, found in task["metrics"].items():
            assert found == pytest.approx(other["tasks"][name]["metrics"][metric], rel=relative), (name, metric)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_export_through_transformers_gives_the_same_numbers(
    native: dict[str, Any], mac: Path, sets: Path, modules: Path, tmp_path: Path
) -> None:
    theirs = results(mac, sets, tmp_path / "out.json", "--through", "huggingface", "--batch-size", "3")
    assert theirs["through"] == "huggingface"
    assert_same_numbers(native, theirs, relative=1e-5)


def test_both_ways_agree_in_bf16(mac: Path, sets: Path, modules: Path, tmp_path: Path) -> None:
    ours, theirs = (
        results(
            mac,
            sets,
            tmp_path / way,
            "--through",
            way,
            "--dtype",
            "bfloat16",
            "--batch-size",
            "1",
            tasks="piqa,lambada",
        )
        for way in ("native", "huggingface")
    )
    assert_same_numbers(ours, theirs, relative=1e-5)


@pytest.mark.parametrize(
    ("way", "tasks", "relative"), [("native", "all", 1e-6), ("huggingface", "lambada,piqa,winogrande,wikitext", 1e-5)]
)
def test_two_ranks_give_the_same_numbers(
    way: str, tasks: str, relative: float, native: dict[str, Any], mac: Path, sets: Path, modules: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    command = ["-m", "tools.evaluate", str(mac), "--tasks", tasks, "--data", str(sets), "--json", str(output)]
    # Fresh: transformers, once imported, keeps the folder that it copies code to.
    finished = run_ranks([*command, "--through", way], ranks=2, fresh=way == "huggingface")
    assert "PIQA acc" in finished.outputs[0] and finished.outputs[1] == ""
    divided = json.loads(output.read_text())
    assert (native["ranks"], divided["ranks"], divided["through"]) == (1, 2, way)
    alone = {name: native["tasks"][name] for name in divided["tasks"]}
    assert tasks == "all" or ",".join(alone) == tasks
    assert_same_numbers({"tasks": alone}, divided, relative=relative)
    assert [task["documents"] for task in divided["tasks"].values()] == [
        len(PUBLISHED[name]) for name in divided["tasks"]
    ]


@torch.no_grad()
def test_likelihoods_are_those_of_the_models_logits(mac: Path) -> None:
    loaded = load_model_directory(mac)
    model = NativeLM(loaded, ALONE, batch_size=2)
    asked = [("ki mo", " la"), ("", "ta ki"), ("the ki mo ta re ", "loka " * 40), ("ki", " mo la ta")]
    answers = model.loglikelihood([request("loglikelihood", *pair) for pair in asked])
    for (context, continuation), (likelihood, greedy) in zip(asked, answers, strict=True):
        tokenizer = loaded.tokenizer
        before = [tokenizer.eos_id, *(tokenizer.encode(context.rstrip()) if context else [])]
        whole = [tokenizer.eos_id, *tokenizer.encode(context + continuation)]
        logits = loaded.model(torch.tensor([whole[:-1]])).logits[0, len(before) - 1 :].double()
        targets = torch.tensor(whole[len(before) :])
        expected = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
        assert likelihood == pytest.approx(float(expected), rel=1e-5)
        assert greedy == bool((logits.argmax(-1) == targets).all())
    # The likeliest token is greedy: the oracle of the flag.
    best = model.generate_until([request("generate_until", "ki mo", {"max_gen_toks": 3, "until": []})])[0]
    assert model.loglikelihood([request("loglikelihood", "ki mo", best)])[0][1] or "\ufffd" in best


def test_rolling_perplexity_is_that_of_a_text_alone(mac: Path, tmp_path: Path) -> None:
    text = "ki mo ta, 42 la re. " * 75
    loaded = load_model_directory(mac)
    tokens = len(loaded.tokenizer.encode(text))
    assert PREFILL_TOKENS < tokens < 1.5 * PREFILL_TOKENS  # more than one piece
    (tmp_path / "text.txt").write_text(text)
    command = [str(mac), "--input", str(tmp_path / "text.txt"), "--context", str(tokens), "--max-tokens", str(tokens)]
    assert evaluate.main([*command, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["tokens"] == tokens
    rolling = NativeLM(loaded, ALONE, batch_size=4).loglikelihood_rolling([request("loglikelihood_rolling", text)])[0]
    assert -rolling == pytest.approx(report["loss"] * tokens, rel=1e-6)


def test_standard_errors_are_those_of_a_mean_and_of_a_ratio() -> None:
    accuracies, likelihoods = [1.0, 0.0, 0.0, 1.0, 1.0], [-1.0, -2.5, -0.5, -3.0, -2.0]
    samples = [
        {"metrics": ["acc", "perplexity", "word_perplexity"], "acc": a, "perplexity": x, "word_perplexity": (2 * x, 2)}
        for a, x in zip(accuracies, likelihoods, strict=True)
    ]
    found = summarise(samples)
    assert found["acc"] == pytest.approx({"value": 0.6, "stderr": mean_stderr(accuracies)})
    perplexity = math.exp(-statistics.mean(likelihoods))
    assert found["perplexity"] == pytest.approx(
        {"value": perplexity, "stderr": perplexity * statistics.stdev(likelihoods) / math.sqrt(5)}
    )
    assert found["word_perplexity"] == pytest.approx(found["perplexity"])  # equal weights: a mean again
    assert summarise(samples[:1])["acc"] == {"value": 1.0, "stderr": None}
    bits = summarise([{"metrics": ["bits_per_byte"], "bits_per_byte": (-6.0, 3)}])["bits_per_byte"]
    assert bits == {"value": pytest.approx(2 / math.log(2)), "stderr": None}


def test_the_table_is_the_papers(native: dict[str, Any]) -> None:
    row = native["table"]
    assert row["Wiki ppl"] == native["tasks"]["wikitext"]["metrics"]["word_perplexity"]["value"]
    assert row["Hella acc_n"] == 100 * native["tasks"]["hellaswag"]["metrics"]["acc_norm"]["value"]
    accuracies = [value for heading, value in row.items() if "ppl" not in heading and heading != "Avg"]
    assert len(accuracies) == 8 and row["Avg"] == pytest.approx(sum(accuracies) / 8)
    partial = paper_row({"piqa": native["tasks"]["piqa"]}, None)
    assert partial["Avg"] is None and partial["SIQA acc"] is None and partial["PIQA acc"] == row["PIQA acc"]


def test_results_say_how_they_were_made(native: dict[str, Any], mac: Path, sets: Path, tmp_path: Path) -> None:
    assert native["step"] == 3 and native["limit"] is None and native["versions"]["lm_eval"]
    assert {task["setting"] for task in native["tasks"].values()} == {"zero-shot"}
    board = EventAccumulator(str(Path(native["folder"]) / "board"))
    board.Reload()
    (event,) = board.Scalars("downstream/piqa/acc (zero-shot)")
    assert (event.step, event.value) == (3, pytest.approx(native["tasks"]["piqa"]["metrics"]["acc"]["value"]))
    few = results(mac, sets, tmp_path / "few.json", "--num-fewshot", "1", "--fine-tuned", "--limit", "2")
    settings = {name: task["setting"] for name, task in few["tasks"].items()}
    assert settings.pop("wikitext") == "fine-tuned, zero-shot"
    assert set(settings.values()) == {"fine-tuned, few-shot (1)"}
    assert few["tasks"]["piqa"]["documents"] == 2
    assert set(few["table"].values()) == {None}


def test_what_does_not_compare_stays_out_of_the_papers_table(native: dict[str, Any]) -> None:
    letters = native["tasks"] | {"siqa": native["tasks"]["siqa"] | {"prompt": LETTERS}}
    assert paper_row(letters, None) == native["table"] | {"SIQA acc": None, "Avg": None}
    assert set(paper_row(native["tasks"], 200).values()) == {None}


def test_an_export_without_a_converted_tokenizer_is_refused(mac: Path, sets: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(mac, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["tokenizer.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "tokenizer.json").unlink()
    arguments = [str(folder), "--tasks", "piqa", "--data", str(sets), "--through", "huggingface"]
    assert evaluate.main(arguments) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


@torch.no_grad()
def test_a_transformers_context_bounds_prompts_and_windows(
    transformer: Path, sets: Path, tmp_path: Path, capsys
) -> None:
    loaded = load_model_directory(transformer)
    model = NativeLM(loaded, ALONE, batch_size=2)
    text = "ki mo ta re la " * 20
    tokens = loaded.tokenizer.encode(text)
    assert len(tokens) > 64 and len(tokens) % 64
    total = 0.0
    for start in range(0, len(tokens), 64):  # each token once, with up to 64 before it; the last window is full too
        end = min(start + 64, len(tokens))
        inputs = tokens[end - 65 : end - 1] if start else [loaded.tokenizer.eos_id, *tokens[:63]]
        logits = loaded.model(torch.tensor([inputs])).logits[0, start - end :].double()
        total += float(logits.log_softmax(-1).gather(-1, torch.tensor(tokens[start:end])[:, None]).sum())
    rolling = model.loglikelihood_rolling([request("loglikelihood_rolling", text)])[0]
    assert rolling == pytest.approx(total, rel=1e-5)
    with pytest.raises(UserError, match="longer than the transformer's context of 64"):
        model.loglikelihood([request("loglikelihood", text, " ki")])
    long = write_records(tmp_path / "long", {"lambada": [{"text": text}]})
    for way in ("native", "huggingface"):
        assert evaluate.main([str(transformer), "--tasks", "lambada", "--data", str(long), "--through", way]) == 2
        assert "longer than the transformer's context of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "piqq"], "there is no task 'piqq', did you mean piqa? There are: lambada, piqa"),
        (["--tasks", ","], "--tasks: names nothing"),
        (["--tasks", "piqa", "--data", "absent"], "absent/piqa.jsonl: no such file"),
        (["--tasks", "piqa", "--context", "5"], "--context with --tasks: has no effect there"),
        (["--tasks", "piqa", "--lengths", "64"], "--lengths with --tasks"),
        (["--tasks", "piqa", "--ruler", "all"], "one of these"),
        (["--input", "x", "--seed", "3", "--through", "huggingface"], "--through, --seed with --shards or --input"),
        ([], "give either --shards or --input, a text to be scored; or --tasks"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Sequence[str], message: str, mac: Path, capsys) -> None:
    assert evaluate.main([str(mac), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_text_is_scored_by_one_process(mac: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main([str(mac), "--input", str(tmp_path)]) == 2
    assert "for one process, and WORLD_SIZE is 2" in capsys.readouterr().err


def test_an_export_of_another_version_is_refused(mac: Path, sets: Path, tmp_path: Path, capsys) -> None:
    content = json.loads((mac / "config.json").read_text())
    content["mnemosyne"]["version"] = 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert evaluate.main([str(tmp_path), "--tasks", "piqa", "--data", str(sets)]) == 2
    assert "format version 1; this program reads 2" in capsys.readouterr().err


def test_a_model_that_diverged_has_no_numbers(
    sets: Path, modules: Path, tokenizer_path: Path, tmp_path: Path, capsys
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out.json"
    write_exported(folder, "mac", tokenizer=tokenizer_path, diverged=True)
    asked = [str(folder), "--data", str(sets), "--json", str(output)]
    for way, task in itertools.product(("native", "huggingface"), ("piqa", "wikitext")):
        arguments = [*asked, "--through", way, "--tasks", task]
        assert evaluate.main(arguments) == 2
        assert "the model's likelihoods are not finite" in capsys.readouterr().err
        assert not output.exists()
    (tmp_path / "text.txt").write_text("ki mo ta re")
    assert evaluate.main([str(folder), "--input", str(tmp_path / "text.txt"), "--json", str(output)]) == 0
    report = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert report["loss"] is None and report["perplexity"] is None
    assert math.isnan(summarise([{"metrics": ["perplexity"], "perplexity": math.nan}])["perplexity"]["value"])
