"""A study's table says what the seeds reached, and what is not there."""

from __future__ import annotations

import pytest

from tests.tools.trials.report_cases import full_record, result
from tools.trials.record import Record, StudyRecord
from tools.trials.tables import memory_table, study_table


def table(*results, metric="accuracy", seeds=(0, 1, 2), trials=("a",), probes=("p",)):
    study = StudyRecord(title="t", metric=metric, sequence_length=96, trials=trials, seeds=seeds, probes=probes)
    return study_table(Record(command="c", studies={"s": study}, results=results).of_study("s"))


def reached(trial, seed, accuracy, **fields):
    probes = {"p": {"accuracy": accuracy, "loss": 1 - accuracy, "tokens": 8, "row_tokens": 96}}
    return result("s", trial, seed, probes=probes, **fields)


def test_a_cell_is_mean_and_range_over_the_seeds():
    runs = [reached("a", seed, value, tokens_per_second=speed) for seed, value, speed in
            ((0, 0.9, 1000.0), (1, 0.94, 2000.0), (2, 0.98, 6000.0))]  # fmt: skip
    found = table(*runs)
    assert found.header == ("trial", "parameters", "tokens", "tokens/s", "seeds", "p")
    assert found.rows == (("a", "123,456", "1,612,800", "3,000", "3", "94.0 % [90.0..98.0]"),)
    assert found.note == (
        "Right answers: mean over 3 seeds [smallest..largest]. Guessing gets 3.1 %. Answers scored with each seed: 8 p."
    )
    losses = table(*runs, metric="loss")
    assert losses.rows[0][-1] == "0.060 [0.020..0.100]"
    scored = "Tokens scored with each seed: 8 p."
    assert losses.note == f"Loss in nats a token: mean over 3 seeds [smallest..largest]. {scored}"


def test_one_seed_has_no_range():
    found = table(reached("a", 0, 0.5), seeds=(0,))
    assert found.rows[0][-2:] == ("1", "50.0 %")
    assert found.note == "Right answers, one seed. Guessing gets 3.1 %. Answers scored with each seed: 8 p."


def test_diverged_and_missing_runs_are_shown_and_not_averaged():
    failed = result("s", "b", 1, failed="FloatingPointError: nan", tokens_per_second=1e9)
    every = result("s", "c", 0, failed="FloatingPointError: nan")
    found = table(reached("a", 0, 0.5), reached("b", 0, 0.25), failed, every, trials=("a", "b", "c", "d"), seeds=(0, 1))
    assert [(row[0], *row[3:]) for row in found.rows] == [
        ("a", "18,300", "1 of 2 (1 missing)", "50.0 %, n = 1"),
        ("b", "18,300", "1 of 2 (1 diverged)", "25.0 %, n = 1"),
        ("c", "–", "0 of 2 (1 diverged, 1 missing)", "diverged"),
        ("d", "–", "0 of 2 (2 missing)", "missing"),
    ]
    assert found.rows[3][:3] == ("d", "–", "–")


def test_markdown_and_html_show_the_same_cells():
    found = table(reached("a", 0, 0.5), seeds=(0,))
    assert found.markdown() == (
        "| trial | parameters | tokens | tokens/s | seeds | p |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| a | 123,456 | 1,612,800 | 18,300 | 1 | 50.0 % |\n\n"
        "Right answers, one seed. Guessing gets 3.1 %. Answers scored with each seed: 8 p."
    )
    html = found.html()
    assert all(f">{cell}<" in html for cell in (*found.header, *found.rows[0], found.note))


@pytest.mark.parametrize(
    ("name", "markdown", "html"),
    [("<b>", "| &lt;b> |", "&lt;b&gt;"), ("a|b", "| a\\|b |", ">a|b<"), ("a & b", "| a & b |", "a &amp; b")],
)
def test_names_are_shown_as_they_are(name, markdown, html):
    found = table(probes=(name,))
    assert markdown in found.markdown().splitlines()[0]
    assert html in found.html()


def test_every_study_of_a_record_has_a_row_per_trial():
    record = full_record()
    for name, study in record.studies.items():
        rows = study_table(record.of_study(name)).rows
        assert tuple(row[0] for row in rows) == study.trials
        assert {len(row) for row in rows} == {5 + len(study.probes) * (2 if name == "text" else 1)}


def test_bits_per_byte_follow_the_losses_on_text():
    def run(seed, loss):
        probe = {"loss": loss, "bits_per_byte": loss / 2, "tokens": 8, "row_tokens": 256}
        return result("s", "a", seed, chance=None, probes={"p": probe})

    found = table(run(0, 4.0), run(1, 5.0), metric="loss", seeds=(0, 1), trials=("a", "b"))
    assert found.header[5:] == ("p", "p, bits a byte")
    assert [row[5:] for row in found.rows] == [("4.500 [4.000..5.000]", "2.250"), ("missing", "–")]


def test_statistics_of_memories_are_means_over_the_seeds():
    record = full_record()
    found = memory_table(record.of_study("text"))
    assert found.header == ("memory", "alpha", "eta")
    names = [f"{trial}, layer {layer}" for trial in ("lmm", "mac") for layer in (0, 2)]
    assert found.rows == tuple((name, "0.01", "0.925") for name in names)
    assert memory_table(record.of_study("variants")) is None
