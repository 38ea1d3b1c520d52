"""A suite is run to its end whatever comes between; what is there is not run again; what is in the way is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from model import TitansLM
from pretrain.config import load_recipe
from pretrain.errors import UserError
from pretrain.folder_lock import locked
from tests.data_cases import documents
from tests.tools.trials.report_cases import result
from tests.tools.trials.run_cases import PLAIN, STUDY, TEXT_SIZES, TEXT_STUDY, WILD, load, write_suite
from tests.training_cases import events
from tools.command import duration
from tools.demo.training import kill_tree, newest_checkpoint
from tools.trials.__main__ import main
from tools.trials.probe import run as run_probes
from tools.trials.probe import run_probe
from tools.trials.progress import Clock
from tools.trials.record import gather
from tools.trials.results import Result, read_result, run_folder, write_result
from tools.trials.run import require_same_recipes
from tools.trials.runner import Ended
from tools.trials.runs import Run, read_trial_file, runs_of
from tools.trials.suite import TextSizes, load_suite
from tools.trials.text import prepare_text, shard_folders

REPOSITORY = Path(__file__).parents[3]
STEPS = 48


@dataclass(frozen=True)
class Finished:
    """A suite of two trials and two seeds after two calls, the first of which was killed."""

    suite: Path
    output: Path
    kill_step: int
    code: int
    printed: str

    def result(self, trial: str, seed: int) -> Result:
        return read_result(run_folder(self.output, "study", trial, seed) / "result.json")

    def command(self, *options: str) -> int:
        return main(["run", str(self.suite), "--output", str(self.output), *options])


def start(suite: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.trials", "run", str(suite), "--output", str(output), *options]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("trials")
    suite, output = write_suite(folder, study={}), folder / "out"
    plain = run_folder(output, "study", PLAIN, 0)
    killed = start(suite, output, "--workers", "2")
    wait_for(lambda: newest_checkpoint(plain) is not None, killed)
    assert kill_tree(killed) >= 3, "the command, and the guard and the training of each run"
    newest = newest_checkpoint(plain)
    assert newest is not None and not (plain / "result.json").exists()
    again = start(suite, output, "--workers", "2")
    printed, _ = again.communicate(timeout=600)
    return Finished(suite, output, int(newest.name.removeprefix("step-")), again.returncode, printed)


def test_a_killed_suite_goes_on_to_its_end(finished: Finished) -> None:
    assert finished.code == 0, finished.printed
    (resume,) = events(run_folder(finished.output, "study", PLAIN, 0), "resume")
    assert resume["step"] >= finished.kill_step >= 8
    for seed in (0, 1):
        result = finished.result(PLAIN, seed)
        assert (result.seed, result.steps, result.tokens, result.failed) == (seed, STEPS, 64 * STEPS, None)
        assert [step for step, _ in result.curve] == [16, 32, 48]
        assert result.chance == 1 / 32 and result.seconds > 0 and result.tokens_per_second > 0
        assert set(result.memory["layer 0"]) >= {"alpha", "eta", "theta"}
        assert result.environment["versions"]["torch"] == torch.__version__


def test_probes_score_the_rows_that_they_ask_for(finished: Finished) -> None:
    probes = finished.result(PLAIN, 0).probes
    assert list(probes) == ["as trained", "further apart"]
    assert (probes["as trained"].tokens, probes["as trained"].row_tokens) == (256 * 4, 24)
    assert (probes["further apart"].tokens, probes["further apart"].row_tokens) == (20 * 4, 56)
    assert all(0 <= (probe.accuracy or 0) < 0.5 and 3 < probe.loss < 7 for probe in probes.values())
    assert finished.result(PLAIN, 1).probes != probes


def test_a_run_that_diverges_is_a_result_and_stops_no_other(finished: Finished) -> None:
    for seed in (0, 1):
        result = finished.result(WILD, seed)
        assert result.failed is not None and result.failed.startswith("DivergedError: step ")
        assert not result.probes and result.steps < STEPS
    assert "study/wild/seed-1  diverged" in finished.printed
    assert "2 diverged" in finished.printed, "in the table at the end"


def test_what_is_there_is_not_run_again(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.output.glob("*/*/*/*")}
    assert finished.command() == 0
    assert "4 runs: 4 done, 0 left" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.output.glob("*/*/*/*")} == before
    assert finished.command("--dry-run", "--only", "*/plain", "--seeds", "1") == 0
    plan = capfd.readouterr().out
    assert "study/plain/seed-0" in plan and "done" in plan and "seed-1" not in plan and "wild" not in plan


def test_the_recipe_of_a_run_can_be_trained_alone(finished: Finished) -> None:
    folder = run_folder(finished.output, "study", PLAIN, 1)
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.folder, recipe.seed, recipe.name) == (folder, 1, "study/plain/seed-1")
    assert recipe == load_recipe(newest_checkpoint(folder) / "recipe.yaml"), "what was trained"


def test_other_probes_need_no_new_training(finished: Finished, tmp_path: Path) -> None:
    probes = {"two rows": {"rows": 2}}
    suite = load(write_suite(tmp_path, study={"probes": probes}))
    run = next(one for one in runs_of(suite, finished.output) if one.trial.name == PLAIN)
    assert run.state() == "trained"
    run.prepare()
    kept = (run.folder / "result.json").read_text()
    run_probes(run.folder)
    assert run.state() == "done" and run.result().probes["two rows"].tokens == 2 * 4
    (run.folder / "result.json").write_text(kept)


def test_a_result_that_is_lost_is_probed_again_and_is_the_same(finished: Finished) -> None:
    run = runs_of(load(finished.suite), finished.output)[0]
    run.prepare()
    before = run.result()
    (run.folder / "result.json").unlink()
    assert run.state() == "trained"
    run_probes(run.folder)
    assert run.result() == before


def test_runs_of_another_recipe_are_named_and_removed_only_if_asked(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_suite(tmp_path, study={"changes": {"optimizer.lr": 1e-3}, "trials": {PLAIN: None, "new": None}})
    assert main(["run", str(other), "--output", str(finished.output)]) == 2
    message = capsys.readouterr().err
    assert "2 runs" in message and "study/plain/seed-0, study/plain/seed-1" in message and "--restart" in message
    assert finished.result(PLAIN, 0)


def test_restart_removes_what_differs_alone(tmp_path: Path) -> None:
    kept, changed = runs_of(load(write_suite(tmp_path, study={"seeds": [0]})), tmp_path / "out")
    for run in (kept, changed):
        run.prepare()
    trials = {**STUDY["trials"], changed.trial.name: {"optimizer.lr": 0.5}}
    suite = load(write_suite(tmp_path, study={"seeds": [0], "trials": trials}))
    runs = runs_of(suite, tmp_path / "out")
    with pytest.raises(UserError, match=f"1 runs in .*{changed.name}"):
        require_same_recipes(runs, restart=False)
    states = require_same_recipes(runs, restart=True)
    assert states == {kept.name: "started", changed.name: "to do"}
    assert kept.folder.exists() and not changed.folder.exists()


def test_half_a_folder_is_not_taken_for_a_run_of_the_suite(tmp_path: Path) -> None:
    (run,) = runs_of(load(write_suite(tmp_path, study={"seeds": [0], "trials": {PLAIN: None}})), tmp_path / "out")
    run.prepare()
    (run.folder / "checkpoints" / f"step-{STEPS:08d}").mkdir(parents=True)
    assert run.state() == "trained"
    (run.folder / "recipe.yaml").unlink()
    assert run.state() == "of another recipe", "whose weights nobody knows"
    run.folder.with_name(".seed-0.removed").mkdir()
    require_same_recipes([run], restart=True)
    assert not list(run.folder.parent.iterdir())


def test_a_result_of_an_older_suite_is_in_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    suite = write_suite(tmp_path, study={"trials": {PLAIN: None}})
    now, later = runs_of(load(suite), output)
    write_result(now.folder, result("study", PLAIN, 0, recipe_sha256=now.identity()))
    write_result(later.folder, result("study", PLAIN, 1, recipe_sha256="0" * 64))
    assert main(["run", str(suite), "--output", str(output), "--seeds", "1"]) == 0
    printed = capsys.readouterr()
    assert "1 of 2 (1 missing)" in printed.out and "left out" in printed.err and later.name in printed.err
    record, others = gather(output)
    assert record.missing() == others == [later.name]


def test_the_environment_is_that_of_the_trainings_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = runs_of(load(write_suite(tmp_path, study={"seeds": [0], "trials": {PLAIN: None}})), tmp_path / "out")
    for commit, begun, expected in [("a", False, "a"), ("b", False, "b"), ("c", True, "b")]:
        monkeypatch.setattr("tools.trials.runs.environment", lambda commit=commit: {"commit": commit})
        if begun:
            (run.folder / "checkpoints" / "step-00000008").mkdir(parents=True)
        run.prepare()
        assert read_trial_file(run.folder).environment == {"commit": expected}


@pytest.mark.slow
def test_a_failure_is_reported_with_its_last_words_and_tried_again(tmp_path: Path) -> None:
    suite, output = write_suite(tmp_path, study={"seeds": [0], "trials": {PLAIN: None}}), tmp_path / "out"
    folder = run_folder(output, "study", PLAIN, 0)
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("in the way")
    process = start(suite, output)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith("failed: study/plain/seed-0, training: exit code 2 (")
    assert "study/plain/seed-0  FAILED" in printed and "training: exit code 2" in printed
    assert "  | error: folder" in printed and str(folder / "logs" / "training.log") in printed
    (run,) = runs_of(load(suite), output)
    assert run.state() == "started"


@pytest.mark.slow
def test_a_signal_ends_every_process_and_says_how_to_go_on(tmp_path: Path) -> None:
    suite, output = write_suite(tmp_path, study={"seeds": [0]}), tmp_path / "out"
    process = start(suite, output, "--workers", "2")
    wait_for(lambda: len(list(output.glob("*/*/*/logs/training.log"))) == 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert printed.endswith("SIGTERM: ended; the same command goes on from here\n")
    assert len(children) >= 2 and not any(child.is_running() for child in children)
    assert not list(output.glob("*/*/*/result.json"))


def test_runs_are_ordered_by_seed_then_the_longest_first(tmp_path: Path) -> None:
    large = {"title": "x", "seeds": [3, 4], "trials": {"large": {"model.dim": 64}}}
    suite = load(write_suite(tmp_path, study={"trials": {"a": None}}, large=large))
    names = [run.name for run in runs_of(suite, tmp_path)]
    assert names == ["large/large/seed-3", "study/a/seed-0", "large/large/seed-4", "study/a/seed-1"]
    assert [run.name for run in runs_of(suite, tmp_path, seeds=1)] == names[:2]


def test_options_that_fit_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = str(write_suite(tmp_path, study={}))
    for options, part in [
        (["--only", "study/none"], "--only study/none: matches none of: study/plain, study/wild"),
        (["--text", suite], "--text: none of the runs"),
        (["--dry-run", "--restart"], "--restart with --dry-run"),
    ]:
        assert main(["run", suite, "--output", str(tmp_path / "out"), *options]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_calls_do_not_run_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, output = write_suite(tmp_path, study={}), tmp_path / "out"
    with locked(output, busy="", place=""):
        assert main(["run", str(suite), "--output", str(output)]) == 2
    assert "another call runs trials in it; wait for its end, or give an --output" in capsys.readouterr().err
    assert not (output / "suite.json").exists()


def test_studies_of_text_are_left_out_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = write_suite(tmp_path, TEXT_SIZES, books=TEXT_STUDY, study={"seeds": [0], "trials": {PLAIN: None}})
    output = tmp_path / "out"
    (run,) = (one for one in runs_of(load(suite), output) if not one.study.config.text)
    write_result(run.folder, result("study", PLAIN, 0, recipe_sha256=run.identity()))
    assert main(["run", str(suite), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "left out: books, 1 runs that read text" in printed and "--text" in printed
    assert "1 runs: 1 done, 0 left" in printed
    assert main(["run", str(suite), "--output", str(output), "--only", "books/*"]) == 2
    assert "all runs that are asked for read text: name books" in capsys.readouterr().err


def test_a_probe_of_text_scores_by_position(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "text"
    book = tmp_path / "book.txt"
    book.write_text("".join(documents(60, words=200)))
    prepare_text([book], TextSizes.model_validate(TEXT_SIZES), folder, longest_row=256, scored_tokens=1000)
    suite = load_suite(write_suite(tmp_path, TEXT_SIZES, books=TEXT_STUDY), shard_folders(folder))
    (study,) = suite.studies
    recipe = study.trials[0].recipe
    torch.manual_seed(0)
    found = run_probe(TitansLM(recipe.model).eval(), recipe, study.probes["longer"])
    assert (found.tokens, found.row_tokens, found.accuracy) == (1000, 256, None)
    assert [(bucket.first, bucket.last, bucket.tokens) for bucket in found.by_position or ()] == [
        (0, 63, 256), (64, 127, 256), (128, 255, 488)
    ]  # fmt: skip
    assert found.bits_per_byte is not None and 5 < found.loss < 7
    assert sum(bucket.loss * bucket.tokens for bucket in found.by_position or ()) / 1000 == pytest.approx(found.loss)


def test_the_text_is_part_of_what_a_result_is_of_and_its_place_is_not(tmp_path: Path) -> None:
    runs = []
    for place in ("here", "there"):
        path = write_suite(tmp_path / place, TEXT_SIZES, books=TEXT_STUDY)
        (run,) = runs_of(load(path), tmp_path / place)
        runs.append(Run(run.study, run.trial, run.seed, run.output, text="book"))
    assert runs[0].identity() == runs[1].identity()
    other = Run(runs[0].study, runs[0].trial, runs[0].seed, runs[0].output, text="another book")
    assert other.identity() != runs[0].identity()


def test_what_is_left_is_estimated_by_the_same_trial_and_else_by_work(tmp_path: Path) -> None:
    suite = load(write_suite(tmp_path, study={"trials": {"a": None, "b": {"model.dim": 32}}}))
    runs = {run.name: run for run in runs_of(suite, tmp_path)}
    a, b = runs["study/a/seed-0"], runs["study/b/seed-0"]
    clock = Clock(2, [])
    clock.see([], [runs["study/a/seed-1"], runs["study/b/seed-1"]])
    assert clock.left(2) == "2 left" and clock.left(0) == "none left"
    clock.add(Ended(a, 5.0, None, "failed"))
    assert clock.left(2) == "2 left", "a failure says nothing of how long a run takes"
    clock.add(Ended(a, 20.0, result("study", "a", 0)))
    longest = 20 * b.work / a.work
    assert longest > 20, "two workers can't share it"
    assert clock.left(2) == f"2 left, about {duration(longest)}"
    clock.see([], [runs["study/a/seed-1"]] * 3)
    assert clock.left(3) == "3 left, about 30 s"
