"""Runs of several phases: killed in four of them and resumed they end bit for bit as untouched ones, on two processes
and on one; what begins anew with a phase and what goes on; runs that go on as phases of a longer one.
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

from pretrain.checkpoints import checkpoint_name
from pretrain.phases import load_phases
from pretrain.resume import TrainerState, read_trainer_state
from pretrain.schedule import learning_rate
from tests.distributed_helper import free_port, run_ranks
from tests.pretrain.test_training import read_curves
from tests.training_cases import events, losses, recipe_fields

WORKER = "tests/pretrain/phase_worker.py"
MAG = {
    "preset": "mag-tiny",
    "segment": None,
    "window": 32,
    "dim": 16,
    "num_heads": 1,
    "ffn_dim": 32,
    "num_layers": 1,
    "memory": {"chunk": 64},
}
STEPS = 4
PHASES: list[dict[str, Any]] = [
    {"name": "p64", "training": {"sequence_length": 64, "micro_batch_size": 4}},
    {
        "name": "p128",
        "model": {"rope_base": 40_000},
        "training": {"sequence_length": 128, "segment_length": 64, "micro_batch_size": 2},
        "parallel": {"zero_stage": 3},
    },
    {
        "name": "p256",
        "training": {"sequence_length": 256, "segment_length": 128, "gradient": "truncated", "truncate_every": 1},
        "data": {"order": "streams"},
        "parallel": {"zero_stage": 2},
    },
    {
        "name": "p512",
        "training": {"sequence_length": 512, "segment_length": 256, "boundary_states": "host", "batch_tokens": 1024},
        "parallel": {"activation_checkpointing": True},
    },
    {
        "name": "p1024",
        "training": {"sequence_length": 1024, "segment_length": 256, "boundary_states": "disk", "batch_tokens": 2048},
        "schedule": {"kind": "constant", "warmup_tokens": 0, "min_lr_ratio": 0.1},
        "optimizer": {"lr": 1e-3},
        "data": {"order": "documents", "reset_memory": True, "long_documents": {"at_least": 100, "share": 0.5}},
    },
]
NAMES = [phase["name"] for phase in PHASES]
DEATHS = [
    ["step", "p128", 3],
    ["beginning", "p256", 1],
    ["step", "p256", 3],
    ["publish", "p512", 2],
    ["step", "p1024", 4],
    None,
]
"""An attempt that resumes in the middle of a phase counts its steps from there."""


def write(
    data: Path, folder: Path, phases: list[dict[str, Any]] | None, *, asynchronous: bool = True, **sections: Any
) -> Path:
    """A recipe of four steps a phase, with a checkpoint at every other one. Where it is killed behind one, that must
    not be under way: not `asynchronous`.
    """
    fields = recipe_fields(data, folder, model=MAG, checkpoint={"every_tokens": None}, evaluation={"tokens": 250})
    fields["training"] |= {"batch_tokens": 512, "micro_batch_size": 1}
    fields["schedule"] = {"kind": "cosine", "warmup_tokens": 1024}
    for name, changes in sections.items():
        fields[name] |= changes
    if phases is not None:
        batches = [phase.get("training", {}).get("batch_tokens", 512) for phase in phases]
        fields["phases"] = [
            {
                **phase,
                "training": {"tokens": STEPS * batch, **phase.get("training", {})},
                "checkpoint": {"every_tokens": 2 * batch, "keep": 1, "asynchronous": asynchronous},
                "evaluation": {"every_tokens": None},
            }
            for phase, batch in zip(phases, batches, strict=True)
        ]
    path = folder.with_name(f"{folder.name}-{len(phases or [])}.yaml")
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def train_all(recipes: list[tuple[Path, list[Any]]], ranks: int) -> None:
    attempts = sum(len(each) for _, each in recipes)
    ports = [free_port() for _ in range(attempts)]
    named = json.dumps([(str(path), each) for path, each in recipes])
    run_ranks([WORKER, named, json.dumps(ports)], ranks=ranks, timeout=300)


def both_ways(data: Path, folder: Path) -> list[tuple[Path, list[Any]]]:
    """All phases in one go, and killed."""
    untouched = write(data, folder / "untouched", PHASES)
    killed = write(data, folder / "killed", PHASES, asynchronous=False)
    return [(untouched, [None]), (killed, DEATHS)]


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`untouched` and `killed` on two processes."""
    folder = tmp_path_factory.mktemp("pair")
    train_all(both_ways(data, folder), ranks=2)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process: two phases in one go, the second following a run of one phase, and the second following the first
    on two processes, killed.
    """
    folder = tmp_path_factory.mktemp("alone")
    first = pair / "untouched" / "checkpoints" / checkpoint_name(STEPS)
    shutil.copytree(first, folder / "moved" / "checkpoints" / first.name)
    later = {"name": "later", "training": {"sequence_length": 128}, "data": {"seed": 7}}
    short = {"training": {"sequence_length": 64, "tokens": STEPS * 512}, "checkpoint": {"keep": 1}}
    at_once = [{"name": "main", "training": {"sequence_length": 64}}, later]
    recipes: list[tuple[Path, list[Any]]] = [
        (write(data, folder / "at-once", at_once), [None]),
        (write(data, folder / "followed", None, **short), [None]),
        (write(data, folder / "followed", at_once), [None]),
        (write(data, folder / "moved", PHASES[:2], asynchronous=False), [["step", "p128", 3], None]),
    ]
    train_all(recipes, ranks=1)
    return folder


def assert_same_end(first: Path, second: Path, step: int) -> None:
    """Weights and both moments of the checkpoints of a step are the same bits, and so are all losses before it."""
    left, right = (folder / "checkpoints" / checkpoint_name(step) for folder in (first, second))
    files = sorted(path.name for path in left.glob("state-*"))
    assert files == sorted(path.name for path in right.glob("state-*")) != []
    for name in files:
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor.view(torch.int32), other[key].view(torch.int32)) for key, tensor in one.items())
    assert losses(first) == losses(second)
    assert list(losses(first)) == list(range(1, step + 1))


def state_at(folder: Path, step: int) -> TrainerState:
    return read_trainer_state(folder / "checkpoints" / checkpoint_name(step))


def assert_kills_left_no_trace(folder: Path) -> None:
    """The run that was killed in the phases ended as the one that was not."""
    untouched, killed = folder / "untouched", folder / "killed"
    assert_same_end(killed, untouched, STEPS * len(PHASES))
    held_out = [{event["step"]: event["loss"] for event in events(run, "eval")} for run in (killed, untouched)]
    assert held_out[0] == held_out[1]
    assert sorted(held_out[0]) == [4, 8, 12, 16, 20], "at the end of each phase"
    assert [event["step"] for event in events(killed, "resume")] == [6, 8, 10, 14, 18]
    assert len(events(killed, "start")) == len(events(killed, "done")) == 1


def test_a_run_killed_in_the_phases_ends_bit_for_bit_as_an_untouched_one(pair: Path) -> None:
    assert_kills_left_no_trace(pair)


@pytest.mark.slow
def test_so_does_a_run_of_one_process(data: Path, tmp_path: Path) -> None:
    train_all(both_ways(data, tmp_path), ranks=1)
    assert_kills_left_no_trace(tmp_path)


def test_the_optimizer_and_the_step_numbers_go_on_and_the_rate_begins_anew(pair: Path) -> None:
    folder = pair / "untouched"
    index = json.loads((folder / "checkpoints" / checkpoint_name(20) / "state.json").read_text())
    assert index["optimizer_step"] == 20
    expected = []
    for phase in load_phases(pair / "untouched-5.yaml"):
        recipe, batch = phase.recipe, phase.recipe.training.batch_tokens
        expected += [
            (phase.name, learning_rate(recipe.schedule, recipe.optimizer.lr, batch * step, batch * STEPS))
            for step in range(1, STEPS + 1)
        ]
    assert [(event["phase"], event["learning_rate"]) for event in events(folder, "step")] == expected
    assert expected[0][1] == expected[4][1] < expected[1][1], "the warm-up is done again"


def test_the_curves_are_of_one_run_and_say_the_phase(pair: Path) -> None:
    for folder in (pair / "untouched", pair / "killed"):
        curves = read_curves(folder)
        assert [point.step for point in curves["train/loss"]] == list(range(1, 21))
        assert [point.value for point in curves["train/phase"]] == [
            n for n in (1.0, 2.0, 3.0, 4.0, 5.0) for _ in "1234"
        ]
    entered = [(event["phase"], event["number"], event["step"]) for event in events(pair / "untouched", "phase")]
    assert entered == [(name, number, STEPS * (number - 1)) for number, name in enumerate(NAMES, start=1)]
    waits = [event.get("boundary_states", {}).get("place") for event in events(pair / "untouched", "phase")]
    assert waits == [None, "device", "device", "host", "disk"]


def test_the_last_checkpoint_of_each_phase_stays(pair: Path) -> None:
    for folder in (pair / "untouched", pair / "killed"):
        kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert kept == [checkpoint_name(step) for step in (4, 8, 12, 16, 20)]


def test_a_phase_begins_an_order_of_its_own(pair: Path) -> None:
    state = state_at(pair / "killed", 20)
    assert [done.name for done in state.done] + [state.phase] == NAMES
    cursors = [*(done.cursor for done in state.done), state.cursor]
    assert [cursor.seed for cursor in cursors if cursor] == [0, 1, 2, 3, 4]
    assert [cursor.order for cursor in cursors if cursor] == ["rows", "rows", "streams", "rows", "documents"]
    rows = [STEPS * 512 // 64, STEPS * 512 // 128, STEPS * 512 // 256, STEPS * 1024 // 512, STEPS * 2048 // 1024]
    assert [cursor.position for cursor in cursors if cursor] == rows
    assert state.tokens == STEPS * (3 * 512 + 1024 + 2048)
    assert state.phase_tokens == STEPS * 2048


def test_rows_carry_their_state_through_a_kill_but_not_into_another_phase(pair: Path) -> None:
    folder = pair / "untouched" / "checkpoints"
    carried = [[*(folder / checkpoint_name(step)).glob("carried-*")] for step in (8, 12, 16)]
    assert [len(files) for files in carried] == [0, 2, 0]


def test_a_checkpoint_has_the_model_of_its_phase_and_the_recipe_of_all(pair: Path) -> None:
    folder = pair / "untouched" / "checkpoints"
    bases = [json.loads((folder / checkpoint_name(s) / "model.json").read_text())["rope_base"] for s in (4, 8, 12)]
    assert bases == [10_000, 40_000, 10_000]
    assert load_phases(folder / checkpoint_name(8) / "recipe.yaml") == load_phases(pair / "untouched-5.yaml")


def test_a_run_without_phases_goes_on_as_the_first_of_several(alone: Path) -> None:
    assert [event["step"] for event in events(alone / "followed", "done")] == [STEPS, 2 * STEPS]
    assert_same_end(alone / "followed", alone / "at-once", 2 * STEPS)


def test_a_run_goes_on_with_fewer_ranks_and_resumes_again(pair: Path, alone: Path) -> None:
    assert [event["step"] for event in events(alone / "moved", "resume")] == [STEPS, STEPS + 2]
    expected = {step: loss for step, loss in losses(pair / "untouched").items() if STEPS < step <= 2 * STEPS}
    assert losses(alone / "moved") == pytest.approx(expected, rel=1e-5)
    assert state_at(alone / "moved", 2 * STEPS).ranks == 1
