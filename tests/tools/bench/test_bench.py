"""The benchmarks run, write what they measured where, and the committed records show what the README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import BENCHMARKS, main
from tools.bench.record import RECORDS


def test_memory_writes_a_record_of_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "record.json"
    options = ["--lengths", "64", "256", "--head-dim", "8", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    assert main(["memory", *options, "--record", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["command"] == f"python -m tools.bench memory {' '.join(options)} --record {output}"
    assert [row["length"] for row in record["results"]] == [64, 256]
    assert all(row["forward_s"] > 0 and row["backward_s"] > 0 and row["tflops"] > 0 for row in record["results"])
    assert [(row["speed_over_dual"], row["of_peak"]) for row in record["results"]] == [(1.0, None)] * 2
    assert record["settings"]["head_dim"] == 8 and record["settings"]["dtype"] == "fp32"
    assert record["versions"]["torch"] and record["hardware"]["cores"]
    shown = capsys.readouterr()
    assert "us a token" in shown.out and "n/a" in shown.out
    assert str(output) in shown.err


def test_a_failed_case_fails_the_command_and_keeps_the_others(tmp_path, capsys, monkeypatch) -> None:
    def rows(*_, **__):
        yield {**CASE, "outcome": "failed", "why": "RuntimeError: the kernel is broken"}
        yield {**CASE, "length": 2, "outcome": "out of memory", "why": "tried to allocate 2 TB"}
        yield {**CASE, "length": 3, **FOUND}

    monkeypatch.setattr("tools.bench.memory.run_cases", rows)
    output = tmp_path / "record.json"
    assert main(["memory", "--device", "cpu", "--record", str(output)]) == 1
    outcomes = [row.get("outcome", "measured") for row in json.loads(output.read_text())["results"]]
    assert outcomes == ["failed", "out of memory", "measured"]
    shown = capsys.readouterr()
    assert "the kernel is broken" in shown.err and "length 1" in shown.err
    assert "out of memory" in shown.out and "tried to allocate" not in shown.err


CASE = {"length": 1, "backend": "dual", "batch": 1, "heads": 1, "head_dim": 8, "depth": 2, "expansion": 4}
CASE["chunk_size"] = 16
FOUND = {"forward_s": 1.0, "backward_s": 2.0, "peak_bytes": 10, "us_per_token": 1.0, "tflops": 1.0, "kb_per_token": 1.0}


def test_what_was_measured_is_written_before_the_end(tmp_path, monkeypatch) -> None:
    def rows(*_, **__):
        yield {**CASE, **FOUND}
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.bench.memory.run_cases", rows)
    output = tmp_path / "record.json"
    assert main(["memory", "--device", "cpu", "--record", str(output)]) == 130
    assert len(json.loads(output.read_text())["results"]) == 1


def test_the_committed_record_shows_time_linear_in_length() -> None:
    """1K to 64K tokens, at the sizes that the footprint is promised for."""
    record = json.loads((RECORDS / "memory-cpu.json").read_text())
    rows = record["results"]
    assert all({**row, "heads": 4, "head_dim": 64, "depth": 2, "expansion": 4, "batch": 1} == row for row in rows)
    per_token = {row["length"]: row["us_per_token"] for row in rows}
    assert min(per_token) == 1024 and max(per_token) == 65536
    assert per_token[65536] < 1.2 * per_token[1024]
    assert not record["uncommitted_changes"]


@pytest.mark.parametrize(
    "words",
    [
        ["memory", "--lengths", "0"],
        ["memory", "--heads", "-1"],
        ["memory", "--depth", "5"],
        ["memory", "--backends", "cuda"],
        ["memory", "--minutes", "0"],
        ["memory", "--dtype", "fp8"],
        ["attention", "--window", "-1"],
        ["train", "--presets", "mag-7b"],
        ["decode", "--state", "imagined"],
        ["gpu", "--parts", "all"],
    ],
)
def test_options_that_make_no_sense_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize("name", [*BENCHMARKS, "gpu", "report"])
def test_every_option_has_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    module = {**BENCHMARKS}.get(name)
    if module is None:
        module = __import__(f"tools.bench.{name}", fromlist=[name])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out


WITHOUT_DEVICE = {"build", "data", "layouts"}
"""Benchmarks of what no GPU has a part in, or of ranks on a CPU."""


def test_a_gpu_that_is_not_there_is_an_error_with_the_fix(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in sorted(set(BENCHMARKS) - WITHOUT_DEVICE):
        assert main([name, "--device", "cuda"]) == 2
        assert "--device cpu" in capsys.readouterr().err
