"""Spikes in runs on two ranks: they are skipped and gone back behind in every ZeRO stage, where ranks share the layers
or each of them, and where rows carry their state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed_helper import run_ranks
from tests.pretrain.spike_worker import SPIKES
from tests.pretrain.spikes_by_place import numbers
from tests.training_cases import VOCABULARY, events, losses, recipe_fields

STEPS = 17
LAST = STEPS + len(SPIKES) + 1
"""One step was taken between the checkpoint and the spikes."""
SIZES = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
TRANSFORMER = {"preset": "transformer-tiny", **SIZES}
LMM = {"preset": "lmm-tiny", "memory": {"chunk": 8}, **SIZES}
PLANS: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2": {"parallel": {"zero_stage": 2}},
    "zero3": {"parallel": {"zero_stage": 3}},
    "bf16": {"parallel": {"precision": "bf16"}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "tensor": {"parallel": {"tensor": 2}},
    "streams": {"data": {"order": "streams"}},
}
FP32 = ("zero1", "zero2", "zero3", "pipeline", "tensor")


def recipe_of(data: Path, folder: Path, sections: dict[str, Any]) -> str:
    every = {"checkpoint": {"every_tokens": 4 * 128, "keep": 9}, "evaluation": {"every_tokens": None}}
    fields = recipe_fields(data, folder, steps=STEPS, **every)
    for section, changes in sections.items():
        fields[section] = fields[section] | changes
    fields["model"] = LMM if folder.name == "streams" else TRANSFORMER
    fields["guards"] = {"on_spike": "skip", "loss_z": 30.0, "window": 12, "warmup_steps": 10, "max_spikes": 2}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields))
    return str(path)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    recipes = [recipe_of(data, folder / name, sections) for name, sections in PLANS.items()]
    run_ranks(["tests/pretrain/spike_worker.py", str(folder / "seen.json"), *recipes], ranks=2, timeout=900)
    return folder


@pytest.mark.parametrize("plan", PLANS)
def test_spikes_are_skipped_and_gone_back_behind(runs: Path, plan: str) -> None:
    folder = runs / plan
    found = [(spike["step"], spike["action"], spike["in_a_row"]) for spike in events(folder, "spike")]
    assert found == [(step, "skip", step - 13) for step in numbers(SPIKES)]
    (back,) = events(folder, "rollback")
    assert (back["from_step"], back["to_step"], back["to_tokens"]) == (15, 12, 12 * 128)
    assert json.loads((runs / "seen.json").read_text())[plan] == list(range(LAST)), "no data twice"
    assert list(losses(folder)) == list(range(1, LAST + 1))
    assert events(folder)[-1]["event"] == "done" and events(folder)[-1]["tokens"] == STEPS * 128


@pytest.mark.parametrize("plan", PLANS)
def test_weights_and_optimizer_are_those_of_the_checkpoint_again(runs: Path, plan: str) -> None:
    of_step = {
        step: {
            path.name: path.read_bytes() for path in (runs / plan / "checkpoints" / f"step-{step:08d}").glob("state*")
        }
        for step in (12, 15)
    }
    assert of_step[12] == of_step[15] and len(of_step[12]) >= 3


@pytest.mark.parametrize("plan", FP32[1:])
def test_every_layout_goes_on_alike(runs: Path, plan: str) -> None:
    assert losses(runs / plan) == pytest.approx(losses(runs / FP32[0]), rel=1e-4)


def test_a_row_begins_anew_where_its_data_go_on_elsewhere(runs: Path) -> None:
    """What it carried belongs to the text that was left out."""
    of_step = {step: (runs / "streams" / "checkpoints" / f"step-{step:08d}").glob("carried*") for step in (12, 15)}
    before, after = ({path.name: path.stat().st_size for path in of_step[step]} for step in (12, 15))
    assert before.keys() == after.keys() and len(before) == 2
    assert all(after[name] < before[name] for name in before), "there is nothing in it"
