"""`tools.bench checkpoint` measures real saves beside real steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import main


def test_saves_are_measured_beside_steps_and_between_them(tmp_path: Path, capsys) -> None:
    output, place = tmp_path / "checkpoint.json", tmp_path / "place"
    place.mkdir()
    options = ["--rounds", "2", "--steps", "1", "--threads", "1", "--folder", str(place), "--record", str(output)]
    assert main(["checkpoint", *options]) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert row["beside_steps"] >= 2
    assert 0 < row["stall_s"] and 0 < row["write_s"] <= row["beside_s"] * row["beside_steps"]
    assert row["stall_share"] == pytest.approx(row["stall_s"] / row["step_s"])
    assert row["beside_added"] == pytest.approx(row["beside_s"] / row["step_s"] - 1)
    assert row["bytes"] > 8e6, "weights and both moments of the demo's model"
    assert list(place.iterdir()) == []
    assert "ms a step beside a save" in capsys.readouterr().out
