"""`tools.bench checkpoint` measures real saves beside real steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.bench.__main__ import main
from tools.bench.checkpoint import _Round
from tools.bench.record import RECORDS, read_record


def test_saves_are_measured_beside_steps_and_between_them(tmp_path: Path, capsys) -> None:
    output, place = tmp_path / "checkpoint.json", tmp_path / "place"
    place.mkdir()
    options = [
        "--rounds",
        "2",
        "--steps",
        "1",
        "--threads",
        "1",
        "--cores",
        "1",
        "--folder",
        str(place),
        "--record",
        str(output),
    ]
    assert main(["checkpoint", *options]) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert row["beside_steps"] >= 1 and row["same_bytes"] == row["rounds"] == 2
    assert 0 < row["stall_s"] and 0 < row["write_s"] and row["stall_s"] < row["sync_s"]
    assert row["stall_share"] == pytest.approx(row["stall_s"] / row["step_s"])
    assert row["beside_added_low"] <= row["beside_added"] <= row["beside_added_high"]
    assert row["bytes"] > 8e6, "weights and both moments of the demo's model"
    assert list(place.iterdir()) == []
    assert "added beside a save" in capsys.readouterr().out


def test_what_a_save_adds_is_over_the_steps_on_both_sides_of_it() -> None:
    seconds = {"plain": [1.0, 1.0, 9.0], "sync": 5.0, "stall": 0.5, "beside": [1.5, 2.0], "write": 3.0}
    before = _Round(**seconds, plain_cpu=1.0, beside_cpu=1.5, is_same=True)
    behind = replace(before, plain=[2.0, 2.0, 2.0], plain_cpu=1.5)
    assert before.added([before]) == pytest.approx((0.5 + 3.5) / 2 / 1.0 - 1)
    assert before.added([before, behind]) == pytest.approx((0.5 + 3.5) / 2 / 2.0 - 1)
    assert before.added_cpu([before, behind]) == pytest.approx(1.5 / 1.25 - 1)


def test_the_record_shows_what_steps_notice_of_saves() -> None:
    """At the demo's size, two threads on the two cores that the writing thread shares."""
    record = read_record(RECORDS / "checkpoint-cpu.json")
    (row,) = record["results"]
    assert not record["uncommitted_changes"] and row["recipe"] == "demo"
    assert row["same_bytes"] == row["rounds"] >= 15
    assert row["beside_added"] <= 0.10 and row["cpu_added"] <= 0.10 and row["stall_share"] < row["sync_share"]
