"""`tools.bench long` measures real steps by segments, and says which it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import main
from tools.bench.long import beside_base
from tools.bench.record import RECORDS

SMALL = ["--segment-length", "32", "--dim", "16", "--heads", "1", "--layers", "1", "--chunk-size", "8", "--window", "8"]


def test_a_step_is_measured_for_each_model_gradient_and_length(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # titles stay on one line however many digits a slow machine needs
    output = tmp_path / "long.json"
    options = ["--variants", "lmm", "transformer", "--lengths", "64", "32", "--full-attention-up-to", "32"]
    assert main(["long", *SMALL, *options, "--threads", "1", "--record", str(output)]) == 0
    rows = {(r["variant"], r["gradient"], r["length"]): r for r in json.loads(output.read_text())["results"]}
    assert set(rows) == {
        *(("lmm", gradient, length) for gradient in ("exact", "truncated") for length in (32, 64)),
        *(("transformer", gradient, 32) for gradient in ("exact", "truncated")),
    }
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 1e8 for row in rows.values())
    # The same weights and row: losses are equal, and gradients are where there is one segment to stop behind.
    exact, truncated = (rows["lmm", gradient, 64] for gradient in ("exact", "truncated"))
    assert exact["loss"] == pytest.approx(truncated["loss"], rel=1e-6)
    assert exact["gradient_norm"] != pytest.approx(truncated["gradient_norm"], rel=1e-4)
    assert rows["lmm", "exact", 32]["gradient_norm"] == pytest.approx(rows["lmm", "truncated", 32]["gradient_norm"])
    captured = capsys.readouterr()
    assert "us a token" in captured.out and "transformer" in captured.out
    assert "transformer, 64 tokens: over --full-attention-up-to, left out" in captured.err


def test_a_length_that_segments_do_not_divide_is_named(capsys) -> None:
    assert main(["long", *SMALL, "--lengths", "48"]) == 2
    assert "--lengths 48: not a multiple of --segment-length 32" in capsys.readouterr().err


def test_the_committed_record_shows_two_million_tokens_in_flat_memory_and_time() -> None:
    record = json.loads((RECORDS / "long-cpu.json").read_text())
    assert not record["uncommitted_changes"]
    assert record["settings"]["boundary_states"] == "disk"
    exact = {(row["variant"], row["length"]): row for row in record["results"] if row["gradient"] == "exact"}
    for variant in ("mac", "mag", "lmm"):
        short, long = exact[variant, 65_536], exact[variant, 2_097_152]
        assert long["peak_bytes"] <= 1.5 * short["peak_bytes"]
        assert long["seconds"] / long["length"] <= 1.3 * short["seconds"] / short["length"]


def test_rows_are_compared_with_64k_or_else_with_the_shortest() -> None:
    def row(variant: str, length: int, seconds: float, peak: int) -> dict[str, object]:
        return {"variant": variant, "gradient": "exact", "length": length, "seconds": seconds, "peak_bytes": peak}

    of_lmm = [row("lmm", 4096, 1.0, 100), row("lmm", 65_536, 32.0, 200), row("lmm", 2_097_152, 1280.0, 300)]
    of_mac = [row("mac", 32_768, 8.0, 100), row("mac", 4096, 2.0, 50)]
    lost = {"variant": "mac", "gradient": "exact", "length": 65_536, "outcome": "killed"}
    found = beside_base([*of_lmm, *of_mac, lost])
    assert [(r["base"], r["time_ratio"], r["memory_ratio"]) for r in found[:3]] == [
        (65_536, 0.5, 0.5), (65_536, 1.0, 1.0), (65_536, 1.25, 1.5),
    ]  # fmt: skip
    assert [(r["base"], r["time_ratio"], r["memory_ratio"]) for r in found[3:5]] == [(4096, 0.5, 2.0), (4096, 1.0, 1.0)]
    assert found[5] == lost
