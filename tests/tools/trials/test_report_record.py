"""A record keeps all results, says what is missing, and refuses what it is not."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from pretrain.errors import UserError
from tests.tools.trials.report_cases import ENVIRONMENT, full_record, result
from tools.trials.plots import positions_figure, probes_figure
from tools.trials.record import (
    Record,
    Spread,
    StudyRecord,
    by_position,
    common_curve,
    gather,
    read_record,
    write_record,
)
from tools.trials.results import SUITE_FILE, run_folder, write_result
from tools.trials.tables import study_table


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = full_record()
    path = tmp_path / "new" / "record.json"
    write_record(record, path)
    assert read_record(path) == record
    lines = path.read_text().splitlines()
    assert sum('"study":' in line for line in lines) == len(record.results)  # a line per result
    assert path.read_text().count(ENVIRONMENT["commit"]) == 1  # the environment that all share stands once


def test_a_run_on_another_machine_keeps_its_environment(tmp_path):
    other = {**ENVIRONMENT, "hardware": {"cores": 64}}
    record = full_record()
    results = (record.results[0], record.results[1].model_copy(update={"environment": other}), *record.results[2:])
    record = record.model_copy(update={"results": results})
    write_record(record, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record


def test_runs_without_a_result_are_known():
    record = full_record()
    assert record.missing() == ["variants/mal/seed-2", "variants/transformer/seed-2"]
    variants = record.of_study("variants")
    assert [run.seed for run in variants.diverged("mal")] == [1]
    assert [run.seed for run in variants.finished("mal")] == [0]


def test_trials_beside_a_study_come_first_and_are_no_runs_of_its_own():
    record = full_record()
    ablations = record.studies["ablations"].model_copy(update={"beside": ("variants/lmm", "variants/mal")})
    lent = record.model_copy(update={"studies": {**record.studies, "ablations": ablations}})
    results = lent.of_study("ablations")
    assert results.study.trials[:3] == ("variants/lmm", "variants/mal", "everything")
    own = record.of_study("variants").probe_values("lmm", "16 windows")
    assert results.probe_values("variants/lmm", "16 windows") == {seed: own[seed] for seed in (0, 1)}
    assert [run.seed for run in results.diverged("variants/mal")] == [1]
    assert lent.missing() == record.missing()
    assert study_table(results).rows[0][0] == "variants/lmm"


def test_a_result_of_another_recipe_is_not_the_suites():
    record = full_record()
    run = record.results[0]
    path = f"{run.study}/{run.trial}/seed-{run.seed}"
    assert record.model_copy(update={"expected": {path: run.recipe_sha256}}).has(run)
    assert not record.model_copy(update={"expected": {path: "1" * 64}}).has(run)


STUDY = StudyRecord(title="t", metric="accuracy", sequence_length=8, trials=("a",), seeds=(0,), probes=("p",))


@pytest.mark.parametrize(
    ("run", "message"),
    [(("t", "a", 0), "t/a/seed-0"), (("s", "b", 0), "s/b/seed-0"), (("s", "a", 1), "s/a/seed-1")],
)
def test_results_of_no_study_are_refused(run, message):
    with pytest.raises(ValidationError, match=f"{message} is not one of the studies' runs"):
        Record(command="c", studies={"s": STUDY}, results=(result(*run),))


def test_two_results_of_a_run_are_refused():
    with pytest.raises(ValidationError, match="s/a/seed-0 has two results"):
        Record(command="c", studies={"s": STUDY}, results=(result("s", "a", 0),) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "is no record of trials"),
        (lambda text: text.replace("mnemosyne-trials", "other"), "is no record of trials"),
        (lambda text: text.replace('"version": 1', '"version": 2', 1), "of another version: version: "),
        (lambda text: text.replace('"variants"', '"variant"', 1), "is not one of the studies' runs"),
        (lambda text: json.dumps({**json.loads(text), "results": [3]}), "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "results": 3}), "is damaged"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, change, message):
    path = tmp_path / "record.json"
    write_record(full_record(), path)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.json: cannot be read"):
        read_record(tmp_path / "absent.json")


def test_curves_are_averaged_over_steps_that_all_seeds_have():
    runs = [
        result("s", "a", 0, curve=[[100, 0.25], [200, 0.5], [300, 0.75]]),
        result("s", "a", 1, curve=[[100, 0.5], [200, 1.0], [300, math.nan]]),
    ]
    assert common_curve(runs) == [(100, Spread(0.375, 0.25, 0.5, 2)), (200, Spread(0.75, 0.5, 1.0, 2))]
    assert common_curve([]) == []


def test_loss_by_position_stands_at_the_middle_of_its_bucket():
    def run(seed, losses):
        buckets = [
            {"first": first, "last": last, "tokens": 4, "loss": loss}
            for (first, last), loss in zip(((0, 63), (64, 127)), losses, strict=True)
        ]
        probe = {"loss": 1.0, "bits_per_byte": 1.0, "tokens": 8, "row_tokens": 128, "by_position": buckets}
        return result("s", "a", seed, chance=None, probes={"p": probe})

    found = by_position([run(0, (4.0, 2.0)), run(1, (5.0, 2.0))], "p")
    assert found == [(32.5, Spread(4.5, 4.0, 5.0, 2)), (96.5, Spread(2.0, 2.0, 2.0, 2))]
    assert by_position([run(0, (4.0, 2.0))], "another") == []


def test_the_record_of_a_folder_has_its_results_and_names_others(tmp_path):
    record = full_record()
    write_record(record.model_copy(update={"results": ()}), tmp_path / SUITE_FILE)
    for run in (*record.results, result("renamed", "a", 0)):
        write_result(run_folder(tmp_path, run.study, run.trial, run.seed), run)
    found, others = gather(tmp_path)
    assert sorted(found.results, key=str) == sorted(record.results, key=str)
    assert found.model_copy(update={"results": ()}) == record.model_copy(update={"results": ()})
    assert others == ["renamed/a/seed-0"]


def test_a_folder_without_trials_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no trials .* run `python -m tools.trials run` first"):
        gather(tmp_path)


def test_a_probe_that_is_no_number_is_left_out(tmp_path):
    probe = {"loss": math.nan, "tokens": 8, "row_tokens": 8, "bits_per_byte": math.nan}
    probe["by_position"] = [{"first": 0, "last": 7, "tokens": 8, "loss": math.inf}]
    study = STUDY.model_copy(update={"metric": "loss"})
    record = Record(command="c", studies={"s": study}, results=(result("s", "a", 0, chance=None, probes={"p": probe}),))
    write_record(record, tmp_path / "record.json")
    results = read_record(tmp_path / "record.json").of_study("s")
    assert math.isnan(results.results[0].probes["p"].loss)
    assert results.probe_values("a", "p") == {} and by_position(results.results, "p") == []
    assert study_table(results).rows[0][-1] == "not finite"
    assert probes_figure(results) is None and positions_figure(results) is None
