"""The benchmark of reading measures both readers on the same tars, and a resume."""

from __future__ import annotations

import json
from pathlib import Path

from tools.bench.__main__ import main
from tools.bench.record import RECORDS, read_record


def test_rows_are_read_beside_webdataset_and_a_resume_is_timed(tmp_path: Path, capsys) -> None:
    record = tmp_path / "data.json"
    options = ["--lengths", "128", "--document-tokens", "50", "--tokens", "20000", "--rounds", "2"]
    options += ["--packing", "stream", "best_fit", "--resume-documents", "3000", "--record", str(record)]
    assert main(["data", *options]) == 0
    stream, best_fit, resume = json.loads(record.read_text())["results"]
    assert (stream["packing"], best_fit["packing"], resume["what"]) == ("stream", "best_fit", "resume")
    for row in (stream, best_fit):
        assert len(row["turns_tokens_per_second"]) == len(row["turns_webdataset_tokens_per_second"]) == 2
        assert row["speed_over_webdataset"] == row["tokens_per_second"] / row["webdataset_tokens_per_second"]
        assert 200 < row["documents"] < 800
    assert resume["documents"] == 3000 and resume["first_step_s"] > 0 and resume["peak_bytes"] > 1e7
    assert "over webdataset" in capsys.readouterr().out


def test_the_committed_record_keeps_what_is_promised_of_reading_and_resuming() -> None:
    record = read_record(RECORDS / "data-cpu.json")
    assert not record["uncommitted_changes"]
    *rows, resume = record["results"]
    of = {(row["sequence_length"], row["document_tokens"]): row for row in rows}
    assert all(row["speed_over_webdataset"] >= 0.5 for row in rows)
    for documents in (1_000, 10_000):
        assert of[4096, documents]["tokens_per_second"] >= 100e6
        assert of[2_097_152, documents]["tokens_per_second"] >= 0.9 * of[4096, documents]["tokens_per_second"]
    assert resume["documents"] == 10_000_000 and resume["peak_bytes"] < 1e9
    assert resume["open_s"] + resume["first_step_s"] < 1
