"""Export, evaluation and generation, on a checkpoint that `pretrain` wrote on two ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import ModelConfig, TitansLM
from model.generation import generate as model_generate
from parallel.state_files import load_parameters
from pretrain.checkpoints import list_checkpoints
from pretrain.data import ShardSet
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.training_cases import events, make_data, pretrain, write_recipe
from tools import evaluate, export, generate, model_directory
from tools.inspect import __main__ as inspect
from tools.model_directory import load_model_directory

STEPS = 8
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps, with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(write_recipe(data, folder, steps=STEPS, parallel={"zero_stage": 2}, evaluation={"tokens": 10**9}), ranks=2)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "model"
    assert export.main([str(run), "--output", str(output)]) == 0
    return output


def trained(run: Path) -> TitansLM:
    """The model of the newest checkpoint, put together without the exporter."""
    checkpoint = list_checkpoints(run / "checkpoints")[0]
    model = TitansLM(ModelConfig.model_validate_json((checkpoint / "model.json").read_text()))
    load_parameters(model, checkpoint)
    return model.eval()


@torch.no_grad()
def test_exported_and_reloaded_logits_are_bit_equal(run: Path, exported: Path) -> None:
    loaded = load_model_directory(exported)
    tokens = torch.randint(loaded.config.model.vocab_size, (2, 75), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model(tokens).logits, trained(run)(tokens).logits)
    assert loaded.config.step == STEPS
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("memory 記憶")) == "memory 記憶"


def test_bf16_export_rounds_the_weights(run: Path, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert export.main([str(run), "--output", str(output), "--dtype", "bfloat16"]) == 0
    whole, rounded = (load_file(folder / "model.safetensors") for folder in (exported, output))
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model_directory(output).config.step == STEPS


def test_export_never_overwrites_unasked(run: Path, exported: Path, tmp_path: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert export.main([str(run), "--output", str(exported)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert export.main([str(run), "--output", str(exported), "--overwrite"]) == 0
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    (tmp_path / "mine").write_text("precious")
    assert export.main([str(run), "--output", str(tmp_path), "--overwrite"]) == 2
    assert (tmp_path / "mine").read_text() == "precious"
    assert "does not hold an exported model" in capsys.readouterr().err


@pytest.mark.parametrize("movable", [True, False])
def test_an_export_that_fails_at_its_last_step_loses_no_model(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, movable: bool
) -> None:
    output, building = tmp_path / "model", tmp_path / ".model.new"
    shutil.copytree(exported, output)
    building.mkdir()
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if source == building or (not movable and target == output):
            raise OSError(5, "input/output error")
        replace(source, target)

    monkeypatch.setattr(model_directory.os, "replace", refusing)
    with pytest.raises(OSError, match="input/output error") as caught:
        model_directory._replace(building, output)
    old = output if movable else tmp_path / ".model.new.old"
    assert {path.name for path in old.iterdir()} == {path.name for path in exported.iterdir()}
    assert output.exists() == movable
    assert movable or f"what was there is in {old} now" in str(caught.value)


def test_export_skips_a_damaged_checkpoint_and_refuses_a_named_one(run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest, before, *_ = list_checkpoints(copy / "checkpoints")
    state = next(newest.glob("state-*.safetensors"))
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    assert export.main([str(newest), "--output", str(tmp_path / "a")]) == 2
    assert state.name in capsys.readouterr().err
    assert export.main([str(copy), "--output", str(tmp_path / "b")]) == 0
    assert state.name in capsys.readouterr().err
    assert load_model_directory(tmp_path / "b").config.step == int(before.name.removeprefix("step-"))


def test_export_of_nothing_says_what_to_give(tmp_path: Path, capsys) -> None:
    assert export.main([str(tmp_path), "--output", str(tmp_path / "a")]) == 2
    assert "holds no checkpoints" in capsys.readouterr().err
    assert export.main([str(tmp_path / "absent"), "--output", str(tmp_path / "a")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.model", "config.json", "recipe.yaml", "model_memory.py", "tokenizer.json"]
)
def test_a_damaged_or_missing_file_of_an_exported_model_is_named(
    exported: Path, tmp_path: Path, name: str, capsys
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert name in capsys.readouterr().err
    (copy / name).unlink()
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert name in capsys.readouterr().err


def test_evaluation_agrees_with_the_training_loop(run: Path, exported: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    shards = data / "validation"
    assert evaluate.main([str(exported), "--shards", str(shards), "--json", str(output), "--batch-size", "3"]) == 0
    report = json.loads(output.read_text())
    assert report["tokens"] == ShardSet.open(shards).tokens
    in_loop = events(run, "eval")[-1]
    assert report["step"] == in_loop["step"] == STEPS
    assert report["loss"] == pytest.approx(in_loop["loss"], rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(in_loop["bits_per_byte"], rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    buckets = report["by_position"]
    assert sum(row["tokens"] for row in buckets) == report["tokens"]
    assert sum(row["tokens"] * row["loss"] for row in buckets) == pytest.approx(report["loss"] * report["tokens"])
    assert [row["first"] for row in buckets] == [0, *(64 << n for n in range(len(buckets) - 1))]


def test_evaluation_of_text_equals_that_of_its_shards(
    exported: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reading a row in pieces changes nothing."""
    shards = ShardSet.open(data / "validation")
    tokenizer = load_model_directory(exported).tokenizer
    texts = [tokenizer.decode(shards.read(number)[:-1]) for number in range(shards.documents)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reports = []
    for source, piece in (("--shards", 1024), ("--input", 1024), ("--input", 37)):
        monkeypatch.setattr(evaluate, "PIECE", piece)
        path = shards.folder if source == "--shards" else tmp_path / "text.jsonl"
        command = [str(exported), source, str(path), "--context", "200", "--json", str(tmp_path / "out.json")]
        assert evaluate.main(command) == 0
        reports.append(json.loads((tmp_path / "out.json").read_text()))
    assert reports[0] == reports[1]
    assert reports[2]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)
    assert sum(len(text.encode()) for text in texts) == reports[1]["text_bytes"]


def test_evaluation_needs_one_source_of_the_same_tokenizer(exported: Path, tmp_path: Path, capsys) -> None:
    assert evaluate.main([str(exported)]) == 2
    assert "either --shards or --input" in capsys.readouterr().err
    other = make_shards(tmp_path, make_tokenizer(tmp_path, vocab_size=300), documents(3))
    assert evaluate.main([str(exported), "--shards", str(other.folder)]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_generation_prints_the_prompt_and_goes_on_alike_for_a_seed(exported: Path, capsys) -> None:
    command = [str(exported), "--prompt", "memory 記憶\n", "--max-new-tokens", "20", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert generate.main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("memory 記憶\n")
    assert len(texts[0]) > len("memory 記憶\n\n")
    assert generate.main([*command[:-1], "4"]) == 0
    assert capsys.readouterr().out != texts[0]


def test_generation_streams_what_it_would_decode_at_once(exported: Path) -> None:
    loaded = load_model_directory(exported)
    arguments = generate.parser().parse_args([str(exported), "--prompt", "", "--max-new-tokens", "60", "--seed", "1"])
    pieces = list(generate.Continuation(loaded, "ti 記", arguments).pieces())
    assert len(pieces) > 5
    prompt = [loaded.tokenizer.eos_id, *loaded.tokenizer.encode("ti 記")]
    new = model_generate(
        loaded.model,
        torch.tensor([prompt]),
        max_new_tokens=60,
        temperature=0.8,
        generator=torch.Generator().manual_seed(1),
        stop_token=loaded.tokenizer.eos_id,
    )
    assert "ti 記" + "".join(pieces) == loaded.tokenizer.decode([*prompt, *new[0].tolist()])


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--top-k", "0"), ("--top-p", "1.5")])
def test_sampling_options_out_of_range_are_named(exported: Path, option: tuple[str, str], capsys) -> None:
    assert generate.main([str(exported), "--prompt", "me", *option]) == 2
    assert option[0] in capsys.readouterr().err


def test_a_prompt_file_that_cannot_be_read_is_named(exported: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "prompt.txt"
    assert generate.main([str(exported), "--prompt-file", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    path.write_bytes(b"ok \xff")
    assert generate.main([str(exported), "--prompt-file", str(path)]) == 2
    assert "not UTF-8 at byte 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1e-44"], "--temperature is 1e-44"),
        (["--temperature", "0", "--top-k", "3"], "--top-k and --top-p have no effect"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_generation_refuses_what_it_cannot_do(exported: Path, options: list[str], message: str, capsys) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert generate.main([str(exported), "--prompt", "me", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--seed", str(10**23)], ["--seed", "-1"], ["--device", "foo"]])
def test_generation_names_an_option_that_is_out_of_range(exported: Path, options: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(exported), "--prompt", "me", *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_output_that_cannot_be_written_is_said(exported: Path) -> None:
    command = [sys.executable, "-m", "tools.generate", str(exported), "--prompt", "me", "--max-new-tokens", "2"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the output cannot be written")


def test_export_into_a_file_is_named(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("precious")
    for output in ("file", "file/x"):
        assert export.main([str(run), "--output", str(tmp_path / output)]) == 2
        assert str(tmp_path / output) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_manifest_that_leaves_out_a_file_is_refused(exported: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    manifest = json.loads((copy / "mnemosyne.json").read_text())
    del manifest["files"]["model.safetensors"]
    (copy / "mnemosyne.json").write_text(json.dumps(manifest))
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert "field files" in capsys.readouterr().err


def test_the_card_is_its_readers_and_the_rest_may_be_vouched_for_by_nobody(
    exported: Path, tmp_path: Path, capsys
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / "README.md").write_text("mine")
    assert generate.main([str(copy), "--prompt", "me", "--max-new-tokens", "2"]) == 0
    (copy / "model_memory.py").unlink()
    (copy / "mnemosyne.json").unlink()
    assert generate.main([str(copy), "--prompt", "me", "--max-new-tokens", "2"]) == 0
    (copy / "tokenizer.model").unlink()
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert "tokenizer.model: is missing; copy it" in capsys.readouterr().err
    shutil.copyfile(make_tokenizer(tmp_path, vocab_size=300), copy / "tokenizer.model")
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert "trained with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "is not an exported Titans model"),
        ({"format": "mnemosyne-model"}, "exported by an earlier version; export its checkpoint again"),
        ({"mnemosyne": {"version": 1}}, "format version 1; this program reads 2"),
        ({"mnemosyne": None}, "format version None"),
        ({"titans": {"variant": "mad"}}, "field model.variant"),
    ],
)
def test_a_config_of_another_kind_or_version_is_refused(
    exported: Path, tmp_path: Path, change: dict, message: str, capsys
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | change))
    assert generate.main([str(copy), "--prompt", "me"]) == 2
    assert message in capsys.readouterr().err


def test_weights_are_cut_into_files_with_an_index_and_read_back(
    run: Path, exported: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "model"
    assert export.main([str(run), "--output", str(output), "--max-shard-bytes", "20000"]) == 0
    shards = sorted(output.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert f"{len(shards)} files of weights" in capsys.readouterr().out
    index = json.loads((output / "model.safetensors.index.json").read_text())
    whole = load_file(exported / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for path in shards:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20000 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == path.name
            assert torch.equal(tensor, whole[name])
    one, cut = (load_model_directory(folder).model for folder in (exported, output))
    for ours, theirs in zip(one.parameters(), cut.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    shards[1].unlink()
    assert generate.main([str(output), "--prompt", "me"]) == 2
    assert shards[1].name in capsys.readouterr().err


def test_the_card_says_what_was_trained_and_measured(run: Path, exported: Path, tmp_path: Path, capsys) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert (exported / "recipe.yaml").read_text().rstrip() in card
    measured = events(run, "eval")[-1]
    assert measured["step"] == STEPS
    assert f"| bits per byte | {measured['bits_per_byte']:.4f} |" in card
    assert f"over {measured['scored_tokens']:,} tokens" in card
    config = load_model_directory(exported).config
    assert config.data_fingerprint in card
    assert config.tokenizer_sha256 in card
    before = list_checkpoints(run / "checkpoints")[1]
    alone = tmp_path / before.name
    shutil.copytree(before, alone)
    assert export.main([str(alone), "--output", str(tmp_path / "unmeasured")]) == 0
    assert "Not measured yet." in (tmp_path / "unmeasured" / "README.md").read_text()
    step = load_model_directory(tmp_path / "unmeasured").config.step
    result = {"loss": 1.25, "perplexity": 3.5, "tokens": 1234, "context": 99, "step": step}
    (tmp_path / "result.json").write_text(json.dumps(result))
    command = [str(alone), "--output", str(tmp_path / "measured"), "--evaluation"]
    assert export.main([*command, str(tmp_path / "result.json")]) == 0
    card = (tmp_path / "measured" / "README.md").read_text()
    assert "over 1,234 tokens, in rows of 99" in card
    assert "| loss, nats a token | 1.2500 |" in card
    assert "bits per byte |" not in card
    capsys.readouterr()
    assert export.main([*command[:-2], str(tmp_path / "x"), "--evaluation", str(alone / "model.json")]) == 2
    assert "holds no loss" in capsys.readouterr().err
    for wrong in (STEPS, None):
        (tmp_path / "result.json").write_text(json.dumps(result | {"step": wrong}))
        assert export.main([*command[:-2], str(tmp_path / "x"), "--evaluation", str(tmp_path / "result.json")]) == 2
        assert f"at step {wrong}, and the checkpoint is of step {step}" in capsys.readouterr().err


def test_evaluation_of_shards_refuses_options_for_documents(exported: Path, data: Path, tmp_path: Path, capsys) -> None:
    command = [str(exported), "--shards", str(data / "validation")]
    assert evaluate.main([*command, "--text-field", "body", "--glob", "*.py"]) == 2
    error = capsys.readouterr().err
    assert "--glob, --text-field with --shards" in error
    assert evaluate.main([*command, "--json", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_inspect_sees_the_same_memories_in_a_run_a_checkpoint_and_its_export(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    found = []
    for state in (run, list_checkpoints(run / "checkpoints")[0], exported):
        assert inspect.main(["memory", str(state), "--json", str(tmp_path / "found.json")]) == 0
        found.append(json.loads((tmp_path / "found.json").read_text())["rows"])
    assert found[0] == found[1] == found[2]
    cores = [dict(module.named_parameters()) for module in trained(run).modules() if hasattr(module, "learned")]
    matrix = found[0][0][-1]
    weight = cores[matrix["layer"]][f"initial_{matrix['matrix']}"][matrix["head"]]
    assert matrix["norm"] == pytest.approx(weight.norm().item(), rel=1e-5)
