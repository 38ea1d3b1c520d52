"""What a launch does behind an attempt: start again, when, or not, and why."""

import json
import os
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from launch.attempts import Attempt, Ledger, ask_to_stop, decide, resume_arguments, told_to_stop
from pretrain.errors import EXIT_HUNG

STARTED = Attempt(1, "7", ("n[1-2]",), "2026-01-01T00:00:00+00:00", 0)
SIGKILL = 128 + 9
WORDS = {128 + number: f"killed by {number.name}" for number in signal.Signals}


def ended(exit_code: int | None, *, step: int | None = 10, saved: bool = False, error: str | None = None) -> Attempt:
    return replace(STARTED, ended=STARTED.started, exit_code=exit_code, step=step, saved=saved, error=error)


def decided(*attempts: Attempt, max_restarts: int = 2, slurm: bool = True, stop: bool = False):
    return decide(attempts, max_restarts=max_restarts, again_when_stopped=slurm, told_to_stop=stop)


@pytest.mark.parametrize(("code", "words"), [(0, "done"), (2, "mended"), (77, "another copy")])
def test_what_starting_again_cannot_change_is_not_started_again(code, words):
    decision = decided(ended(code))
    assert not decision.again and words in decision.reason


def test_a_run_that_stopped_on_request_goes_on_under_slurm_alone():
    assert decided(ended(75)).again and decided(ended(75)).wait_seconds == 0
    assert not decided(ended(75), slurm=False).again
    assert not decided(ended(75), stop=True).again
    assert decided(*[ended(75, saved=True)] * 99).again  # however often
    assert decided(*[ended(75)] * 19).again and decided(*[ended(75)] * 19, ended(1)).again
    in_vain = decided(ended(75, saved=True), *[ended(75)] * 20)
    assert not in_vain.again and "20 times in a row without a new checkpoint" in in_vain.reason
    assert "checkpoint.upload" in in_vain.reason


@pytest.mark.parametrize("code", [1, EXIT_HUNG, SIGKILL, None])
def test_crashes_are_started_again_later_and_later_so_many_times(code):
    waits = [decided(*[ended(code)] * count, max_restarts=9).wait_seconds for count in range(1, 10)]
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert decided(*[ended(code)] * 2).again
    last = decided(*[ended(code)] * 3)
    assert not last.again and "number 3 in a row" in last.reason
    assert not decided(ended(code), max_restarts=0).again
    assert not decided(ended(code), stop=True).again


def test_crashes_behind_a_new_checkpoint_are_counted_anew():
    saved = ended(SIGKILL, saved=True)
    assert decided(ended(SIGKILL), ended(SIGKILL), saved).wait_seconds == 10  # it got further
    assert decided(saved, ended(SIGKILL)).wait_seconds == 20
    assert not decided(saved, *[ended(SIGKILL)] * 2).again
    assert decided(ended(SIGKILL), ended(SIGKILL), ended(75), ended(SIGKILL)).wait_seconds == 10


def test_the_same_error_at_the_same_step_twice_is_not_tried_a_third_time():
    first = ended(1, error="rank 1: ValueError: port 1234 at 0xab12")
    decision = decided(first, ended(1, error="rank 1: ValueError: port 99 at 0x1"))
    assert not decision.again and "same error at the same step (10)" in decision.reason and "port 99" in decision.reason
    assert decided(first, ended(1, step=11, error=first.error)).again
    assert decided(first, ended(1, error="KeyError: 'a'")).again
    assert decided(first, ended(75), ended(1, error=first.error)).again
    assert decided(ended(SIGKILL), ended(SIGKILL)).again  # nobody knows what killed them
    saved = [ended(1, error="ValueError", saved=True)] * 2
    assert not decided(*saved).again


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (74, "error: preflight:"),
        (1, "OSError: [Errno 28] No space left on device: 'x'"),
        (1, "error: rank 1: [Errno 5] Input/output error"),
    ],
)
def test_a_disk_that_stays_full_is_no_fault_of_the_training(code, error):
    """It is tried again later and later, up to the bound, however alike its failures are."""
    attempts = [ended(code, error=error)] * 4
    assert [decided(*attempts[:count], max_restarts=3).wait_seconds for count in (1, 2, 3)] == [10, 20, 40]
    assert not decided(*attempts, max_restarts=3).again


def write_events(folder: Path, *events: dict) -> None:
    with open(folder / "run.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_the_ledger_has_two_lines_for_each_attempt_with_what_its_own_events_say(tmp_path):
    ledger = Ledger(tmp_path)
    write_events(tmp_path, {"event": "step", "step": 99}, {"event": "save", "step": 99})  # an earlier launch's
    first = ledger.begin("7", ["n1"])
    write_events(tmp_path, {"event": "step", "step": 5}, {"event": "error", "type": "OSError", "message": "gone"})
    ledger.write(replace(ledger.ended(first, 1), reason="a crash"))
    second = ledger.begin("7", ["n2"])
    write_events(tmp_path, {"event": "save", "step": 8}, {"event": "step", "step": 9})
    ledger.write(ledger.ended(second, SIGKILL, rank=3, error=None))
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [(line["attempt"], line["exit_code"]) for line in lines] == [(1, None), (1, 1), (2, None), (2, SIGKILL)]
    one, two = ledger.read("7")
    assert (one.step, one.saved, one.error, one.reason, one.nodes) == (5, False, "OSError: gone", "a crash", ("n1",))
    assert (two.step, two.saved, two.error, two.failure) == (9, True, None, "rank 3: killed by SIGKILL")
    assert ledger.read("8") == [] and one.failure == "OSError: gone"


def test_a_crash_is_at_the_step_that_its_rank_was_at_and_not_at_the_one_logged_last(tmp_path):
    """Attempts log other steps, as they go on from other checkpoints, and many steps between two that they log."""
    ledger, ended = Ledger(tmp_path), []
    for logged, step in ((10, 14), (12, 14), (10, 17), (10, None)):
        attempt = ledger.begin("7", ["n1"])
        write_events(tmp_path, {"event": "step", "step": logged})
        ended.append(ledger.ended(attempt, 1, rank=1, error="ValueError: x", step=step))
        ledger.write(ended[-1])
        ledger.tell_of_crash(ended[-1])
    assert [attempt.step for attempt in ended] == [14, 14, 17, 10]
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines() if '"crash"' in line]
    assert [event["step"] for event in events] == [14, 14, 17, 10]
    assert decided(ended[0], ended[2]).again
    decision = decided(ended[0], ended[1])
    assert not decision.again and "same error at the same step (14)" in decision.reason


def test_a_crash_is_an_event_of_the_run_unless_a_newer_attempt_writes_there(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.begin("7", ["n1"])
    with open(tmp_path / "run.jsonl", "w") as file:
        file.write('{"event": "step", "step": 5}\n{"event": "st')  # the rank was killed here
    crashed = ledger.ended(first, SIGKILL, rank=1)
    ledger.tell_of_crash(crashed)
    for code in (0, 2, 75, 77):
        ledger.tell_of_crash(ledger.ended(first, code))
    *_, line = (tmp_path / "run.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told.pop("time") == crashed.ended and told == {
        "event": "crash",
        "step": 5,
        "attempt": 1,
        "job": "7",
        "rank": 1,
        "exit_code": SIGKILL,
        "message": "rank 1: killed by SIGKILL",
    }
    ledger.begin("7", ["n2"])  # the first one's end was not written: nobody saw it
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines() if '"crash"' in line]
    assert [(event["attempt"], event["exit_code"]) for event in events] == [(1, SIGKILL), (1, None)]
    ledger.tell_of_crash(crashed)  # an older copy's launcher, late
    assert (tmp_path / "run.jsonl").read_text().count('"crash"') == 2


def test_an_attempt_whose_end_nobody_wrote_is_lost_and_a_cut_line_is_no_attempt(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.read() == []
    ledger.begin("7", ["n1"])
    with open(ledger.path, "a") as file:
        file.write('{"attempt": 9, "job": "7", "no')
    other = ledger.begin("8", ["n2"])  # another launch's does not end it
    assert ledger.read("7")[0].ended is None and other.attempt == 2
    third = ledger.begin("7", ["n2"])
    lost, again = ledger.read("7")
    assert lost.crashed and lost.exit_code is None and "lost" in lost.reason and again == third
    assert third.attempt == 3 and decided(lost).again


def test_an_attempt_goes_on_from_what_an_earlier_one_of_its_launch_saved(tmp_path):
    given = ["--resume", "other/step-00000004", "--optimizer.lr", "1"]
    assert resume_arguments(given, [], tmp_path) == given == resume_arguments(given, [ended(1)], tmp_path)
    assert resume_arguments(given, [ended(1, saved=True), ended(1)], tmp_path) == [*given, "--resume", "auto"]
    # A kill right behind a save leaves no event of it; what was there before the launch is none of its own.
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    attempt = Ledger(tmp_path).begin("7", ["n1"])
    began = datetime.fromisoformat(attempt.started).timestamp()
    for seconds, more in ((-5, []), (5, ["--resume", "auto"])):
        os.utime(checkpoint, (began + seconds, began + seconds))
        assert resume_arguments(given, [attempt], tmp_path) == [*given, *more]
    from pretrain.command_line import parse

    assert parse(["x.yaml", *given, "--resume", "auto"]).resume == "auto"


def test_a_stop_holds_for_one_launch(tmp_path):
    assert not told_to_stop(tmp_path, "7")
    ask_to_stop(tmp_path, "7")
    ask_to_stop(tmp_path, "local-host-1-23")
    assert told_to_stop(tmp_path, "7") and told_to_stop(tmp_path, "local-host-1-23")
    assert not any(told_to_stop(tmp_path, job) for job in ("8", "77", "local-host-1-2", ""))


def test_every_exit_code_has_words():
    for code in range(1, 256):
        assert ended(code).failure == (None if code == 75 else WORDS.get(code, f"exit code {code}"))
