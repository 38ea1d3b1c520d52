"""The tables of tools/trials/FINDINGS.md are those that its record gives."""

from __future__ import annotations

from pathlib import Path

from tests.tools.trials.report_cases import full_record
from tools.trials.record import read_record, write_record
from tools.trials.report import new_findings
from tools.trials.run import SUITE, study_records
from tools.trials.suite import load_suite
from tools.trials.text import shard_folders

TRIALS = Path(__file__).parents[3] / "tools" / "trials"


def stale(folder: Path) -> str | None:
    """What is wrong with a folder's findings; None where they are the record's."""
    findings, record = folder / "FINDINGS.md", folder / "records" / "cpu.json"
    for path in (findings, record):
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
    if new_findings(findings, read_record(record)) != findings.read_text(encoding="utf-8"):
        return "the tables are not those of the record: python -m tools.trials report RECORD --findings FINDINGS.md"
    return None


def test_findings_show_the_tables_of_their_record():
    assert stale(TRIALS) is None


def test_the_record_is_of_the_suite_and_every_study_is_in_the_findings(tmp_path):
    """A suite that changes asks for a new record."""
    suite = load_suite(SUITE, shard_folders(tmp_path))
    record = read_record(TRIALS / "records" / "cpu.json")
    assert record.studies == study_records(suite)
    findings = (TRIALS / "FINDINGS.md").read_text(encoding="utf-8")
    assert [name for name in record.studies if f"<!-- table: {name} -->" not in findings] == []


def test_the_record_shows_that_the_memory_remembers_where_a_window_guesses():
    """At 16 windows, with every seed, at equal tokens and parameters; and all of it in under an hour."""
    record = read_record(TRIALS / "records" / "cpu.json")
    assert record.seconds is not None and record.seconds < 3600
    found: dict[str, list[float]] = {}
    for run in record.of_study("variants").results:
        found.setdefault(run.trial, []).append(run.probes["16 windows"].accuracy)
    for trial in ("mac", "mag", "lmm"):
        assert len(found[trial]) >= 2 and min(found[trial]) >= 0.9, trial
    assert max(found["transformer-window"]) < 0.06


def test_records_are_whole():
    """Every run of a committed record has a result, and was made from committed code."""
    for path in TRIALS.glob("records/*.json"):
        record = read_record(path)
        assert record.missing() == [], path
        assert [run for run in record.results if run.environment["uncommitted_changes"]] == [], path


def test_findings_and_record_that_differ_are_seen(tmp_path):
    assert stale(tmp_path) == "FINDINGS.md is missing"
    findings = tmp_path / "FINDINGS.md"
    findings.write_text("<!-- table: text -->\n<!-- end -->\n")
    assert stale(tmp_path) == "records/cpu.json is missing"
    record = full_record()
    write_record(record, tmp_path / "records" / "cpu.json")
    assert "not those of the record" in stale(tmp_path)
    findings.write_text(new_findings(findings, record))
    assert stale(tmp_path) is None
    write_record(record.model_copy(update={"results": record.results[:-1]}), tmp_path / "records" / "cpu.json")
    assert "not those of the record" in stale(tmp_path)
