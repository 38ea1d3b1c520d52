"""An evaluation by several ranks, of which one cannot begin: the others do not wait for it for ever."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from parallel.process import World
from pretrain.errors import UserError
from tests.distributed_helper import run_ranks
from tests.tools.huggingface.exported_cases import write_exported
from tools.evaluation import ranks

PLACE_BY_RANK = """
import os, sys
from tools import evaluate
sys.exit(evaluate.main([sys.argv[1] + os.environ["RANK"], *sys.argv[2:]]))
"""
ONE_ENDS = """
import os, sys
from parallel import process
from tools import evaluate
from tools.evaluation import long_context
place = long_context if os.environ["AT"] == "load_model_directory" else process
if os.environ["RANK"] == "1":
    setattr(place, os.environ["AT"], lambda *_, **__: os._exit(3))
sys.exit(evaluate.main(sys.argv[1:]))
"""
ONE_STAYS_AWAY = """
import os, sys
from tools import evaluate
from tools.evaluation import ranks
ranks.JOIN_MINUTES = 0.05
if os.environ["RANK"] == os.environ["AWAY"]:
    sys.exit(0)
sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["tasks", "long"])
def test_what_one_rank_cannot_read_ends_all_in_step(
    kind: str, sets: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    for rank in (0, 1):
        write_exported(tmp_path / f"model{rank}", "mac", tokenizer=tokenizer_path)
    weights = tmp_path / "model1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    options = {"tasks": ["--tasks", "lambada", "--data", str(sets)], "long": ["--ruler", "niah_single_1"]}[kind]
    finished = run_ranks(["-c", PLACE_BY_RANK, str(tmp_path / "model"), *options], ranks=2, check=False)
    assert finished.codes == [2, 2], finished.report()
    assert f"error: rank 1: {weights}: sha256 is" in finished.errors[0]
    assert "error" not in finished.errors[1]


def test_a_file_of_results_that_cannot_be_written_ends_all_ranks(mac: Path, tmp_path: Path) -> None:
    command = ["-m", "tools.evaluate", str(mac), "--ruler", "niah_single_1", "--json", str(tmp_path)]
    finished = run_ranks(command, ranks=2, check=False)
    assert finished.codes == [2, 2], finished.report()
    assert f"{tmp_path}: cannot be written" in finished.errors[0]


@pytest.mark.parametrize("away", ["0", "1"])
def test_a_rank_that_others_do_not_join_says_so(away: str, mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWAY", away)
    finished = run_ranks(["-c", ONE_STAYS_AWAY, str(mac), "--ruler", "niah_single_1"], ranks=2, check=False)
    codes = {"0": [0, 2], "1": [2, 0]}[away]
    assert finished.codes == codes, finished.report()
    said = finished.errors[1 - int(away)]
    assert "not all of 2 ranks have joined within 0.05 minutes" in said and "Traceback" not in said


@pytest.mark.parametrize("place", ["load_model_directory", "shutdown"])
def test_a_rank_that_another_leaves_ahead_of_all_answers_or_behind_them_says_so(
    place: str, mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AT", place)
    command = ["-c", ONE_ENDS, str(mac), "--ruler", "niah_single_1", "--lengths", "900", "--samples", "1"]
    finished = run_ranks(command, ranks=2, check=False)
    assert finished.codes == [2, 3], finished.report()
    said = finished.errors[0]
    assert "waited for the other ranks, of which one has ended" in said and "Traceback" not in said
    assert ("niah_single_1" in finished.outputs[0]) == (place == "shutdown")


def test_what_joins_ranks_and_fails_at_once_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**names, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"^rank 0 on .*: could not join the other ranks: .*EADDRINUSE") as caught:
            ranks.join("cpu")
    assert "have joined" not in str(caught.value)


def test_an_error_of_a_block_is_no_ended_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ranks.Ranks(World(0, 2, 0, torch.device("cpu")))
    with pytest.raises(RuntimeError, match="^out of memory$"), both.agreed():
        raise RuntimeError("out of memory")
