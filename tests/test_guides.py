"""The guides' commands run, each to its end, on tiny things: those of the README and of the folders' guides.

Each is run in a copy of a folder that has what the guides name. What is too large for a test is made smaller by
`SMALLER` and `ADDED`; what cannot be run here is named in `NOT_RUN`, with the reason, and parsed alone
(`test_readme.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed_helper import ROOT, free_port
from tests.guide_workplace import STEP, TINY, Workplace, make_workplace
from tests.guides import commands_of_guides

NOT_RUN = {
    "make demo": "installs packages from the network; tests/tools/test_demo.py runs what it starts",
    "make test": "installs packages from the network, and these are the tests",
    'make test PYTEST="-m slow"': "as above, for hours",
    "python -m tests.slurm.scenarios": "installs Slurm as root, and takes half an hour",
    "python -m tools.bench memory --against titans-pytorch": "needs titans-pytorch, which is no requirement",
}
"""Command: why it can't be run here."""

SMALLER = {
    "--vocab-size 32000": "--vocab-size 400",
    "step-00000954": f"step-{STEP:08}",
    "--ranks 64 --tensor 4": "--ranks 4 --tensor 2",
    "--nproc 8": "--nproc 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--num_gpus 8": "--num_gpus 2",
    "--device cuda": "--device cpu",
    "--nnodes 4": "--nnodes 1",
    "node1:29500": "localhost:{port}",
    "--context 2097152 --compare-reset 4096": "--context 2048 --compare-reset 512",
    "--context 65536 --compare-reset 4096": "--context 2048 --compare-reset 512",
    "--lengths 4096,65536,2097152": "--lengths 700,900",
    "--lengths 4096,65536,1048576": "--lengths 700,900",
    "--lengths 4096,2097152": "--lengths 700,900",
    "--samples 20": "--samples 1",
    "--phases.32k.training.tokens 2B": "--phases.32k.training.tokens 256",
    "--lengths 1024 4096 --window 1024": "--lengths 64 128 --window 32",
    "--context 8192": "--context 256",
}
"""What is written in commands, and what stands for it here."""

TRAINS = ("python -m launch local", "torchrun", "deepspeed", "python -m pretrain")
"""Commands of recipes that are trained; with --dry-run the real recipe is planned."""

REAL = "launch/recipes/titans-", "launch/recipes/long-340m"
"""Recipes that do not fit the tiny data and the tiny model: they are planned for such as are not there yet."""

_BENCH = "python -m tools.bench"
_TOY = "--dim 16 --heads 2 --layers 2 --chunk-size 8 --window 16"
ADDED = {
    "tensorboard": "--inspect",  # which shows what there is, and ends
    "python -m launch local --nproc 8 launch/recipes/titans-340m.yaml --optimizer": "--folder runs/another",
    "python -m launch local --nproc 8 --restarts": "--folder runs/another",
    "torchrun --nnodes": "--folder runs/another",
    "deepspeed": "--folder runs/another",
    "python -m pretrain launch/recipes/titans-340m.yaml --initialize_from": "--folder runs/another",
    "python -m pretrain launch/recipes/trials": "--training.tokens 7680 --schedule.warmup_tokens 768",
    "python -m tools.evaluate model --ruler all": "--lengths 900",
    "python -m tools.evaluate model --ruler": "--samples 1",
    "python -m tools.evaluate model --babi": "--samples 1",
    f"{_BENCH} memory": "--lengths 64 128 --head-dim 8 --repeats 1 --threads 1",
    f"{_BENCH} attention": "--head-dim 8 --repeats 1 --threads 1",
    f"{_BENCH} train": "--lengths 64 --batch-tokens 64 --steps 1",
    f"{_BENCH} decode": "--tokens 4",
    f"{_BENCH} long": "--segment-length 32 --lengths 32 64 --dim 16 --chunk-size 8 --window 8 --threads 1",
    f"{_BENCH} build": "--megabytes 0.02 --rounds 1",
    f"{_BENCH} data": "--lengths 128 --document-tokens 50 --tokens 20000 --rounds 1 --resume-documents 3000",
    f"{_BENCH} checkpoint": "--rounds 1 --steps 1 --threads 1",
    f"{_BENCH} layouts": f"{_TOY} --length 32 --steps 1 --variants mag",
    f"{_BENCH} gpu --output": "--device cpu --small",
    "python -m tools.trials run": "--workers 1",
    "python -m tools.trials report": str(ROOT / "tools" / "trials" / "records" / "cpu.json"),
}
"""What a command begins with, and the words that are put behind it."""
RECORDED = tuple(
    f"{_BENCH} {name}"
    for name in ("memory", "attention", "train", "decode", "long", "build", "data", "checkpoint", "layouts")
)
"""Commands that write a record into the repository's own folder of records, unless they are told another."""

INTERRUPTED = ("python -m launch logs mac-760m --follow",)
"""Commands that go on until Ctrl-C."""

OTHER_TESTS = {
    "python -m launch local": "tests/launch",
    "python -m launch stop": "tests/launch",
    "python -m launch slurm --nodes 4 --gpus-per-node 8 --dry-run": "tests/launch",
    "torchrun": "tests/launch/test_other_launchers.py, tests/tools/evaluation",
    "deepspeed": "tests/launch/test_other_launchers.py",
    **{name: "tests/tools/bench" for name in RECORDED if not name.endswith("build")},
    f"{_BENCH} gpu --output": "tests/tools/bench",
    "python -m tools.trials run": "tests/tools/trials",
    "python -m tools.shards build": "tests/tools/test_shards.py",
    "python -m tools.evaluate model --shards data/validation --context": "tests/tools/test_model_tools.py",
    "python -m tools.evaluate model --input": "tests/tools/test_model_tools.py",
    "python -m tools.evaluate model --tasks lambada,piqa --limit": "tests/tools/evaluation",
    "python -m tools.evaluate model --tasks arc_easy": "tests/tools/evaluation",
}
"""Beginnings of commands that are not run here as they are written, and the tests that run their like."""


def as_run(command: str) -> str:
    """What is run here for a command of a guide."""
    run = command
    if command.startswith(TRAINS) and "--dry-run" not in command:
        run = run.replace("launch/recipes/trials/", "RECALL/").replace("launch/recipes/", f"{TINY}/")
        run = run.replace("RECALL/", "launch/recipes/trials/")
    for written, smaller in SMALLER.items():
        run = run.replace(written, smaller)
    if not {"--print", "--dry-run"} & set(command.split()):  # a launcher's options stand before the recipe
        run = run.replace("python -m launch slurm", "python -m launch slurm --print")
    run = " ".join([run, *(words for beginning, words in ADDED.items() if command.startswith(beginning))])
    if command.startswith("python -m tools.trials run"):
        run = run.replace("tools.trials run", "tools.trials run suite/suite.yaml")
    if command.startswith(RECORDED):
        run += " --record record.json"
    return run.format(port=free_port()) if "{port}" in run else run


def cases() -> list[object]:
    """The commands to be run, as test cases named after their guides."""
    found = []
    for command, guide in commands_of_guides().items():
        if command not in NOT_RUN and not command.startswith(tuple(OTHER_TESTS)):
            found.append(pytest.param(command, id=f"{guide}: {command}"))
    return found


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("guides") / "place")


@pytest.mark.parametrize("command", cases())
def test_command_runs(command: str, workplace: Workplace, tmp_path: Path) -> None:
    place, run = workplace.copy(tmp_path / "place"), as_run(command)
    place.clear_output(run)
    if any(recipe in run for recipe in REAL):
        for name in ("data", "model"):
            shutil.rmtree(place.folder / name)
    place.assert_runs(run, interrupt_after=2.0 if command in INTERRUPTED else 0.0)


@pytest.mark.parametrize(
    "command",
    [
        "python -m tools.checkpoint verify runs/no-such-run",
        "python -m tools.checkpoint verify runs/mac-340m --no-such-flag",
        "python -m pretrain launch/recipes/titans-340m.yaml --dry-run --model.no_such_field 1",
        "python -m tools.no_such_tool",
        "tensorboard --no-such-flag",
    ],
)
def test_a_command_that_does_not_run_is_seen(command: str, workplace: Workplace) -> None:
    with pytest.raises(AssertionError, match="exit [12]"):
        workplace.assert_runs(command)


def test_the_tables_speak_of_commands_that_there_are() -> None:
    """What no guide says any more goes from here, too."""
    commands = list(commands_of_guides())
    assert set(NOT_RUN) <= set(commands)
    assert [part for part in SMALLER if not any(part in command for command in commands)] == []
    beginnings = [*ADDED, *OTHER_TESTS, *INTERRUPTED]
    assert [part for part in beginnings if not any(command.startswith(part) for command in commands)] == []
