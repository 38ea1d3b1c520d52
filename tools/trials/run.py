"""`python -m tools.trials run`: trains and probes all trials of a suite, going on where an earlier call stopped."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pretrain.errors import UserError
from pretrain.folder_lock import locked
from tools.command import positive_int
from tools.trials.progress import Clock, LiveLine, describe_ended
from tools.trials.record import Record, StudyRecord, gather, read_record
from tools.trials.results import SUITE_FILE, replace_text
from tools.trials.runner import Ended, Interrupted, Job, run_all
from tools.trials.runs import Run, State, runs_of, with_text
from tools.trials.suite import Suite, load_suite
from tools.trials.tables import markdown_report
from tools.trials.text import TEXT_FOLDER, prepare_text, read_fingerprint, shard_folders

SUITE = Path(__file__).parents[2] / "launch" / "recipes" / "trials" / "suite.yaml"
OVER: tuple[State, ...] = ("done", "diverged")
NOTE_SECONDS = 10.0
"""Between two notes of how long the suite has taken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tools.trials run`."""
    parser.add_argument(
        "suite", type=Path, nargs="?", default=SUITE, metavar="SUITE.yaml", help="the suite (default: the project's)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/trials"), metavar="FOLDER", help="results (default runs/trials)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help='only the runs whose study/trial matches one of these, such as "variants/*"',
    )
    parser.add_argument("--seeds", type=positive_int, metavar="N", help="only the first N seeds of each study")
    parser.add_argument(
        "--workers", type=positive_int, metavar="N", help="runs at a time, each of one thread (default: the cores)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="books for the studies of text: text files, .jsonl, .jsonl.gz, .parquet, or folders of them",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, what they come to and how far they are")
    parser.add_argument(
        "--restart", action="store_true", help="remove runs of other recipes than the suite's that are in their place"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs what is left to run; returns 0 when every selected run that could be run has its result, 1 where one failed,
    128 + n at a signal. Raises UserError.
    """
    started = time.monotonic()
    output: Path = arguments.output
    if arguments.dry_run and (unused := [f"--{name}" for name in ("restart", "workers") if getattr(arguments, name)]):
        raise UserError(f"{unused[0]} with --dry-run, which starts nothing: drop one of them")
    suite = load_suite(arguments.suite, shard_folders(output / TEXT_FOLDER))
    selected = select(runs_of(suite, output, seeds=arguments.seeds), arguments.only)
    if arguments.text and not any(one.study.config.text for one in selected):
        raise UserError("--text: none of the runs that are asked for reads text: drop it, or choose others with --only")
    if arguments.dry_run:
        reading = any(one.study.config.text for one in selected)
        fingerprint = read_fingerprint(output / TEXT_FOLDER, suite.text) if reading else None
        print_plan([with_text(one, fingerprint) for one in selected], text_is_named=bool(arguments.text))
        return 0
    with locked(output, busy="another call runs trials in it", place="an --output"):
        runs = with_texts(suite, selected, arguments.text, output)
        states = require_same_recipes(runs, restart=arguments.restart)
        record = write_suite(suite, output, arguments.command)
        workers = arguments.workers or len(os.sched_getaffinity(0))
        try:
            failures = run_left(runs, states, workers, output, record, started)
        except Interrupted as signal_came:
            print(f"{signal_came}: ended; the same command goes on from here", file=sys.stderr)
            return 128 + signal_came.number
        found, others = gather(output)
        print(markdown_report(found))
        if others:
            print(f"left out, as they are not of this suite: {', '.join(others)}", file=sys.stderr)
        print(f"results: {output}; plots: python -m tools.trials report {output}", flush=True)
    for ended in failures:
        print(f"failed: {ended.run.name}, {ended.failure} ({ended.log}); the next call tries it again", file=sys.stderr)
    return 1 if failures else 0


def select(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """The runs whose `study/trial` matches one of the patterns; all without any. Raises UserError where a pattern
    matches none.
    """
    paths = list(dict.fromkeys(one.path for one in runs))
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UserError(f"--only {pattern}: matches none of: {', '.join(paths)}")
    return [one for one in runs if not patterns or any(fnmatchcase(one.path, pattern) for pattern in patterns)]


def with_texts(suite: Suite, runs: Sequence[Run], paths: Sequence[Path] | None, output: Path) -> list[Run]:
    """The runs that can be run: those of text need one, from `paths` or from an earlier call; says what is left out.

    Raises UserError for a text that does not fit, or is another than the one that is there.
    """
    reading = [one for one in runs if one.study.config.text]
    if not reading or suite.text is None:
        return list(runs)
    folder = output / TEXT_FOLDER
    if paths:
        longest = max(probe.context or 0 for one in reading for probe in one.study.probes.values())
        scored = max(probe.tokens or 0 for one in reading for probe in one.study.probes.values())
        fingerprint: str | None = prepare_text(paths, suite.text, folder, longest_row=longest, scored_tokens=scored)
    else:
        fingerprint = read_fingerprint(folder, suite.text)
    if fingerprint is None and len(reading) == len(runs):
        raise UserError("all runs that are asked for read text: name books, or a folder of them, with --text")
    if fingerprint is None:
        studies = ", ".join(dict.fromkeys(one.study.name for one in reading))
        print(f"left out: {studies}, {len(reading)} runs that read text; name books, or a folder of them, with --text")
        return [one for one in runs if not one.study.config.text]
    return [with_text(one, fingerprint) for one in runs]


def require_same_recipes(runs: Sequence[Run], *, restart: bool) -> dict[str, State]:
    """How far each run is, by name. Those of other recipes are removed if `restart`, else a UserError."""
    states = {one.name: one.state() for one in runs}
    others = [one for one in runs if states[one.name] == "of another recipe"]
    if others and not restart:
        raise UserError(
            f"{len(others)} runs in {others[0].output} are of other recipes (or another text) than the suite's: "
            f"{', '.join(one.name for one in others)}; give another --output, remove them, or let --restart do it"
        )
    for one in others:
        one.remove()
        states[one.name] = "to do"
    return states


def write_suite(suite: Suite, output: Path, command: str) -> Record:
    """Writes what is to be run, for the report; keeps the seconds of earlier calls. Raises UserError."""
    path = output / SUITE_FILE
    record = Record(
        command=command,
        seconds=(read_record(path).seconds or 0.0) if path.exists() else 0.0,
        studies=study_records(suite),
        expected=expected_results(suite, output),
        results=(),
    )
    replace_text(path, record.model_dump_json(indent=1) + "\n")
    return record


def study_records(suite: Suite) -> dict[str, StudyRecord]:
    """What a report says of the studies, by name."""
    return {
        study.name: StudyRecord(
            title=study.config.title,
            metric=study.config.metric,
            sequence_length=study.trials[0].recipe.training.sequence_length,
            trials=tuple(trial.name for trial in study.trials),
            seeds=study.config.seeds,
            probes=tuple(study.probes),
            beside=study.config.beside,
        )
        for study in suite.studies
    }


def expected_results(suite: Suite, output: Path) -> dict[str, str]:
    """What the result of every run must be of, by the run's name; runs of text only where the text is known."""
    text = any(study.config.text for study in suite.studies)
    fingerprint = read_fingerprint(output / TEXT_FOLDER, suite.text) if text else None
    runs = [with_text(one, fingerprint) for one in runs_of(suite, output)]
    return {one.name: one.identity() for one in runs if one.text is not None or not one.study.config.text}


def run_left(
    runs: Sequence[Run], states: dict[str, State], workers: int, output: Path, record: Record, started: float
) -> list[Ended]:
    """Runs what has no result yet, saying how each ended; returns those that failed. `started`: when the call began, by
    the monotonic clock. Raises Interrupted at a signal.
    """
    left = [one for one in runs if states[one.name] not in OVER]
    print(f"{len(runs)} runs: {len(runs) - len(left)} done, {len(left)} left, {workers} at a time", flush=True)
    clock = Clock(workers, [(one, one.result().seconds) for one in runs if states[one.name] == "done"])
    line = LiveLine()
    failures: list[Ended] = []
    before = record.seconds or 0.0
    waiting = len(left)
    noted = started

    def note_seconds() -> None:
        nonlocal noted
        noted = time.monotonic()
        now = record.model_copy(update={"seconds": before + noted - started})
        replace_text(output / SUITE_FILE, now.model_dump_json(indent=1) + "\n")

    def watch(jobs: Sequence[Job], queue: Iterable[Run]) -> None:
        clock.see(jobs, queue)
        if line.due:
            line.show(clock.describe())
        if time.monotonic() - noted > NOTE_SECONDS:  # so that a kill loses little of what the suite has taken
            note_seconds()

    try:
        for ended in run_all(left, workers, watch):
            waiting -= 1
            clock.add(ended)
            failures += [ended] * (ended.result is None)
            line.clear()
            print(f"{describe_ended(ended)}; {clock.left(waiting)}", flush=True)
    finally:
        line.clear()
        note_seconds()
    return failures


def print_plan(runs: Sequence[Run], *, text_is_named: bool) -> None:
    """All runs in their order, and how far they are."""
    rows = [("run", "parameters", "steps", "tokens", "state")]
    states = Counter[str]()
    for one in runs:
        if one.study.config.text and one.text is None:  # no text was built, so that no run of it was started
            state: str = "to do" if text_is_named else "needs --text"
        else:
            state = one.state()
        states[state] += 1
        tokens = one.recipe.batches(1).total_tokens
        rows.append((one.name, f"{one.trial.parameters:,}", f"{one.steps:,}", f"{tokens:,}", state))
    name, parameters, steps, tokens_width, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:  # as wide as the names are: a table of the terminal's width would break them
        print(f"{row[0]:{name}}  {row[1]:>{parameters}}  {row[2]:>{steps}}  {row[3]:>{tokens_width}}  {row[4]}")
    print(f"{len(runs)} runs: {', '.join(f'{number} {state}' for state, number in states.items())}")
