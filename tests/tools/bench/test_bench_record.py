"""Records: what is in them, where there is no checkout, and files that are none."""

from __future__ import annotations

import pytest

from pretrain.errors import UserError
from tools.bench import record as records
from tools.bench.record import device_slug, make_record, read_record, write_record


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    record = make_record("memory", ["memory", "--lengths", "a b"], {"device": "cpu"}, [{"length": 1}])
    write_record(record, tmp_path / "new" / "record.json")
    assert read_record(tmp_path / "new" / "record.json") == record
    assert record["command"] == "python -m tools.bench memory --lengths 'a b'"
    assert {"torch", "triton", "deepspeed", "titans-pytorch", "python"} <= set(record["versions"])


def test_without_a_checkout_the_commit_is_what_the_caller_says(monkeypatch) -> None:
    monkeypatch.setattr(records, "_git", lambda *_: None)
    assert make_record("memory", [], {}, [])["commit"] is None
    told = make_record("memory", [], {}, [], commit="abc")
    assert (told["commit"], told["uncommitted_changes"]) == ("abc", None)


def test_in_a_checkout_the_commit_is_its_own(monkeypatch) -> None:
    monkeypatch.setattr(records, "_git", lambda *words: "1234" if words[0] == "rev-parse" else "")
    told = make_record("memory", [], {}, [], commit="abc")
    assert (told["commit"], told["uncommitted_changes"]) == ("1234", False)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "memory"}', '{"name": '])
def test_a_file_that_is_no_record_is_named(tmp_path, text) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"record\.json.*measure again"):
        read_record(path)
    with pytest.raises(UserError, match="missing.json"):
        read_record(tmp_path / "missing.json")


def test_records_of_devices_have_names_of_their_own() -> None:
    cpu = {"settings": {"device": "cpu"}, "hardware": {"gpu": "NVIDIA H100 80GB HBM3"}}
    gpu = {"settings": {"device": "cuda"}, "hardware": {"gpu": "NVIDIA H100 80GB HBM3"}}
    assert (device_slug(cpu), device_slug(gpu)) == ("cpu", "nvidia-h100-80gb-hbm3")
