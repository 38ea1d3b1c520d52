"""`tools.bench gpu`: its plan, its budget, what becomes of parts that fail, and all of it at toy sizes on the CPU."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time

import pytest

from tools.bench import gpu
from tools.bench.__main__ import BENCHMARKS, main
from tools.bench.gpu import LOG_FILE, PAGE_FILE, RECORD_FILE, RUNNING_FILE, TABLES_FILE, run_parts, shares_of
from tools.bench.parts import PARTS, Part
from tools.bench.report import sections


class Script(Part):
    """A part that runs a line of python instead."""

    def command(self, *, device: str, small: bool) -> list[str]:
        return [sys.executable, "-c", self.arguments[0]]


def script(name: str, line: str, share: float = 1.0) -> Script:
    return Script(name, share, (line,), (line,), "a script")


def arguments(tmp_path, minutes: float = 1.0) -> argparse.Namespace:
    return argparse.Namespace(minutes=minutes, output=tmp_path / "out", device="cpu", small=True, commit=None)


@pytest.fixture
def quick(monkeypatch):
    """Parts of a second instead of minutes."""
    monkeypatch.setattr(gpu, "RESERVE_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.3)


def test_a_dry_run_lists_every_part_with_its_share(capsys, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda part: None)
    assert main(["gpu", "--dry-run", "--minutes", "5"]) == 0
    shown = capsys.readouterr().out
    for part in PARTS:
        assert part.name in shown and part.purpose in shown
    limits = [float(limit) for limit in re.findall(r"at most ([\d.]+) min", shown)]
    assert limits == [pytest.approx(share / 60, abs=0.051) for share in shares_of(PARTS, 292)]
    assert "budget of 5 min" in shown and "about" not in shown, "nobody has measured how long a part takes"


def test_the_parts_share_the_budget_in_proportion(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda part: "not here" if part.name == "against" else None)
    shares = dict(zip((part.name for part in PARTS), shares_of(PARTS, 532), strict=True))
    assert sum(shares.values()) == pytest.approx(532) and shares.pop("against") == 0
    first, *others = [share / part.share for part, share in zip(PARTS, shares.values(), strict=False)]
    assert others == [pytest.approx(first)] * len(others)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("part", [part for part in PARTS if part.has_record], ids=lambda part: part.name)
def test_every_part_is_a_command_that_exists(part, small) -> None:
    _, _, module, name, *words = part.command(device="cpu", small=small)
    assert module == "tools.bench"
    parser = argparse.ArgumentParser()
    BENCHMARKS[name].add_arguments(parser)
    parser.parse_args(words)


def test_a_part_that_fails_is_reported_with_its_last_lines_and_the_rest_is_run(quick, tmp_path) -> None:
    parts = [script("tests", "raise SystemExit('the kernel is wrong')"), script("decode", "print('fine')")]
    failed, fine = run_parts(parts, arguments(tmp_path), ["gpu"])
    assert (failed["status"], fine["status"]) == ("failed", "ok")
    assert failed["last_lines"].endswith("the kernel is wrong") and fine["last_lines"] == "fine"
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert [row["status"] for row in record["results"]] == ["failed", "ok"]
    log = (tmp_path / "out" / LOG_FILE).read_text()
    assert "the kernel is wrong" in log and "fine" in log


def test_a_part_that_hangs_is_killed_with_its_children_and_leaves_time_to_the_next(quick, tmp_path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    start = time.monotonic()
    hung, fine = run_parts([script("a", child), script("b", "print(1)")], arguments(tmp_path, 4 / 60), ["gpu"])
    assert time.monotonic() - start < 10
    assert (hung["status"], fine["status"]) == ("timed out", "ok")


def test_what_a_part_did_not_use_goes_to_the_later_ones(quick, tmp_path) -> None:
    parts = [script("a", ""), script("b", "", 2.0), script("c", "")]
    limits = [row["limit_seconds"] for row in run_parts(parts, arguments(tmp_path, 2.0), ["gpu"])]
    assert limits[0] == pytest.approx(30, abs=1)
    assert limits[1] > 70 and limits[2] > 100


def test_a_part_without_time_is_not_run_and_says_so(quick, tmp_path) -> None:
    (row,) = run_parts([script("a", "print(1)")], arguments(tmp_path, 0.001), ["gpu"])
    assert row["status"] == "not run" and "minutes" in row["last_lines"]


def test_an_interruption_keeps_the_parts_before_and_the_running_one(quick, tmp_path, monkeypatch) -> None:
    def interrupted(part, limit, options):
        if part.name == "b":
            (options.output / RUNNING_FILE).write_text("{}")
            raise KeyboardInterrupt
        return {"part": part.name, "status": "ok", "seconds": 1.0, "last_lines": "", "record": None}

    monkeypatch.setattr(gpu, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_parts([script("a", ""), script("b", "")], arguments(tmp_path), ["gpu"])
    assert len(json.loads((tmp_path / "out" / RECORD_FILE).read_text())["results"]) == 1
    assert (tmp_path / "out" / RUNNING_FILE).exists()


def test_the_other_package_is_left_out_where_it_is_missing(quick, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    part = next(part for part in PARTS if part.name == "against")
    (row,) = run_parts([part], arguments(tmp_path), ["gpu"])
    assert row["status"] == "not run" and "not installed" in row["last_lines"]


def test_without_a_gpu_it_says_what_to_do_instead(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert main(["gpu", "--device", "cpu"]) == 2
    assert "--small" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it_runs_at_toy_sizes_on_the_cpu(tmp_path, capsys) -> None:
    output = tmp_path / "out"
    assert main(["gpu", "--device", "cpu", "--small", "--output", str(output)]) == 0, capsys.readouterr().err
    record = json.loads((output / RECORD_FILE).read_text())
    outcomes = {row["part"]: row["status"] for row in record["results"]}
    assert outcomes.pop("against") in ("ok", "not run")
    assert set(outcomes.values()) == {"ok"} and len(outcomes) == len(PARTS) - 1
    assert {"memory-cpu", "train-cpu", "decode-cpu", "attention-cpu", "correctness-cpu"} <= set(sections([record]))
    assert "<svg" not in (output / PAGE_FILE).read_text() and "Generation" in (output / PAGE_FILE).read_text()
    assert "## Training steps" in (output / TABLES_FILE).read_text()
    assert sorted(path.name for path in output.iterdir()) == sorted([RECORD_FILE, LOG_FILE, PAGE_FILE, TABLES_FILE])
    assert "correctness" in capsys.readouterr().out
