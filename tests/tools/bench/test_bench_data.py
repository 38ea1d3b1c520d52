"""The benchmark of reading measures both readers on the same tars, and a resume."""

from __future__ import annotations

import json
from pathlib import Path

from tools.bench.__main__ import main


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
