"""Held-out rows longer than those of training: the loss by position in logs and curves, and by the command that
evaluates exported models; memory that does not grow with the rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed_helper import run_ranks
from tests.training_cases import events, write_recipe
from tools import evaluate, export

ROOT = Path(__file__).parents[2]
WORKER = "tests/pretrain/train_worker.py"
STEPS, CONTEXT, WINDOW = 4, 208, 48
LONG = {"context": CONTEXT, "by_position": True, "reset_window": WINDOW, "tokens": 1000}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks, five rows between them: ZeRO 3, and ZeRO 1 by segments; a transformer without anything to reset."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"steps": STEPS, "evaluation": LONG | {"every_tokens": 256}}
    no_reset = {"every_tokens": None, "by_position": True, "context": 100, "reset_window": None}
    plain = {"preset": "transformer-tiny", "segment": None, "memory": None}
    recipes = [
        write_recipe(data, folder / "zero3", parallel={"zero_stage": 3}, **common),
        write_recipe(data, folder / "segments", training={"segment_length": 16}, **common),
        write_recipe(data, folder / "transformer", steps=2, model=plain, evaluation=no_reset),
    ]
    run_ranks([WORKER, *map(str, recipes)], ranks=2, timeout=300)
    return folder


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    assert export.main([str(runs / "zero3"), "--output", str(runs / "model")]) == 0
    return runs / "model"


def close(rows: list[dict[str, Any]]) -> list[Any]:
    """To be compared with rows computed otherwise; a difference is near nothing beside the losses."""
    return [pytest.approx(row, rel=1e-4, abs=1e-5) for row in rows]


@pytest.mark.parametrize("run", ["zero3", "segments"])
def test_the_loop_and_the_command_give_one_table(runs: Path, exported: Path, data: Path, run: str) -> None:
    seen = events(runs / run, "positions")
    assert [(event["step"], event["reset_window"]) for event in seen] == [(2, WINDOW), (STEPS, WINDOW)]
    output = runs / "report.json"
    command = [str(exported), "--shards", str(data / "validation"), "--max-tokens", "1000", "--json", str(output)]
    assert evaluate.main([*command, "--context", str(CONTEXT), "--compare-reset", str(WINDOW)]) == 0
    report = json.loads(output.read_text())
    rows = report["by_position"]
    assert [row["first"] for row in rows] == [0, 64, 128]
    assert sum(row["tokens"] for row in rows) == report["tokens"] == 1000
    assert all(row["difference"] == row["loss_reset"] - row["loss"] != 0 for row in rows)
    assert report["difference"] == pytest.approx(sum(row["tokens"] * row["difference"] for row in rows) / 1000)
    assert report["reset_window"] == WINDOW
    assert seen[-1]["losses"] == close(rows)
    (*_, last) = events(runs / run, "eval")
    assert last["loss"] == pytest.approx(report["loss"], rel=1e-5)


def test_the_losses_by_position_are_curves(runs: Path) -> None:
    reader = EventAccumulator(str(runs / "zero3" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for event_number, event in enumerate(events(runs / "zero3", "positions")):
        for row in event["losses"]:
            for way, field in (("carried", "loss"), ("reset", "loss_reset")):
                point = reader.Scalars(f"evaluation/position/{row['first']}-{row['last']}/{way}")[event_number]
                assert (point.step, point.value) == (event["step"], pytest.approx(row[field]))


def test_a_model_without_memory_has_a_loss_by_position_alone(runs: Path) -> None:
    (event,) = events(runs / "transformer", "positions")
    assert event["reset_window"] is None
    assert [set(row) for row in event["losses"]] == [{"first", "last", "tokens", "loss"}] * 2


def test_the_table_is_printed_with_both_losses(exported: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(exported), "--shards", str(data / "validation"), "--max-tokens", "300", "--context", "128"]
    assert evaluate.main([*command, "--compare-reset", "32"]) == 0
    printed = capsys.readouterr().out
    for title in ("position in the row", "loss carried", "loss reset every 32", "difference", "64..127"):
        assert title in printed
    assert evaluate.main(command) == 0
    assert "reset" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("40", "--compare-reset 40 is not a multiple of the model's segment of 16 tokens: 32 or 48 would be"),
        ("32", "--compare-reset 32 resets nothing in rows of 32 tokens"),
    ],
)
def test_a_window_that_does_not_fit_is_named(exported: Path, data: Path, window: str, message: str, capsys) -> None:
    assert evaluate.main([str(exported), "--shards", str(data / "validation"), "--compare-reset", window]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_memory_has_nothing_to_reset(runs: Path, data: Path, capsys) -> None:
    output = runs / "transformer-model"
    assert export.main([str(runs / "transformer"), "--output", str(output)]) == 0
    assert evaluate.main([str(output), "--shards", str(data / "validation"), "--compare-reset", "16"]) == 2
    assert (
        "--compare-reset is 16, but a transformer has no memory: there is nothing to reset" in capsys.readouterr().err
    )


PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from tests.model_cases import build_model
from tools.evaluate import evaluate
torch.set_num_threads(1)
context = int(sys.argv[1])
tokens = np.random.default_rng(0).integers(31, size=context).astype(np.uint16)
source = SimpleNamespace(
    tokens=context, document_tokens=np.array([context]), token_bytes=np.ones(31, np.int64),
    tokenizer=SimpleNamespace(eos_id=0), read=lambda document, start, stop: tokens[start:stop],
)
model = build_model("lmm", torch.float32, num_layers=1, memory={"chunk": 64, "depth": 1})
for score in evaluate(model, source, context=context, batch_size=1, max_tokens=None, reset_window=context // 2):
    pass
assert score.tokens == context
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peak_kib(context: int) -> int:
    """Peak resident memory, KiB, of a process that scores one row of `context` tokens."""
    command = [sys.executable, "-c", PROGRAM, str(context)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_a_piece() -> None:
    """But for the row itself: its tokens and targets and what they are made from, 8 bytes each."""
    short, long = 2**13, 2**16
    growth = (peak_kib(long) - peak_kib(short)) * 1024 / (long - short)
    assert growth < 300, f"{growth:.0f} bytes a token: half a row at a time takes 770"
