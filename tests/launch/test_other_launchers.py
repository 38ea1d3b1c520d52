"""The launchers that users have: torchrun and DeepSpeed's, as launch/README.md says to call them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed_helper import ROOT, free_port
from tests.training_cases import events, losses, pretrain, rank_process, write_synthetic_recipe

pytestmark = pytest.mark.slow

STEPS = 6
BIN = Path(sys.executable).parent


def start(command: list[str]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    pretrain(write_synthetic_recipe(folder, steps=STEPS), ranks=2)
    return losses(folder)


def launchers() -> dict[str, list[str]]:
    port = str(free_port())
    return {
        "torchrun": ["torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--master-port", port, "-m", "pretrain"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port, "--no_local_rank", "--module", "pretrain"],
    }


@pytest.mark.parametrize("name", launchers())
def test_a_run_is_the_same_under_other_launchers(name: str, expected: dict[int, float], tmp_path: Path) -> None:
    recipe = write_synthetic_recipe(tmp_path / "run", steps=STEPS)
    process = start([*launchers()[name], str(recipe), "--logging.every_steps", "1"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("name", launchers())
def test_a_run_under_other_launchers_stops_with_a_checkpoint(name: str, tmp_path: Path) -> None:
    """By a signal to torchrun; DeepSpeed's launcher hands none on, so that one of its ranks gets it."""
    folder = tmp_path / "run"
    process = start([*launchers()[name], str(write_synthetic_recipe(folder, steps=4000))])
    deadline = time.monotonic() + 200
    while not events(folder, "step"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process.pid if name == "torchrun" else rank_process(folder, 1), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output  # torchrun's own code is 1
    preempted = events(folder)[-1]
    assert preempted["event"] == "preempt", output
    assert Path(preempted["checkpoint"]).is_dir()
