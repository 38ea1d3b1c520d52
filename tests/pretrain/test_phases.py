"""Recipes that list phases: what each phase comes to, overrides of one or of all, mistakes named with their phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.command_line import fields_help, parse
from pretrain.config import load_recipe
from pretrain.data import Cursor
from pretrain.errors import UserError
from pretrain.phases import Phases, load_phases
from pretrain.plan import describe
from pretrain.resume import DonePhase, TrainerState, _phase_of
from tests.training_cases import recipe_fields

PHASES: list[dict[str, Any]] = [
    {"name": "short"},
    {
        "name": "long",
        "training": {"tokens": 2048, "sequence_length": 128, "segment_length": 32, "batch_tokens": 256},
        "model": {"rope_base": 1e6},
        "parallel": {"zero_stage": 3},
        "schedule": {"kind": "constant", "warmup_tokens": 0},
    },
    {
        "name": "drawn",
        "training": {"sequence_length": 128, "batch_tokens": 256},
        "data": {"kind": "synthetic", "task": {"kind": "recall", "num_keys": 8, "num_values": 8}},
    },
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, PHASES)


def write(folder: Path, phases: Any) -> Path:
    fields = recipe_fields(Path("shards"), folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**fields, "phases": phases}, sort_keys=False))
    return path


def refused(path: Path, *overrides: tuple[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        load_phases(path, overrides)
    return str(caught.value)


def test_every_phase_is_a_whole_recipe(path: Path) -> None:
    short, long, drawn = load_phases(path)
    assert [phase.name for phase in (short, long, drawn)] == ["short", "long", "drawn"]
    assert [phase.title for phase in (short, drawn)] == ["phase short (1 of 3)", "phase drawn (3 of 3)"]
    assert long.recipe.training.segment_length == 32
    assert long.recipe.training.micro_batch_size == short.recipe.training.micro_batch_size == 2
    assert [phase.recipe.model.rope_base for phase in (short, long, drawn)] == [10_000, 1e6, 10_000]
    assert long.recipe.schedule.kind == "constant" and drawn.recipe.schedule.kind == "cosine"
    assert drawn.recipe.data.kind == "synthetic", "data of another kind takes no field of the shards"
    assert drawn.recipe.optimizer == short.recipe.optimizer


def test_a_recipe_without_phases_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, None)
    (only,) = load_phases(path)
    assert Phases.alone(only.recipe) == load_phases(path)
    assert load_phases(path).to_yaml() == only.recipe.to_yaml()
    assert load_recipe(path) == only.recipe
    assert only.recipe.data_seed() == 0 and only.recipe.data.seed is None


def test_what_takes_one_recipe_refuses_several(path: Path) -> None:
    with pytest.raises(UserError, match="lists phases"):
        load_recipe(path)


def test_phases_written_out_are_the_same_phases(path: Path, tmp_path: Path) -> None:
    for overrides in ([], [("phases.1.data.seed", "5"), ("phases.2.data.seed", "5")], [("data.seed", "3")]):
        phases = load_phases(path, overrides)
        again = tmp_path / "again.yaml"
        again.write_text(phases.to_yaml())
        assert load_phases(again) == phases


def test_no_phase_repeats_anothers_order_unless_it_is_asked_to(path: Path) -> None:
    def seeds(*overrides: tuple[str, str]) -> list[int]:
        return [phase.recipe.data_seed() for phase in load_phases(path, overrides)]

    assert seeds() == [0, 1, 2]
    assert seeds(("seed", "7")) == [7, 8, 9]
    assert seeds(("data.seed", "7")) == [7, 8, 2], "the drawn data has no seed of its own: the run's"
    assert seeds(("phases.long.data.seed", "0")) == [0, 0, 2]
    assert seeds(("seed", str(2**63 - 1))) == [2**63 - 1, 0, 1]
    assert seeds(("phases.1.data.seed", "1")) == [1, 2, 3], "those behind it go past it"
    assert seeds(("phases.drawn.data.seed", "1")) == [0, 2, 1]
    assert seeds(("phases.1.data.seed", "0"), ("seed", str(2**63 - 1))) == [0, 1, 2]


def test_a_run_can_begin_with_a_later_phase(path: Path, tmp_path: Path) -> None:
    """The phases are those of the whole recipe, their data's seeds included, under the numbers that are left."""
    begun = [("start_phase", "long"), ("initialize_from", "model")]
    later, whole = load_phases(path, begun), load_phases(path)
    assert [phase.title for phase in later] == ["phase long (1 of 2)", "phase drawn (2 of 2)"]
    given = {"start_phase": "long", "initialize_from": Path("model")}
    assert [phase.recipe for phase in later] == [phase.recipe.model_copy(update=given) for phase in whole.phases[1:]]
    again = tmp_path / "again.yaml"
    again.write_text(later.to_yaml())
    assert load_phases(again) == later
    assert load_phases(path, [("start_phase", "short"), begun[1]]).run.training == whole.run.training


def test_a_later_phase_to_begin_with_is_checked(path: Path, tmp_path: Path) -> None:
    given = ("initialize_from", "model")
    assert "there is no phase lnog: did you mean long?" in refused(path, ("start_phase", "lnog"), given)
    message = refused(path, ("start_phase", "long"))
    assert message.count("nothing says which weights it goes on from: set initialize_from") == 1
    for name in ("phases.short.training.tokens", "phases.1.training.tokens"):
        message = refused(path, ("start_phase", "long"), given, (name, "1024"))
        assert f"--{name}: has no effect, as start_phase leaves that phase out" in message
    load_phases(path, [("start_phase", "long"), given, ("phases.2.training.tokens", "1024")])
    message = refused(path, ("start_phase", "long"), given, ("training.sequence_length", "64"))
    assert "--training.sequence_length: has no effect, as every phase sets" in message
    alone = write(tmp_path, None)
    assert "there is no phase long" in refused(alone, ("start_phase", "long"), given)
    with pytest.raises(UserError, match="lists no phases: remove it"):
        load_recipe(alone, [("start_phase", "long"), given])


def test_an_override_reaches_one_phase_or_those_without_a_value_of_their_own(path: Path) -> None:
    def tokens(*overrides: tuple[str, str]) -> list[int]:
        return [phase.recipe.training.tokens for phase in load_phases(path, overrides)]

    assert tokens(("training.tokens", "1Ki")) == [1024, 2048, 1024]
    assert tokens(("phases.2.training.tokens", "1Ki")) == [1536, 1024, 1536]
    assert tokens(("phases.drawn.training.tokens", "1Ki"), ("training.tokens", "4Ki")) == [4096, 2048, 1024]
    assert [phase.name for phase in load_phases(path, [("phases", "[{name: one}]")])] == ["one"]
    assert len(load_phases(path, [("phases", "null")])) == 1


def test_an_override_that_changes_nothing_is_refused(path: Path) -> None:
    own = [(f"phases.{name}.training.batch_tokens", "256") for name in ("short", "long", "drawn")]
    message = refused(path, *own, ("training.batch_tokens", "512"))
    assert "--training.batch_tokens: has no effect, as every phase sets training.batch_tokens itself" in message
    assert "--training.batch_tokens" in refused(path, *own, ("training", "{tokens: 1024, batch_tokens: 512}"))
    assert load_phases(path, [*own[1:], ("training.batch_tokens", "512")])[0].recipe.training.batch_tokens == 512


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "phases.9.training.tokens",
            "1",
            "there is no phase 9: (known: short, long, drawn), or a number from 1",
        ),
        ("phases.lnog.training.tokens", "1", "there is no phase lnog: did you mean long?"),
        ("phases.long", "1", "--phases.long: give a field of the phase, such as --phases.long.training.tokens"),
        ("phases.long.training.tokens.x", "1", "tokens is a value, not a section"),
        ("phases", "[]", "phases: list at least one, each with a name, or remove it"),
        ("phases", "[{training: {}}]", "phases.1: has no name; add one, such as 32k"),
        ("phases", "[5]", "phases.1: expected a name and sections, found 5"),
        ("phases.1.name", "long", "phases.2: a phase before is called long too"),
        ("phases.1.name", "4096", "phases.1: name 4096 does not fit: letters, digits, - and _, and not digits alone"),
        ("phases.1.name", "a.b", "phases.1: name 'a.b' does not fit"),
        ("phases.long.model.dim", "64", "phases.long.model.dim: cannot change between phases"),
        ("phases.long.model.memory", "{chunk: 4}", "phases.long.model.memory: cannot change between phases"),
        ("phases.long.seed", "1", "phases.long.seed: holds for the whole run; set it outside the phases"),
        ("phases.long.folder", "x", "phases.long.folder: holds for the whole run"),
        ("phases.long.initialize_from", "x", "phases.long.initialize_from: holds for the whole run"),
        ("phases.long.parallel.device", "cuda", "phases.long.parallel.device: holds for the whole run"),
        ("phases.long.trainign", "{}", "phases.long.trainign: unknown; did you mean training?"),
        ("phases.long.training.tokns", "1", "phase long: training.tokns: unknown; did you mean tokens?"),
        ("phases.long.training.segment_length", "48", "phase long: training: segment_length 48 does not divide"),
        (
            "phases.drawn.training.sequence_length",
            "16",
            "phase drawn: recipe: training.sequence_length 16 is too",
        ),
        ("phases.long.data.kind", "synthetic", "phase long: data.task: missing"),
    ],
)
def test_a_mistake_is_named_with_its_phase(path: Path, name: str, value: str, expected: str) -> None:
    assert expected in refused(path, (name, value))


def test_all_mistakes_are_listed_and_one_of_all_phases_once(path: Path) -> None:
    wrong = [("phases.long.seed", "1"), ("phases.drawn.training.tokens", "many"), ("optimizer.lr", "fast")]
    lines = refused(path, *wrong).splitlines()[1:]
    assert len(lines) == 3
    assert sum("optimizer.lr" in line for line in lines) == 1 and not any("phase long: opt" in line for line in lines)


def test_a_recipe_without_phases_has_none_to_override(tmp_path: Path) -> None:
    message = refused(write(tmp_path, None), ("phases.1.training.tokens", "5"))
    assert "the recipe lists no phases; give --training.tokens" in message


def test_steps_that_do_not_divide_are_named_for_all_phases(path: Path) -> None:
    phases = load_phases(path, [("phases.drawn.training.micro_batch_size", "3")])
    with pytest.raises(UserError) as caught:
        phases.require_fit(2)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["phase long (2 of 3)", "phase drawn (3 of 3)"]


def test_the_help_says_how_a_field_of_a_phase_is_set() -> None:
    text = fields_help()
    assert "--phases.NAME.SECTION.FIELD VALUE" in text and "--phases.NAME.model.rope_base VALUE" in text
    assert parse(["r.yaml", "--phases.long.training.tokens", "5"]).overrides == [("phases.long.training.tokens", "5")]


def test_the_dry_run_tells_every_phase_and_the_whole(path: Path) -> None:
    text = describe(load_phases(path), 1)
    for line in (
        "# phase short (1 of 3)\n#   tokens              1,536 in 12 steps of 128",
        "# phase long (2 of 3)\n#   tokens              2,048 in 8 steps of 256",
        "#   a step              2 rows of 128 = 1 rank(s) x 1 micro-batch(es) x 2 row(s)",
        "#   a row               4 segment(s) of 32 tokens",
        "#   RoPE base           1,000,000",
        "#   learning rate       constant, 0.003\n",
        "#   learning rate       cosine, 0.003 to 0.0003, warm-up over 256 tokens",
        "ZeRO 3, fp32",
        "#   tokens              5,120 in 26 steps",
        "are kept, and the last of each phase",
    ):
        assert line in text
    assert text.count("memory of a rank") == 4


def cursor(**changes: Any) -> Cursor:
    return Cursor(**{"position": 4, "sequence_length": 32, "seed": 0, "order": "rows", "fingerprint": "f", **changes})


def state(*done: DonePhase, phase: str) -> TrainerState:
    return TrainerState(step=20, tokens=2000, phase=phase, done=done, tokenizer_sha256=None, ranks=1)


def test_phases_that_were_begun_keep_their_names_and_places_and_what_was_trained_on(path: Path) -> None:
    short = DonePhase(name="short", asked_tokens=1536, tokens=1536, cursor=cursor())
    folder, phases = Path("checkpoint"), load_phases(path)
    assert _phase_of(folder, state(short, phase="long"), phases) == phases[1]
    later = [
        ("phases.drawn.training.tokens", "5Ki"),
        ("phases.drawn.name", "other"),
        ("phases.short.optimizer.lr", "1"),
    ]
    assert _phase_of(folder, state(short, phase="long"), load_phases(path, later)).name == "long"
    for changed, expected in (
        (
            state(short, phase="longer"),
            "stands in phase longer of the phases short, longer, and",
        ),
        (state(phase="long"), "stands in phase long of the phases long, and the recipe's are short, long, drawn"),
        (state(short.model_copy(update={"name": "old"}), phase="long"), "the phases old, long"),
        (
            state(short.model_copy(update={"asked_tokens": 5}), phase="long"),
            "phases.short.training.tokens was 5",
        ),
        (
            state(short.model_copy(update={"cursor": cursor(seed=3, sequence_length=8)}), phase="long"),
            "phases.short.training.sequence_length was 8, and is 32 in the recipe; phases.short.data.seed was 3",
        ),
        (
            state(short.model_copy(update={"cursor": cursor(order="documents")}), phase="long"),
            "phases.short.data.order was documents, and is rows in the recipe",
        ),
        (
            state(short.model_copy(update={"cursor": cursor(order="drawn")}), phase="long"),
            "phases.short.data.order was drawn, and is rows in the recipe",
        ),
        (
            state(short.model_copy(update={"cursor": cursor(grid=16)}), phase="long"),
            "phases.short.data.reset_memory was True, and is False in the recipe",
        ),
    ):
        with pytest.raises(UserError) as caught:
            _phase_of(folder, changed, phases)
        assert expected in str(caught.value)


def test_a_phase_that_is_done_cannot_become_one_of_other_rows(path: Path) -> None:
    """Rows that are drawn have no field of their order: text that was trained on is text all the same."""
    done = [
        DonePhase(name=name, asked_tokens=tokens, tokens=tokens, cursor=cursor(seed=seed, sequence_length=length))
        for seed, (name, tokens, length) in enumerate([("short", 1536, 32), ("long", 2048, 128), ("drawn", 1536, 128)])
    ]
    later = {"name": "later", "training": {"sequence_length": 128, "batch_tokens": 256}}
    phases = load_phases(write(path.parent, [*PHASES, later]))
    with pytest.raises(UserError, match="phases.drawn.data.order was rows, and is drawn in the recipe;"):
        _phase_of(Path("checkpoint"), state(*done, phase="later"), phases)


def test_a_phase_that_has_just_ended_cannot_change_any_more_either(path: Path) -> None:
    """At its last checkpoint: later ones, which have it behind them, would refuse what this one let pass."""
    ended = TrainerState(step=12, tokens=1536, phase="short", cursor=cursor(), tokenizer_sha256=None, ranks=1)
    inside = ended.model_copy(update={"step": 11, "tokens": 1408})
    changed = load_phases(path, [("phases.short.data.seed", "3"), ("phases.short.data.order", "documents")])
    with pytest.raises(UserError) as caught:
        _phase_of(Path("checkpoint"), ended, changed)
    assert "phases.short.data.seed was 0, and is 3 in the recipe" in str(caught.value)
    assert "phases.short.data.order was rows, and is documents in the recipe" in str(caught.value)
    assert _phase_of(Path("checkpoint"), inside, changed) == changed[0], "its cursor is checked when the loader opens"
    longer = load_phases(path, [("phases.short.training.tokens", "3Ki")])
    assert _phase_of(Path("checkpoint"), ended, longer) == longer[0], "it goes on"


def test_a_phase_ends_with_its_tokens_and_the_next_begins(path: Path) -> None:
    phases = load_phases(path)
    inside = TrainerState(step=11, tokens=1408, phase="short", cursor=cursor(), tokenizer_sha256=None, ranks=1)
    assert inside.moved_on(phases) == inside and inside.total_steps(phases, 1) == 26
    ended = inside.model_copy(update={"step": 12, "tokens": 1536})
    begun = ended.moved_on(phases)
    assert (begun.phase, begun.phase_tokens, begun.cursor, begun.step) == ("long", 0, None, 12)
    assert begun.done == (DonePhase(name="short", asked_tokens=1536, tokens=1536, cursor=cursor()),)
    assert begun.total_steps(phases, 1) == 26
    longer = load_phases(path, [("phases.short.training.tokens", "3Ki")])
    assert ended.moved_on(longer) == ended, "more tokens for a phase whose successor has not begun"
    last = begun.model_copy(update={"tokens": 1536 + 2048}).moved_on(phases)
    ended = last.model_copy(update={"tokens": last.tokens + 1536})
    assert ended.moved_on(phases) == ended and ended.is_done(phases[2])
