"""Cases in worker processes: order, failures, limits."""

from __future__ import annotations

import time

import pytest

from tools.bench.cases import grid, last_lines, run_cases

# The functions that the workers of these tests call; a worker finds them by this module's name.
MODULE = "tests.tools.bench.worker_functions"


def rows_of(function: str, numbers: list[int], **options) -> list[dict]:
    cases = [{"number": number} for number in numbers]
    return list(
        run_cases(f"{MODULE}:{function}", cases, {"factor": 10, "device": "cpu"}, **{"together": True, **options})
    )


@pytest.mark.parametrize("together", [True, False])
def test_rows_come_in_order_with_their_case(together) -> None:
    rows = rows_of("product", [3, 1, 2], together=together)
    assert [(row["number"], row["product"]) for row in rows] == [(3, 30), (1, 10), (2, 20)]
    assert "factor" not in rows[0]
    assert len({row["process"] for row in rows}) == (1 if together else 3)


def test_a_case_that_fails_is_reported_and_the_others_are_measured() -> None:
    good, failed, after = rows_of("product_unless_13", [1, 13, 2])
    assert (good["product"], after["product"]) == (10, 20)
    assert failed["number"] == 13 and failed["outcome"] == "failed"
    assert failed["why"].endswith("ValueError: 13 is unlucky")
    assert len(failed["why"].splitlines()) <= 6


def test_a_lack_of_memory_is_an_outcome_and_costs_no_process() -> None:
    small, large, other = rows_of("memory_of", [1, 1 << 60, 2])
    assert large["outcome"] == "out of memory" and "number" in large
    assert small["process"] == other["process"]


def test_what_a_backend_cannot_do_is_an_outcome() -> None:
    row, other = rows_of("unsupported_13", [13, 1])
    assert row["outcome"] == "not supported" and "depth" in row["why"]
    assert other["product"] == 10


def test_numbers_of_the_backend_that_stood_in_are_not_reported_as_the_one_that_failed_its_self_test() -> None:
    cases = [{"backend": backend, "length": length} for length in (1, 2) for backend in ("broken", "well")]
    rows = list(run_cases(f"{MODULE}:warned_once", cases, {"factor": 10, "device": "cpu"}, together=True))
    assert [row.get("product") for row in rows] == [None, 10, None, 20]
    assert {(row["outcome"], row["why"]) for row in rows[::2]} == {("failed", "the kernels of broken are off")}


def test_a_process_that_dies_says_how() -> None:
    killed, after = rows_of("killed_at_1", [1, 2])
    assert killed["outcome"] == "failed" and killed["why"].startswith("killed by SIGKILL")
    assert after["product"] == 20


def test_a_case_that_hangs_is_cut_off() -> None:
    start = time.monotonic()
    (row,) = rows_of("sleep", [60], case_seconds=0.5)
    assert row["outcome"] == "failed" and "longer than" in row["why"]
    assert time.monotonic() - start < 20


def test_a_deadline_leaves_the_rest_out_and_says_so() -> None:
    begun, left = rows_of("sleep", [60, 0], deadline=time.monotonic() + 0.5)
    assert (begun["outcome"], left["outcome"]) == ("not run", "not run")
    assert "minutes" in begun["why"] and "minutes" in left["why"]


def test_what_a_case_prints_does_not_disturb_its_result() -> None:
    (row,) = rows_of("talkative", [1])
    assert row == {"number": 1, "product": 10}


def test_the_first_values_of_a_grid_are_measured_first() -> None:
    cases = [tuple(case.values()) for case in grid({"a": [1, 2], "b": [3, 4], "c": [5, 6]})]
    assert cases[0] == (1, 3, 5)
    assert set(cases[1:4]) == {(2, 3, 5), (1, 4, 5), (1, 3, 6)}
    assert cases[-1] == (2, 4, 6) and len(set(cases)) == 8


def test_last_lines_skip_empty_ones() -> None:
    assert last_lines("a\n\nb\n \nc\n", 2) == "b\nc"
    assert last_lines("") == ""
