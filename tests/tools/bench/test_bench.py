"""The benchmarks run, write whole records, and refuse sizes that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import main
from tools.bench.record import RECORDS


def test_memory_writes_a_record_of_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "record.json"
    options = ["--lengths", "64", "256", "--head-dim", "8", "--repeats", "1", "--threads", "1"]
    assert main(["memory", *options, "--record", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["command"] == f"python -m tools.bench memory {' '.join(options)} --record {output}"
    assert [row["length"] for row in record["results"]] == [64, 256]
    assert all(row["forward_s"] > 0 and row["backward_s"] > 0 for row in record["results"])
    assert record["settings"]["head_dim"] == 8
    assert record["versions"]["torch"] and record["hardware"]["cores"]
    assert "us a token" in capsys.readouterr().out


def test_the_committed_record_shows_time_linear_in_length() -> None:
    """1K to 64K tokens, at the sizes that the footprint is promised for."""
    record = json.loads((RECORDS / "memory.json").read_text())
    assert {**record["settings"], "heads": 4, "head_dim": 64, "depth": 2, "expansion": 4} == record["settings"]
    per_token = {row["length"]: (row["forward_s"] + row["backward_s"]) / row["length"] for row in record["results"]}
    assert min(per_token) == 1024 and max(per_token) == 65536
    assert per_token[65536] < 1.2 * per_token[1024]
    assert not record["uncommitted_changes"]


@pytest.mark.parametrize("option", [["--lengths", "0"], ["--heads", "-1"], ["--depth", "5"]])
def test_sizes_that_make_no_sense_are_named(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["memory", *option])
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err
