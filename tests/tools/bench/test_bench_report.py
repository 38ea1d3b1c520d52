"""`tools.bench report`: tables, page and the text's tables from records, those in the repository among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import report
from tools.bench.__main__ import main
from tools.bench.page import html_page
from tools.bench.record import RECORDS, make_record, read_record, write_record
from tools.bench.report import PRESENTATIONS, markdown_tables, new_results, sections

RESULTS = RECORDS.parent / "RESULTS.md"
CASES = {
    "memory": {
        "backend": "dual", "batch": 1, "heads": 4, "head_dim": 64, "depth": 2, "expansion": 4, "chunk_size": 64,
        "forward_s": 0.1, "backward_s": 0.2, "us_per_token": 3.0, "tflops": 0.1, "of_peak": None, "of_roofline": None,
        "peak_bytes": 1000, "kb_per_token": 1.0,
    },
    "attention": {
        "backend": "sdpa", "batch": 1, "window": 0, "prefix": 0, "heads": 4, "head_dim": 64, "forward_s": 0.1,
        "backward_s": 0.2, "us_per_token": 3.0, "tflops": 0.1, "of_peak": 0.5, "of_roofline": 0.5, "peak_bytes": 1000,
    },
    "against": {
        "implementation": "mnemosyne, layer", "rival_chunk_size": 1, "batch": 1, "heads": 4, "head_dim": 64, "depth": 2,
        "expansion": 4, "chunk_size": 64, "forward_s": 0.1, "backward_s": 0.2, "us_per_token": 3.0, "peak_bytes": 1000,
        "speed_over_rival": 55.0, "memory_over_rival": 0.1,
    },
    "train": {
        "preset": "mag-340m", "batch": 8, "loop": "plain", "tokens_per_second": 1e5, "seconds_per_step": 0.3,
        "mfu": 0.4, "mfu_without_memory": 0.3, "tflops": 400.0, "peak_bytes": 4e10, "activations": "kept",
        "parameters": 340e6,
    },
    "decode": {
        "preset": "mag-340m", "context": 131072, "batch": 1, "state": "made", "tokens_per_second": 50.0,
        "seconds_per_token": 0.02, "state_bytes_per_row": 1e8, "state_bytes_per_token": 800.0, "weight_bytes": 7e8,
        "least_seconds_per_token": 0.001, "prefill_tokens_per_second": None,
    },
    "correctness": {
        "kernel": "memory", "backend": "dual", "dtype": "fp32", "depth": 2, "expansion": 4, "chunk_size": 16,
        "window": None, "head_dim": 64, "output_error": 1e-6, "state_error": None, "gradient_error": 1e-5,
        "limit": 1e-3,
    },
}  # fmt: skip
FAILED = {"outcome": "failed", "why": "RuntimeError: a <bad> kernel"}


def record_of(name: str, *rows: dict, device: str = "cpu") -> dict:
    return {**make_record(name, [name], {"device": device, "threads": 2}, list(rows)), "commit": "0123456789abcdef"}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """A record of every kind, with a failure each, and one of `gpu` with parts."""
    made = [
        record_of(name, {"length": 1024, **case}, {"length": 4096, **case}, {**case, "length": 5, **FAILED})
        for name, case in CASES.items()
    ]
    part = {"part": "memory", "status": "ok", "seconds": 60.0, "limit_seconds": 100.0, "last_lines": "a\nrecord: x"}
    tests = {**part, "part": "tests", "status": "failed", "last_lines": "1 failed", "record": None}
    return [*made, record_of("gpu", {**part, "record": made[0]}, tests)]


def test_the_page_has_a_section_with_a_table_for_every_record(records) -> None:
    page = html_page(sections(records))
    for key, record in sections(records).items():
        assert f'id="{key}"' in page and f'href="#{key}"' in page
        assert PRESENTATIONS[record["name"]].title in page.replace("&amp;", "&")
    assert page.count("<table>") == len(sections(records)) == len(CASES) + 2
    assert page.count("image/svg+xml") >= len(CASES) - 1
    assert "a &lt;bad&gt; kernel" in page and "<bad>" not in page
    assert "1 failed" in page
    assert '="http' not in page, "the page needs nothing beside it"


def test_records_inside_a_gpu_record_have_sections_of_their_own(records) -> None:
    assert list(sections(records[-1:])) == ["memory-cpu", "gpu-cpu"]
    assert list(sections(records))[:2] == ["memory-cpu", "memory-cpu-2"]


def test_tables_say_what_was_measured_where(records) -> None:
    text = markdown_tables(records)
    assert "| 1,024 | 100 | 200 | 3 | 0.1 | n/a | n/a |" in text
    assert "| 5 | failed | – |" in text
    assert "0123456789ab" in text and "`python -m tools.bench memory`" in text and "2 threads" in text


def test_a_record_without_results_has_no_section() -> None:
    assert sections([record_of("memory")]) == {}


def test_the_command_writes_what_it_is_told_to(records, tmp_path, capsys) -> None:
    write_record(records[0], tmp_path / "record.json")
    page, tables, text = tmp_path / "page.html", tmp_path / "tables.md", tmp_path / "text.md"
    text.write_text("# Mine\n<!-- table: memory-cpu -->\nold\n<!-- end -->\nkept\n")
    words = ["--html", str(page), "--markdown", str(tables), "--results", str(text)]
    assert main(["report", str(tmp_path / "record.json"), *words]) == 0
    assert capsys.readouterr().out.strip() == tables.read_text().strip()
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "old" not in text.read_text() and "kept" in text.read_text() and "| 1,024 |" in text.read_text()


@pytest.mark.parametrize("content", ["{", json.dumps(record_of("memories", {"length": 1}))])
def test_what_is_no_record_is_named(content, tmp_path, capsys) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert "wrong.json" in capsys.readouterr().err


def test_a_marker_of_an_unknown_record_is_an_error(records, tmp_path, capsys) -> None:
    write_record(records[0], tmp_path / "record.json")
    text = tmp_path / "text.md"
    text.write_text("<!-- table: memory-tpu -->\n<!-- end -->\n")
    assert main(["report", str(tmp_path / "record.json"), "--results", str(text)]) == 2
    assert "memory-tpu" in capsys.readouterr().err and text.read_text().startswith("<!-- table")
    assert main(["report", str(tmp_path / "record.json"), "--results", str(tmp_path / "none.md")]) == 2


def test_the_committed_records_render_and_the_results_show_them(tmp_path) -> None:
    committed = [read_record(path) for path in sorted(Path(RECORDS).glob("*.json"))]
    if not committed:
        pytest.skip("nothing was measured yet")
    report.write_report(committed, html=tmp_path / "page.html", markdown=None)
    assert (tmp_path / "page.html").read_text().count("image/svg+xml") >= 1
    assert new_results(RESULTS, committed) == RESULTS.read_text(), (
        "run python -m tools.bench report --results tools/bench/RESULTS.md"
    )
    for key in sections(committed):
        assert f"<!-- table: {key} -->" in RESULTS.read_text()
