"""Runs that begin from given weights: the very bits of an exported model or a checkpoint, a new optimizer, and what is
refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from parallel.mesh import Layout, Mesh
from parallel.process import World, initialize, shutdown
from parallel.state_files import StateReader, read_parameters
from pretrain.checkpoints import checkpoint_name
from pretrain.data import TokenizerInfo
from pretrain.errors import UserError
from pretrain.initialization import check_initial_weights, open_initial_weights
from pretrain.loop import build_engine
from pretrain.phases import Phases, load_phases
from pretrain.plan import describe
from tests.checkpoint_cases import make_checkpoint, small_model, value_of
from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, write_recipe
from tools.export import DTYPES, export

WORKER = "tests/pretrain/train_worker.py"
STEPS = 2


@pytest.fixture(scope="module")
def world():
    yield initialize("cpu")
    shutdown()


def recipe_from(data: Path, folder: Path, source: Path | None, **sections: Any) -> Path:
    """A recipe of two steps with another RoPE base, whose weights come from `source`."""
    path = write_recipe(data, folder, steps=STEPS, checkpoint={"every_tokens": None}, **sections)
    if source is not None:
        path.write_text(
            f"initialize_from: {source}\n" + path.read_text().replace("model:\n", "model:\n  rope_base: 5e5\n")
        )
    return path


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks a run under ZeRO 3, and runs from its last checkpoint: under ZeRO 1, in bf16, and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "source" / "checkpoints" / checkpoint_name(STEPS)
    recipes = [recipe_from(data, folder / "source", None, parallel={"zero_stage": 3})]
    recipes.append(recipe_from(data, folder / "from-checkpoint", source))
    again = recipe_from(data, folder / "again", source)
    longer = again.rename(folder / "again-longer.yaml")
    again.write_text(longer.read_text())
    longer.write_text(longer.read_text().replace(f"tokens: {128 * STEPS}\n", f"tokens: {256 * STEPS}\n"))
    later = later_phases(data, folder, source)
    run_ranks([WORKER, *map(str, [*recipes, again, longer, *later])], ranks=2, timeout=300)
    return folder


def later_phases(data: Path, folder: Path, source: Path) -> list[Path]:
    """A recipe of three phases that begins with the second, and one that lists the last two alone."""
    training = {"sequence_length": 64, "segment_length": 32, "micro_batch_size": 1}
    listed = [
        {"name": "first", "training": {"batch_tokens": 256}},
        {"name": "second", "training": training, "data": {"seed": 1}},
        {"name": "third", "data": {"seed": 2}},
    ]
    recipes = []
    for name, start, phases in (("begun-later", "start_phase: second\n", listed), ("without", "", listed[1:])):
        path = recipe_from(data, folder / name, source)
        path.write_text(start + path.read_text() + yaml.safe_dump({"phases": phases}))
        recipes.append(path)
    return recipes


@pytest.fixture(scope="module")
def checkpoint(runs: Path) -> Path:
    return runs / "source" / "checkpoints" / checkpoint_name(STEPS)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "model")


def phases_from(data: Path, folder: Path, source: Path, **sections: Any) -> Phases:
    return load_phases(recipe_from(data, folder / "run", source, **sections))


def tokenizer_of(phases: Phases) -> TokenizerInfo | None:
    return phases.run.data.open(0, grid=phases.run.model.grid).train.tokenizer


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
@pytest.mark.parametrize("parallel", [{"zero_stage": 0}, {"zero_stage": 3}, {"precision": "bf16"}], ids=str)
def test_an_engine_takes_every_bit_of_the_weights_and_no_moments(
    data: Path, checkpoint: Path, exported: Path, world: World, tmp_path: Path, kind: str, parallel: dict[str, Any]
) -> None:
    source = checkpoint if kind == "checkpoint" else exported
    run = phases_from(data, tmp_path, source, parallel=parallel).run
    engine = build_engine(run, run.batches(1), Mesh.data_parallel(world))
    with open_initial_weights(source) as weights:
        engine.load_weights(weights)
    expected, found = read_parameters(checkpoint), engine.full_parameters()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    (tmp_path / "state").mkdir()
    engine.save(tmp_path / "state")
    assert json.loads((tmp_path / "state" / "state.json").read_text())["optimizer_step"] == 0
    saved = load_file(tmp_path / "state" / "state-00000-of-00001.safetensors")
    assert all(not tensor.any() for name, tensor in saved.items() if not name.startswith("weight:"))
    engine.destroy()


def test_a_run_begins_with_the_loss_of_the_given_weights_and_counts_from_1(runs: Path) -> None:
    source, begun = losses(runs / "source"), losses(runs / "from-checkpoint")
    assert list(begun) == [1, 2]
    assert begun[1] < source[1] - 0.1, "the first rows again, with what was learned from them"
    (start,) = events(runs / "from-checkpoint", "start")
    assert start["recipe"]["initialize_from"] == str(runs / "source" / "checkpoints" / checkpoint_name(STEPS))


def test_a_run_with_a_checkpoint_goes_on_from_that(runs: Path) -> None:
    assert [event["step"] for event in events(runs / "again", "resume")] == [STEPS]
    assert list(losses(runs / "again")) == [1, 2, 3, 4]
    assert losses(runs / "again")[1] == losses(runs / "from-checkpoint")[1]


def test_a_run_that_begins_with_a_later_phase_is_the_run_without_those_before(runs: Path) -> None:
    begun, without = runs / "begun-later", runs / "without"
    assert [event["phase"] for event in events(begun, "phase")] == ["second", "third"]
    assert list(losses(begun)) == [1, 2, 3, 4]
    assert losses(begun) == losses(without)
    first, second = (read_parameters(run / "checkpoints" / checkpoint_name(4)) for run in (begun, without))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], weight) for name, weight in second.items())


def refused(phases: Phases, tokenizer: TokenizerInfo | None) -> str:
    with pytest.raises(UserError) as caught:
        check_initial_weights(phases.run, tokenizer, every_byte=True)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_another_model_or_tokenizer_is_refused_by_name(
    data: Path, checkpoint: Path, exported: Path, tmp_path: Path, kind: str
) -> None:
    source = checkpoint if kind == "checkpoint" else exported
    phases = phases_from(data, tmp_path, source)
    tokenizer = tokenizer_of(phases)
    check_initial_weights(phases.run, tokenizer, every_byte=True)
    wider = phases_from(data, tmp_path, source, model={"ffn_dim": 64, "memory": {"chunk": 4}})
    message = refused(wider, tokenizer)
    assert "model.ffn_dim is 48 in it, 64 in the recipe; model.memory.chunk is 8 in it, 4 in the recipe" in message
    assert "rope_base" not in message
    with pytest.raises(UserError, match=r"model\.ffn_dim is 48"):
        describe(wider, 1)
    assert "was trained with another tokenizer (sha256 " in refused(phases, None)
    assert "# initial weights     of " in describe(phases, 1)


def test_what_holds_no_whole_weights_is_refused(
    data: Path, runs: Path, checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    assert "no such folder" in refused(phases_from(data, tmp_path, tmp_path / "absent"), None)
    assert "is not there yet" in describe(phases_from(data, tmp_path, tmp_path / "absent"), 1)
    assert "give an exported model or a checkpoint" in refused(phases_from(data, tmp_path, data), None)
    assert f"one of the checkpoints in it, such as {checkpoint}" in refused(
        phases_from(data, tmp_path, runs / "source"), None
    )
    for source, file in ((checkpoint, "state-00000-of-00002.safetensors"), (exported, "model.safetensors")):
        damaged = tmp_path / f"damaged-{source.name}"
        shutil.copytree(source, damaged)
        content = bytearray((damaged / file).read_bytes())
        content[-1] ^= 1
        (damaged / file).write_bytes(content)
        assert file in refused(phases_from(data, tmp_path, damaged), None)


def test_an_export_of_half_the_bits_is_taken_as_it_is(
    data: Path, checkpoint: Path, world: World, tmp_path: Path
) -> None:
    rounded = export(checkpoint, tmp_path / "model", dtype=DTYPES["bfloat16"])
    run = phases_from(data, tmp_path, rounded).run
    engine = build_engine(run, run.batches(1), Mesh.data_parallel(world))
    with open_initial_weights(rounded) as weights:
        engine.load_weights(weights)
    expected = read_parameters(checkpoint)
    found = engine.full_parameters()
    assert all(torch.equal(found[name], weight.bfloat16().float()) for name, weight in expected.items())
    engine.destroy()


def test_a_rank_opens_the_files_of_a_checkpoint_that_it_needs_alone(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", Layout(data=3))
    with open_initial_weights(checkpoint, nearest=1.0) as weights:
        assert isinstance(weights, StateReader)
        numel = weights.shapes["embedding.weight"].numel()
        values = weights.read("weight", "embedding.weight", numel - 8, 8)
        assert weights.num_open == 1
    config = small_model(tmp_path / "run")
    assert torch.equal(values, value_of(config, "embedding.weight", "weight").flatten()[-8:])
