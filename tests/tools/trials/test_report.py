"""`tools.trials report`: from a folder or a record to tables, a page, a record, and a text's tables."""

from __future__ import annotations

import argparse

import pytest

from pretrain.errors import UserError
from tests.tools.trials.report_cases import full_record
from tools.trials import report
from tools.trials.record import read_record, write_record
from tools.trials.results import SUITE_FILE, run_folder, write_result
from tools.trials.tables import markdown_report, study_table


@pytest.fixture(autouse=True)
def quick_page(monkeypatch):
    """A page without its plots, which test_report_page.py draws."""
    monkeypatch.setattr(report, "html_page", lambda record: f"page of {len(record.results)} results")


@pytest.fixture
def runs(tmp_path):
    """The output folder of a suite."""
    record = full_record()
    write_record(record.model_copy(update={"results": ()}), tmp_path / "runs" / SUITE_FILE)
    for run in record.results:
        write_result(run_folder(tmp_path / "runs", run.study, run.trial, run.seed), run)
    return tmp_path / "runs"


def call(*arguments):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    report.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_folder_becomes_tables_a_page_and_a_record(runs, tmp_path, capsys):
    call(runs, "--record", tmp_path / "record.json")
    output = capsys.readouterr()
    assert output.out == markdown_report(full_record()) + "\n"
    assert "without a result: variants/mal/seed-2, variants/transformer/seed-2" in output.err
    assert (runs / "report.html").read_text() == "page of 51 results"
    record = read_record(tmp_path / "record.json")
    assert markdown_report(record) == markdown_report(full_record())
    # The record gives what the folder gives, and no page that nobody asked for.
    call(tmp_path / "record.json")
    assert capsys.readouterr().out == output.out
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", "runs"}
    call(tmp_path / "record.json", "--html", tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == "page of 51 results"


def test_results_of_another_suite_are_named(runs, capsys):
    run = full_record().results[0].model_copy(update={"trial": "renamed"})
    write_result(run_folder(runs, "variants", "renamed", 0), run)
    call(runs)
    output = capsys.readouterr()
    assert "not of this suite, left out: variants/renamed/seed-0" in output.err
    assert "renamed" not in output.out


def test_tables_of_a_text_are_replaced(runs, tmp_path):
    findings = tmp_path / "FINDINGS.md"
    findings.write_text("Before.\n<!-- table: text -->\nold\n<!-- end -->\nAfter.\n")
    call(runs, "--findings", findings)
    table = study_table(full_record().of_study("text")).markdown()
    assert findings.read_text() == f"Before.\n<!-- table: text -->\n{table}\n<!-- end -->\nAfter.\n"


def test_a_wrong_text_is_named_before_anything_is_written(runs, tmp_path):
    findings = tmp_path / "FINDINGS.md"
    findings.write_text("<!-- table: other -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="unknown study 'other'; there are variants, ablations, text"):
        call(runs, "--findings", findings, "--record", tmp_path / "record.json")
    assert not (runs / "report.html").exists() and not (tmp_path / "record.json").exists()
    findings.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        call(runs, "--findings", findings)
    with pytest.raises(UserError, match="absent.md: cannot be read"):
        call(runs, "--findings", tmp_path / "absent.md")


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="absent: is neither a folder nor a record"):
        call(tmp_path / "absent")
