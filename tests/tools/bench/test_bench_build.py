"""The benchmark of building: what it builds from, and what it makes of its rounds."""

import json

import pytest

from tests.data_cases import documents, make_tokenizer, write_jsonl
from tools.bench.__main__ import main
from tools.bench.build import fastest_beside_one, write_text
from tools.bench.record import RECORDS, read_record
from tools.documents import DocumentReader


def test_a_record_of_building_by_one_and_by_two_processes(tmp_path, capsys):
    texts, record = write_jsonl(tmp_path / "texts.jsonl", documents(50)), tmp_path / "record.json"
    options = ["--input", str(texts), "--tokenizer", str(make_tokenizer(tmp_path)), "--megabytes", "0.05"]
    assert main(["build", *options, "--workers", "1", "2", "--rounds", "1", "--record", str(record)]) == 0
    one, two = json.loads(record.read_text())["results"]
    assert (one["workers"], two["workers"], one["speed_over_one"]) == (1, 2, 1.0)
    assert two["speed_over_one"] == one["seconds"] / two["seconds"]
    assert one["tokens_per_second"] * one["seconds"] == pytest.approx(two["tokens_per_second"] * two["seconds"])
    assert one["megabytes_per_second"] * one["seconds"] == pytest.approx(0.05, rel=0.001)
    assert "over one process" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1000, 100_000])
def test_texts_are_repeated_or_cut(tmp_path, size):
    texts = documents(30)
    write_text(DocumentReader([write_jsonl(tmp_path / "texts.jsonl", texts)]), tmp_path / "out.jsonl", size)
    found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert size - 4 <= sum(len(text.encode()) for text in found) <= size
    assert all(a == texts[number % 30] for number, a in enumerate(found[:-1]))


def test_the_fastest_round_counts():
    rows = [{"workers": w, "seconds": s} for w, s in ((1, 10.0), (2, 6.0), (1, 8.0), (2, 7.0))]
    rows.append({"workers": 4, "outcome": "failed", "why": "no"})
    assert fastest_beside_one(rows) == [
        {"workers": 1, "seconds": 8.0, "speed_over_one": 1.0},
        {"workers": 2, "seconds": 6.0, "speed_over_one": 8 / 6},
        {"workers": 4, "outcome": "failed", "why": "no"},
    ]
    assert fastest_beside_one(rows[1:2]) == [{"workers": 2, "seconds": 6.0}]


def test_the_committed_record_keeps_what_is_promised_of_two_processes():
    record = read_record(RECORDS / "build-cpu.json")
    (two,) = (row for row in record["results"] if row["workers"] == 2)
    assert not record["uncommitted_changes"] and two["megabytes"] == 100 and two["speed_over_one"] >= 1.8
