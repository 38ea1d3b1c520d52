"""`tools.bench layouts` measures two ranks along the axes, and what the plan says of them stands beside it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tools.bench.__main__ import main
from tools.bench.cases import FAILED, NOT_RUN, _Worker
from tools.bench.layout_rank import AXES
from tools.bench.layouts import ALONE, SIZES, beside_the_plan, measure
from tools.bench.record import RECORDS, read_record

TINY = {"length": 32, "rows": 4, "dim": 32, "heads": 2, "layers": 2, "chunk_size": 8, "window": 16}


def row_of(layout: str, **found: float) -> dict[str, Any]:
    nothing = {"collectives_s": 0.0, "bubble_s": 0.0, "link_bytes_per_second": None if layout == ALONE else 1e6}
    return {"variant": "transformer", "layout": layout, **TINY, **nothing, **found}


def test_two_ranks_are_measured_beside_what_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "layouts.json"
    sizes = [word for name in SIZES for word in (f"--{name.replace('_', '-')}", str(TINY[name]))]
    options = [
        "--variants",
        "lmm",
        "--axes",
        "data",
        "pipeline",
        "tensor-sharded",
        "--steps",
        "1",
        *sizes,
        "--record",
        str(output),
    ]
    assert main(["layouts", *options]) == 0
    rows = json.loads(output.read_text())["results"]
    alone, data, pipeline, _ = rows
    assert [row["layout"] for row in rows] == [ALONE, "data", "pipeline", "tensor-sharded"]
    for row in rows:
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert 0 < row["compute_s"] <= row["seconds"]
        assert row["compute_s"] + row["collectives_s"] + row["bubble_s"] < 1.05 * row["seconds"]
    assert alone["link_bytes_per_second"] is None and data["link_bytes_per_second"] > 0
    assert alone["bubble_s"] == data["bubble_s"] == 0 < pipeline["bubble_s"]
    assert data["collectives_s"] > 0
    assert "two ranks along" in capsys.readouterr().out


def test_the_plan_is_given_the_speed_of_one_process_and_of_the_link() -> None:
    alone, data, pipeline = beside_the_plan(
        [
            row_of(ALONE, seconds=9.0, compute_s=8.0),
            *(row_of(axis, seconds=6.0, compute_s=4.0) for axis in ("data", "pipeline")),
        ]
    )
    assert "planned_s" not in alone
    assert data["planned_compute_s"] == pytest.approx(4.0), "of the same work, half"
    assert data["planned_collectives_s"] > 0 == data["planned_bubble_s"]
    assert data["planned_over"] == pytest.approx(0.0) and data["core_share"] == pytest.approx(4 / 6)
    assert data["planned_s"] == pytest.approx(4.0 + data["planned_collectives_s"])
    assert pipeline["planned_bubble_s"] == pytest.approx(pipeline["planned_compute_s"] / 4), "one stage less, four rows"


def test_a_rank_that_fails_is_told_of() -> None:
    with pytest.raises(RuntimeError, match=r"parallel\.tensor 2 does not divide model\.num_heads 1"):
        measure(variant="lmm", axes=["tensor"], sizes=TINY | {"heads": 1}, device="cpu", threads=1, steps=1)


def wait_for_ranks(parent: int) -> dict[int, int]:
    """The process of each rank of `tools.bench layouts`' two, once a worker has started them."""
    found: dict[int, int] = {}
    until = time.monotonic() + 300
    while len(found) < 2:
        assert time.monotonic() < until, "no ranks were started"
        time.sleep(0.02)
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"tools.bench.layout_rank" in words:
                (output,) = (Path(word.decode()) for word in words if word.endswith(b".json"))
                found[int(output.stem)] = int(pid)
    return found


def assert_ended(pid: int) -> None:
    """Within ten seconds: gone, or a zombie that nobody has asked for."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, f"process {pid} goes on"
        time.sleep(0.02)


def worker_of(axes: list[str | None]) -> _Worker:
    work = {"variant": "lmm", "axes": axes, "sizes": TINY}
    settings = {"device": "cpu", "threads": 1, "steps": 10**6}
    return _Worker("tools.bench.layouts:measure", [work], settings)


@pytest.mark.parametrize("axes", [[None], ["data"]])
def test_a_rank_that_is_killed_is_a_failure_with_the_signals_name(axes: list[str | None]) -> None:
    worker = worker_of(axes)
    try:
        ranks = wait_for_ranks(worker._process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert worker.next_result(time.monotonic() + 300) is None
        failure = worker.failure(60, None)
        assert failure["outcome"] == FAILED
        assert failure["why"].endswith("rank 1: killed by SIGKILL")
        assert_ended(ranks[0])
    finally:
        worker.end()


def test_a_worker_that_is_cut_off_takes_its_ranks_with_it() -> None:
    worker = worker_of(["data"])
    try:
        ranks = wait_for_ranks(worker._process.pid)
        now = time.monotonic()
        assert worker.next_result(now) is None
        assert worker.failure(60, now)["outcome"] == NOT_RUN
        for pid in ranks.values():
            assert_ended(pid)
    finally:
        worker.end()


def test_the_committed_record_keeps_what_is_promised_of_the_plan() -> None:
    """Of computing; and that what waits for other ranks takes longer than planned, since waiting is left out there."""
    record = read_record(RECORDS / "layouts-cpu.json")
    rows = beside_the_plan(record["results"])
    assert not record["uncommitted_changes"]
    assert [row["layout"] for row in rows] == [ALONE, *AXES] * 2
    for first in (0, len(rows) // 2):
        alone, *layouts = rows[first : first + 1 + len(AXES)]
        for row in layouts:
            assert abs(row["planned_over"]) < 0.25
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert row["planned_collectives_s"] < row["collectives_s"] and row["core_share"] > 0.9
            assert (row["planned_bubble_s"] > 0) == (row["bubble_s"] > 0) == (row["layout"] == "pipeline")
