"""Out to transformers, written by it again, and back: the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import UserError
from pretrain.exported import ExportedWeights, check_files, read_config
from pretrain.initialization import is_exported, open_initial_weights
from tests.tools.huggingface.exported_cases import write_exported
from tools.model_directory import load_model_directory


@pytest.mark.parametrize("case", ["mac", "lmm", "transformer"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=str)
def test_what_transformers_writes_again_has_the_bytes_that_were_exported(
    hf: Any, exported, tmp_path: Path, case: str, options: dict[str, str]
) -> None:
    folder, own = exported(case)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    again = tmp_path / "again"
    model.save_pretrained(again, **options)
    assert (again / "model.safetensors.index.json").exists() == bool(options)
    assert is_exported(again)
    check_files(again)
    assert read_config(again) == read_config(folder)
    with open_initial_weights(again) as weights:
        assert weights.shapes.keys() == {name for name, _ in own.named_parameters()}
        for name, parameter in own.named_parameters():
            assert torch.equal(weights.tensor(name), parameter)
            assert torch.equal(weights.read("weight", name, 3, 5), parameter.detach().flatten()[3:8])
    shutil.copy(folder / "tokenizer.model", again)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model_directory(again).model(ids).logits, own(ids).logits)
        # Its code was written along, and a model of it is the same once more.
        once_more = hf.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
        assert torch.equal(once_more(ids).logits, own(ids).logits)


@torch.no_grad()
def test_weights_in_several_files_are_loaded_as_those_in_one(hf: Any, tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    own = write_exported(folder, "mac", tokenizer=tokenizer_path, max_shard_bytes=4000)
    assert len(list(folder.glob("model-0*.safetensors"))) > 3 and not (folder / "model.safetensors").exists()
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(4, 40)[None]
    assert torch.equal(model(ids).logits, own(ids).logits)


def test_what_was_learned_in_transformers_comes_back(hf: Any, exported, tmp_path: Path) -> None:
    folder, own = exported("mag")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(4, 40)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    shutil.copy(folder / "tokenizer.model", tmp_path / "tuned")
    tuned = load_model_directory(tmp_path / "tuned").model
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, model.eval()(ids).logits)
        assert not torch.equal(tuned(ids).logits, own(ids).logits)


@pytest.mark.parametrize("case", ["mac", "transformer-window"])
def test_bf16_and_auto_dtype(hf: Any, exported, case: str) -> None:
    folder, own = exported(case)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = load_model_directory(folder, dtype=torch.bfloat16).model(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert model(ids).past_key_values.state.layers[0].attention.k.dtype == torch.bfloat16
    auto = hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert auto.dtype == torch.float32


def test_a_configuration_alone_makes_a_model_with_the_starts_of_training(hf: Any, exported) -> None:
    folder, own = exported("mac")
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    torch.manual_seed(3)
    expected = type(own)(own.config)
    for (name, found), wanted in zip(model.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def changed_weights(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of an exported model, as transformers writes one, whose weights were changed."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("mnemosyne.json"))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("case", "name"),
    [("mac", "model.norm.weight"), ("lmm", "model.head.weight"), ("mac", "model.embedding.weight")],
)
def test_a_weight_that_is_missing_is_told(hf: Any, exported, tmp_path: Path, case: str, name: str) -> None:
    """And not left to what the memory holds."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if name == "model.embedding.weight":  # which transformers takes from the head where the two are tied
            tensors.pop("model.head.weight", None)

    folder = changed_weights(exported(case)[0], tmp_path / "model", drop)
    with pytest.raises(ValueError, match=f"the weights lack {name}"):
        hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(UserError, match=name.removeprefix("model.")):
        load_model_directory(folder)


def test_a_weight_of_another_shape_is_told_also_where_it_may_differ(hf: Any, exported, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()

    folder = changed_weights(exported("mac")[0], tmp_path / "model", cut)
    with pytest.raises(ValueError, match="the weights lack model.norm.weight"):
        hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, ignore_mismatched_sizes=True)


def test_loading_tells_what_it_found_where_it_is_asked_to(hf: Any, exported) -> None:
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, info = hf.AutoModelForCausalLM.from_pretrained(exported("mac")[0], **options)
    assert not info["missing_keys"] and model.config.vocab_size == len(model.get_input_embeddings().weight)


def test_a_tied_head_that_is_not_the_embedding_is_refused(exported, tmp_path: Path) -> None:
    folder, own = exported("mac")
    embedding = own.embedding.weight.detach()
    with_head = changed_weights(folder, tmp_path / "equal", lambda t: t.update({"model.head.weight": embedding + 0}))
    with ExportedWeights(with_head) as weights:
        assert "head.weight" not in weights.shapes
    other = changed_weights(folder, tmp_path / "other", lambda t: t.update({"model.head.weight": embedding + 1}))
    with pytest.raises(UserError, match="head.weight and model.embedding.weight differ"):
        load_model_directory(other)


def test_weights_that_are_not_the_models_are_told(hf: Any, exported, tmp_path: Path) -> None:
    folder, _ = exported("mac")
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["titans"]["ffn_dim"] = config["intermediate_size"] = 32
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match="size|mismatch"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
