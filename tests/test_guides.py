"""The guides' commands run, each to its end, on tiny things: those of the README and of the folders' guides.

Each is run in a copy of a folder that has what the guides name. What is too large for a test is made smaller by
`SMALLER` and `ADDED`; what cannot be run here is named in `NOT_RUN`, with the reason and the test that runs its like,
and parsed alone (`test_readme.py`). Those of `SLOW` are run with `-m slow`.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from pretrain.exit_codes import EXIT_PREEMPTED
from tests.distributed_helper import ROOT, free_port
from tests.guide_workplace import SECONDS, STEP, TINY, Workplace, make_workplace
from tests.guides import commands_of_guides

NOT_RUN = {
    "make demo": (
        "installs packages from the network",
        "tests/tools/test_demo.py::test_the_whole_way_and_too_little_training_is_said_so",
    ),
    "make test": ("installs packages from the network, and these are the tests", None),
    'make test PYTEST="-m slow"': ("as above, for hours", None),
    "python -m tests.slurm.scenarios": (
        "installs Slurm as root, and takes half an hour",
        "tests/slurm/test_scenarios.py::test_the_run_ends_as_if_nothing_had_happened",
    ),
    "python -m tools.bench memory --against titans-pytorch": (
        "needs titans-pytorch, which is no requirement",
        "tests/tools/bench/test_bench_rival.py::test_both_are_measured_in_turns_and_compared",
    ),
}
"""Command: why it is not run here, and the test that runs its like."""

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
    "--lengths 1024 4096 --window 1024": "--lengths 64 --window 32",
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
    f"{_BENCH} memory": "--lengths 64 --head-dim 8 --repeats 1 --threads 1",
    f"{_BENCH} attention": "--head-dim 8 --repeats 1 --threads 1",
    f"{_BENCH} train": "--lengths 64 --batch-tokens 64 --steps 1",
    f"{_BENCH} decode": "--tokens 4",
    f"{_BENCH} long": "--variants mag --gradients exact --segment-length 32 --lengths 32 64 --dim 16 --chunk-size 8"
    " --window 8 --threads 1",
    f"{_BENCH} build": "--megabytes 0.02 --rounds 1",
    f"{_BENCH} data": "--lengths 128 --document-tokens 50 --tokens 20000 --rounds 1 --resume-documents 3000",
    f"{_BENCH} checkpoint": "--rounds 1 --steps 1 --threads 1",
    f"{_BENCH} layouts": f"{_TOY} --length 32 --steps 1 --variants mag",
    f"{_BENCH} gpu --output": "--device cpu --small --parts memory attention",
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

SLOW = (
    "python -m launch local",
    "python -m launch stop",
    "torchrun",
    "deepspeed",
    *(name for name in RECORDED if not name.endswith(("build", "data"))),
    f"{_BENCH} gpu --output",
    "python -m tools.trials run",
    "python -m tools.plan",
    "python -m pretrain launch/recipes/long-tiny.yaml",
    "python -m tools.evaluate model --tasks all",
    "python -m tools.evaluate model --tasks arc_easy,arc_challenge",
    "python -m tools.evaluate model --tasks lambada,piqa --limit",
    "python -m tools.evaluate model --ruler all",
)
"""Beginnings of commands that take more than about five seconds: many start processes that import PyTorch again."""

STOPPED = "python -m launch local --nproc 1 tiny/titans-760m.yaml"
"""What is running when `python -m launch stop` is typed."""


def as_run(command: str) -> str:
    """What is run here for a command of a guide."""
    run = command
    if command.startswith(TRAINS) and "--dry-run" not in command:
        run = run.replace("launch/recipes/trials/", "RECALL/").replace("launch/recipes/", f"{TINY}/")
        run = run.replace("RECALL/", "launch/recipes/trials/")
    for written, smaller in SMALLER.items():
        run = run.replace(written, smaller)
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
        if command not in NOT_RUN:
            slow = command.startswith(SLOW)
            found.append(pytest.param(command, id=f"{guide}: {command}", marks=[pytest.mark.slow] if slow else []))
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
    if command.startswith("python -m launch stop"):
        shutil.rmtree(place.folder / "runs" / "mac-760m")  # a finished one
        with place.launched(STOPPED, log=place.folder / "runs" / "mac-760m" / "run.jsonl") as launch:
            place.assert_runs(run)
            assert launch.wait(SECONDS) == EXIT_PREEMPTED
        return
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
    beginnings = [*ADDED, *SLOW, *INTERRUPTED]
    assert [part for part in beginnings if not any(command.startswith(part) for command in commands)] == []


@pytest.mark.parametrize("test", [test for _, test in NOT_RUN.values() if test is not None])
def test_what_runs_the_like_of_a_command_is_there(test: str) -> None:
    file, name = test.split("::")
    defined = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in [node.name for node in defined if isinstance(node, ast.FunctionDef)]
