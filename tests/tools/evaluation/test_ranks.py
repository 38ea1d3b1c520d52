"""An evaluation by several ranks, of which one cannot begin: the others do not wait for it for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed_helper import run_ranks
from tests.tools.huggingface.exported_cases import write_exported

PLACE_BY_RANK = """
import os, sys
from tools import evaluate
sys.exit(evaluate.main([sys.argv[1] + os.environ["RANK"], *sys.argv[2:]]))
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
