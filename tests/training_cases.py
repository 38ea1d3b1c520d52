"""A small corpus, a small MAC, and whole runs of `python -m pretrain`, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model import ModelConfig, TitansLM
from parallel.state_files import load_parameters
from pretrain.checkpoints import CHECKPOINTS_FOLDER, checkpoint_name
from tests.data_cases import documents, make_tokenizer, write_jsonl
from tests.distributed_helper import Finished, run_ranks
from tools import export
from tools.documents import DocumentReader
from tools.model_directory import load_model_directory
from tools.shards.build import build

VOCABULARY = 400
MODEL = {
    "preset": "mac-tiny",
    "vocab_size": VOCABULARY,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 48,
    "segment": 16,
    "num_persistent": 2,
    "memory": {"chunk": 8},
}


def make_data(folder: Path, number: int = 300, words: int = 60) -> Path:
    """Training and validation shards of texts of `words` words on average below `folder`; returns the folder that holds
    both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, VOCABULARY)
    reader = DocumentReader([write_jsonl(folder / "input.jsonl", documents(number, words=words))])
    build(reader, tokenizer, folder / "shards", shard_tokens=8000, validation_fraction=0.1)
    return folder / "shards"


def recipe_fields(data: Path, folder: Path, *, steps: int = 12, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of `steps` steps of 4 rows of 32 tokens, sections updated by `sections`."""
    fields: dict[str, Any] = {
        "name": "test",
        "folder": str(folder),
        "model": dict(MODEL),
        "data": {"train": str(data / "train"), "validation": str(data / "validation"), "num_workers": 1},
        "training": {"tokens": 128 * steps, "sequence_length": 32, "batch_tokens": 128, "micro_batch_size": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "cosine", "warmup_tokens": 256},
        "parallel": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every_tokens": 512, "keep": 2},
        "evaluation": {"every_tokens": 1024, "tokens": 250},
        "logging": {"every_steps": 1},
    }
    for name, changes in sections.items():
        fields[name] = {**fields[name], **changes}
    return fields


def write_recipe(data: Path, folder: Path, *, steps: int = 12, **sections: Mapping[str, Any]) -> Path:
    """The recipe as a file beside the run's folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_fields(data, folder, steps=steps, **sections)))
    return path


def write_synthetic_recipe(folder: Path, *, steps: int = 14, **sections: Mapping[str, Any]) -> Path:
    """As `write_recipe`, of recall over 8 to 16 tokens: it needs no shards."""
    fields = recipe_fields(Path("none"), folder, steps=steps)
    task = {"kind": "recall", "num_pairs": 4, "num_queries": 4, "filler": [8, 16], "num_keys": 8, "num_values": 8}
    fields["data"] = {"kind": "synthetic", "num_workers": 1, "task": task}
    for name, changes in sections.items():
        fields[name] = {**fields[name], **changes}
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields))
    return path


def pretrain(
    recipe: Path,
    *options: str,
    ranks: int = 1,
    check: bool = True,
    timeout: float = 180.0,
    threads: int = 1,
    kill_when: Callable[[], bool] | None = None,
) -> Finished:
    """`python -m pretrain RECIPE OPTIONS` on `ranks` processes."""
    arguments = ["-m", "pretrain", str(recipe), *options]
    return run_ranks(arguments, ranks=ranks, check=check, timeout=timeout, kill_when=kill_when, threads=threads)


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of a run's run.jsonl, of one kind or all."""
    path = folder / "run.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    parsed = []
    for line in lines:
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:  # the line that a killed run did not finish
            continue
    return [event for event in parsed if kind is None or event["event"] == kind]


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step, as last written."""
    return {event["step"]: event["loss"] for event in events(folder, "step")}


def rank_process(folder: Path, rank: int) -> int:
    """The number of the newest process on this machine that is a rank of the run in a folder, whose recipe is beside it
    (as the functions above write it). Raises AssertionError where there is none.
    """
    recipe, found = str(folder.with_suffix(".yaml")).encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"pretrain" in words and b"-m" in words and recipe in words and f"RANK={rank}".encode() in variables:
            found.append(int(process.name))
    assert found, f"no process of rank {rank}"
    return max(found)


def checkpoint(folder: Path, step: int) -> Path:
    """The folder of a run's checkpoint behind a step."""
    return folder / CHECKPOINTS_FOLDER / checkpoint_name(step)


def weights_and_optimizer(folder: Path, step: int) -> dict[str, bytes]:
    """What the checkpoint's files of weights and moments hold, by their names."""
    return {path.name: path.read_bytes() for path in checkpoint(folder, step).glob("state*")}


def assert_same_learning(found: Path, expected: Path, *, steps: int) -> None:
    """Two runs of so many steps, of other layouts, have the same losses and gradient norms."""
    assert len(losses(found)) == steps and losses(found) == pytest.approx(losses(expected), rel=1e-5)
    norms, others = ([event["gradient_norm"] for event in events(run, "step")] for run in (found, expected))
    assert norms == pytest.approx(others, rel=1e-3)


def assert_same_scores(found: Path, expected: Path) -> None:
    """Two runs of other layouts have scored the same held-out text, once each, and alike."""
    (score,), (other,) = (events(run, "eval") for run in (found, expected))
    assert (score["scored_tokens"], score["text_bytes"]) == (other["scored_tokens"], other["text_bytes"])
    assert score["loss"] == pytest.approx(other["loss"], rel=1e-5)


@torch.no_grad()
def assert_exports_the_same(found: Path, expected: Path, place: Path, *, step: int) -> None:
    """`python -m tools.export` of a run's last checkpoint gives the logits of the whole model that the checkpoint's
    files make, to the bit, and, up to what training in another layout differs by, those of the other run.
    """
    logits = []
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    for run in (found, expected):
        assert export.main([str(run), "--output", str(place / run.name)]) == 0
        loaded = load_model_directory(place / run.name)
        assert loaded.config.step == step
        logits.append(loaded.model(tokens).logits)
    saved = checkpoint(found, step)
    model = TitansLM(ModelConfig.model_validate_json((saved / "model.json").read_text()))
    load_parameters(model, saved)
    assert torch.equal(logits[0], model.eval()(tokens).logits)
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)
