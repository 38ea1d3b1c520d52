"""A suite file says what is to be compared, and everything that is wrong with one is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.data import SyntheticConfig
from pretrain.errors import UserError
from tests.tools.trials.run_cases import PLAIN, RECIPE, TEXT_SIZES, TEXT_STUDY, WILD, load, write_suite
from tools.trials.run import SUITE
from tools.trials.suite import Probe, load_suite
from tools.trials.text import shard_folders


def complaint(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(write_suite(folder, study=changes))
    return str(raised.value)


def test_trials_are_the_recipe_with_the_studys_changes_and_their_own(tmp_path: Path) -> None:
    changes = {"training": {**RECIPE["training"], "sequence_length": 30, "batch_tokens": 60}, "optimizer.lr": 1e-5}
    trials = {"a": {"optimizer.lr": 1e-4}, "b": {"model.preset": "mac-tiny", "model.segment": 16}, "c": None}
    (study,) = load(write_suite(tmp_path, study={"changes": changes, "trials": trials})).studies
    a, b, c = (trial.recipe for trial in study.trials)
    assert [a.optimizer.lr, b.optimizer.lr, c.optimizer.lr] == [1e-4, 1e-5, 1e-5]
    assert {recipe.training.sequence_length for recipe in (a, b, c)} == {30}
    assert (b.model.variant, b.model.segment, b.model.dim) == ("mac", 16, RECIPE["model"]["dim"])
    assert study.trials[1].parameters > study.trials[0].parameters == study.trials[2].parameters > 1000


def test_probes_have_every_default(tmp_path: Path) -> None:
    (study,) = load(write_suite(tmp_path, study={})).studies
    plain, further = study.probes["as trained"], study.probes["further apart"]
    assert plain.rows == 256 and further.rows == 20
    assert plain.task is not None and further.task is not None
    assert plain.task["filler"] == [8, 8] and further.task == {**plain.task, "filler": [40, 40]}
    (text,) = load(write_suite(tmp_path, TEXT_SIZES, study={**TEXT_STUDY, "probes": {"a": {}}})).studies
    assert text.probes["a"] == Probe(context=32, tokens=65536)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"beside": ["study/plain"]}, ["study study: beside: study/plain is not another study's"]),
        ({"beside": ["study/plane"]}, ["beside: there is no trial study/plane; did you mean study/plain?"]),
        ({"probes": {"a": {"task": {"num_values": 8}}}}, ["probe a: task: guessing gets 12 % right there and 3.1 %"]),
        ({"titel": "x"}, ["studies.study.titel: unknown; did you mean title?"]),
        ({"probes": {"a": {"row": 3}}}, ["studies.study.probes.a.row: unknown; did you mean rows?"]),
        ({"seeds": []}, ["studies.study.seeds"]),
        ({"seeds": [0, 1, 0]}, ["study study: seeds: 0 stands more than once"]),
        ({"recipe": "none.yaml"}, ["study study, trial plain: recipe", "none.yaml: No such file"]),
        ({"trials": {"a": {"model.dimm": 3}}}, ["trial a: recipe", "model.dimm: unknown; did you mean dim?"]),
        ({"trials": {"a": {"seed": 3}}}, ["trial a: seed is set by the command"]),
        ({"trials": {"../a": None}}, ["trial '../a' is no name for a folder"]),
        ({"trials": {"a": {"training.micro_batch_size": 3}}}, ["trial a: training.batch_tokens 64 is not a multiple"]),
        ({"trials": {"a": None, "b": {"training.tokens": 6400}}}, ["trial b: training.tokens is 6400 and a's is 3072"]),
        ({"probes": {"a": {"context": 64}}}, ["probe a: context does not fit data.kind synthetic: give task and rows"]),
        ({"probes": {"a": {"task": {"fillr": 64}}}}, ["probe a: ", "fillr", "did you mean filler?"]),
        ({"probes": {"a": {"task": {"num_values": 99}}}}, ["probe a: model.vocab_size 96 is smaller"]),
        (
            {"trials": {"a": None, "b": {"data.task.num_values": 16}}},
            ["probe as trained: comes to different rows for the trials a and b"],
        ),
        ({"text": True}, ["text is true, and the suite has no sizes", "data.task: unknown"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    message = complaint(tmp_path, **changes)
    assert message.startswith(f"suite {tmp_path / 'suite.yaml'}:")
    for part in parts:
        assert part in message


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    trials = {PLAIN: {"model.dimm": 3}, WILD: {"optimizer.lrr": 3}, "Loud": None}
    message = complaint(tmp_path, trials=trials, probes={"a": {"context": 4}})
    assert all(part in message for part in ("trial plain", "trial wild", "'Loud' is no name", "probe a"))


def test_models_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    trials = {"small": None, "middle": {"model.ffn_dim": 17}, "large": {"model.ffn_dim": 64}}
    assert load(write_suite(tmp_path, study={"trials": trials, "same_parameters": 0.8}))
    message = complaint(tmp_path, trials=trials, same_parameters=0.03)
    assert "large has" in message and "more than small with" in message and "at most 3 %" in message


def test_text_has_no_accuracy_and_a_vocabulary_that_fits(tmp_path: Path) -> None:
    for changes, part in [
        ({"metric": "accuracy"}, "metric accuracy needs data with answers"),
        ({"trials": {"a": {"model.vocab_size": 300}}}, "model.vocab_size 300 is smaller than text.vocab_size 400"),
        ({"trials": {"a": {"data.train": "elsewhere"}}}, "data.train is set by the command"),
        ({"probes": {"a": {"rows": 3}}}, "rows does not fit data.kind shards: give context and tokens"),
    ]:
        with pytest.raises(UserError, match=part):
            load(write_suite(tmp_path, TEXT_SIZES, study={**TEXT_STUDY, **changes}))


def test_a_file_that_is_none_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.yaml")
    for text, part in [
        ("a: [", "cannot be read as YAML"),
        ("3", "the file: 3 does not fit"),
        ("{}", "studies: missing"),
    ]:
        (tmp_path / "suite.yaml").write_text(text)
        with pytest.raises(UserError, match=part):
            load(tmp_path / "suite.yaml")


def test_a_trial_beside_a_study_is_trained_and_probed_as_it_is(tmp_path: Path) -> None:
    def lent(**changes: Any) -> Path:
        return write_suite(tmp_path, study={}, other={**changes, "beside": ["study/plain"]})

    assert load(lent()).studies[1].config.beside == ("study/plain",)
    for changes, problem in [
        ({"probes": {"as trained": {"rows": 3}}}, "has not all of this study's probes"),
        ({"seeds": [0, 2]}, "has not all of this study's seeds"),
        ({"changes": {"training.tokens": 64}}, "is not another study's, trained on the same data and tokens"),
    ]:
        with pytest.raises(UserError, match=f"study other: beside: study/plain {problem}"):
            load(lent(**changes))


def test_the_projects_suite_is_right_and_asks_beyond_every_window(tmp_path: Path) -> None:
    suite = load_suite(SUITE, shard_folders(tmp_path))
    studies = {study.name: study for study in suite.studies}
    for name in ("variants", "passkey"):
        trials = {trial.name: trial.recipe.model for trial in studies[name].trials}
        assert {"mac", "mag", "lmm", "transformer-window"} <= trials.keys()
        reach = max(model.window or model.segment or 0 for model in trials.values())
        if name == "passkey":  # the key stands before all of the filler
            assert all((one.task or {})["depth"] == 0 for probe, one in studies[name].probes.items() if "w" in probe)
        filler = {probe: (one.task or {})["filler"] for probe, one in studies[name].probes.items()}
        assert min(filler["16 windows"]) >= 16 * reach and min(filler["64 windows"]) >= 64 * reach
        training = studies[name].trials[0].recipe.training.sequence_length
        row = SyntheticConfig.model_validate({"task": studies[name].probes["4x length"].task}).task.row_tokens
        assert row >= 4 * training
        sizes = [trial.parameters for trial in studies[name].trials]
        assert max(sizes) <= 1.03 * min(sizes)
